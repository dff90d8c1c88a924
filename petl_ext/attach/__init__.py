"""Puts layers into a model and takes them out again; one small table per model family (families.py).

`petl_ext.attach` is the function `attach`, not this package, which is imported from: `from petl_ext.attach import ...`.
"""

from petl_ext.attach.attachment import Attachment, attach, load
from petl_ext.attach.config import APTConfig, ClassifierOnlyConfig, DeepPromptConfig, FullTuningConfig
from petl_ext.attach.report import Report, ReportRow

__all__ = [
    "APTConfig",
    "Attachment",
    "ClassifierOnlyConfig",
    "DeepPromptConfig",
    "FullTuningConfig",
    "Report",
    "ReportRow",
    "attach",
    "load",
]
