"""Fused kernels for parameter- and computation-efficient transfer of vision-language models."""

import importlib
from typing import TYPE_CHECKING

from petl_ext import ops
from petl_ext.attaching import Attachment, SkippingAttachment, attach, load
from petl_ext.attaching.methods.adapter import AdapterConfig
from petl_ext.attaching.methods.apt import APTConfig
from petl_ext.attaching.methods.class_token import ClassTokenConfig
from petl_ext.attaching.methods.das import DASConfig
from petl_ext.attaching.methods.deep_prompts import DeepPromptConfig
from petl_ext.attaching.methods.tuning import ClassifierOnlyConfig, FullTuningConfig
from petl_ext.nn import AdapterLayer, APTLayer, VisualPromptLayer
from petl_ext.patching import patch, patch_class, unpatch, unpatch_class
from petl_ext.search import DepthSearch, PlacementSearch

__version__ = "0.1.0"
__all__ = [
    "APTConfig",
    "APTLayer",
    "AdapterConfig",
    "AdapterLayer",
    "Attachment",
    "ClassTokenConfig",
    "ClassifierOnlyConfig",
    "DASConfig",
    "DeepPromptConfig",
    "DepthSearch",
    "FullTuningConfig",
    "PlacementSearch",
    "SkippingAttachment",
    "VisualPromptLayer",
    "attach",
    "load",
    "ops",
    "patch",
    "patch_class",
    "unpatch",
    "unpatch_class",
]

# They need more than torch.
_ON_DEMAND = ("cupy", "hf", "models", "peft")

if TYPE_CHECKING:
    from petl_ext import cupy, hf, models, peft  # noqa: F401
else:

    def __getattr__(name):
        """Makes `petl_ext.hf` and others work without an import of their own."""
        if name in _ON_DEMAND:
            return importlib.import_module(f"petl_ext.{name}")
        raise AttributeError(f"module 'petl_ext' has no attribute {name!r}")
