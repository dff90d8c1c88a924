"""Puts layers into a model and takes them out again: one record per model family (families.py)."""

from petl_ext.attaching.attach import attach, load
from petl_ext.attaching.handle import Attachment
from petl_ext.attaching.methods.config import (
    AdapterConfig,
    APTConfig,
    ClassifierOnlyConfig,
    ClassTokenConfig,
    DASConfig,
    DeepPromptConfig,
    FullTuningConfig,
)
from petl_ext.attaching.report import LayerCosts, Report, ReportRow
from petl_ext.attaching.skipping import SkippingAttachment

__all__ = [
    "APTConfig",
    "AdapterConfig",
    "Attachment",
    "ClassTokenConfig",
    "ClassifierOnlyConfig",
    "DASConfig",
    "DeepPromptConfig",
    "FullTuningConfig",
    "LayerCosts",
    "Report",
    "ReportRow",
    "SkippingAttachment",
    "attach",
    "load",
]
