"""Puts layers into a model and takes them out again; one small table per model family (families.py).

`petl_ext.attach` is the function `attach`, not this package, which is imported from: `from petl_ext.attach import ...`.
"""

from petl_ext.attach.attach import attach, load
from petl_ext.attach.attachment import Attachment
from petl_ext.attach.config import (
    AdapterConfig,
    APTConfig,
    ClassifierOnlyConfig,
    ClassTokenConfig,
    DASConfig,
    DeepPromptConfig,
    FullTuningConfig,
)
from petl_ext.attach.report import LayerCosts, Report, ReportRow
from petl_ext.attach.skipping import SkippingAttachment

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
