"""Functions on tensors: each op beside its reference in plain PyTorch."""

from petl_ext.ops.apt import apt, apt_reference
from petl_ext.ops.library import cpu_path

__all__ = ["apt", "apt_reference", "cpu_path"]
