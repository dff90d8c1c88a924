"""Puts layers into a model and takes them out again: a method is one file, a model family one record (families.py)."""

from petl_ext.attaching.attach import attach, load
from petl_ext.attaching.families import Family, register_family
from petl_ext.attaching.handle import Attachment
from petl_ext.attaching.report import LayerCosts, Report, ReportRow
from petl_ext.attaching.skipping import SkippingAttachment

__all__ = [
    "Attachment",
    "Family",
    "LayerCosts",
    "Report",
    "ReportRow",
    "SkippingAttachment",
    "attach",
    "load",
    "register_family",
]
