"""Fused kernels for parameter- and computation-efficient transfer of vision-language models."""

from petl_ext import ops

# The function takes the name of the package petl_ext.attach, from which everything can still be imported.
from petl_ext.attach import (
    APTConfig,
    Attachment,
    ClassifierOnlyConfig,
    DeepPromptConfig,
    FullTuningConfig,
    attach,
    load,
)
from petl_ext.nn import AdapterLayer, APTLayer

__version__ = "0.1.0"
__all__ = [
    "APTConfig",
    "APTLayer",
    "AdapterLayer",
    "Attachment",
    "ClassifierOnlyConfig",
    "DeepPromptConfig",
    "FullTuningConfig",
    "attach",
    "load",
    "ops",
]
