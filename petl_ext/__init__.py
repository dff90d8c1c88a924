"""Fused kernels for parameter- and computation-efficient transfer of vision-language models."""

from petl_ext import ops
from petl_ext.nn import APTLayer

__version__ = "0.1.0"
__all__ = ["APTLayer", "ops"]
