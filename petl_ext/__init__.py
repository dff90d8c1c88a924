"""Fused kernels for parameter- and computation-efficient transfer of vision-language models."""

from petl_ext import ops

# The function takes the name of the package petl_ext.attach, from which everything can still be imported.
from petl_ext.attach import (
    AdapterConfig,
    APTConfig,
    Attachment,
    ClassifierOnlyConfig,
    DASConfig,
    DeepPromptConfig,
    FullTuningConfig,
    SkippingAttachment,
    attach,
    load,
)
from petl_ext.nn import AdapterLayer, APTLayer

__version__ = "0.1.0"
__all__ = [
    "APTConfig",
    "APTLayer",
    "AdapterConfig",
    "AdapterLayer",
    "Attachment",
    "ClassifierOnlyConfig",
    "DASConfig",
    "DeepPromptConfig",
    "FullTuningConfig",
    "SkippingAttachment",
    "attach",
    "load",
    "ops",
]
