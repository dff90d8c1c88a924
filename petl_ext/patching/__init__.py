"""Runs other people's modules by our kernels, under the same parameters and keys."""

from petl_ext.patching.class_patch import ClassPatch, patch_class, unpatch_class
from petl_ext.patching.patch import Patch, patch, unpatch
from petl_ext.patching.report import PatchReport, PatchRow

__all__ = ["ClassPatch", "Patch", "PatchReport", "PatchRow", "patch", "patch_class", "unpatch", "unpatch_class"]
