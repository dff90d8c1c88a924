"""Runs other people's modules by our kernels, under the same parameters and keys.

`petl_ext.patch` is the function `patch`, not this package, which is imported from: `from petl_ext.patch import ...`.
"""

from petl_ext.patch.class_patch import ClassPatch, patch_class, unpatch_class
from petl_ext.patch.patch import Patch, patch, unpatch
from petl_ext.patch.report import PatchReport, PatchRow

__all__ = ["ClassPatch", "Patch", "PatchReport", "PatchRow", "patch", "patch_class", "unpatch", "unpatch_class"]
