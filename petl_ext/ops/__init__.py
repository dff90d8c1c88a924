"""Functions on tensors: each op beside its reference in plain PyTorch."""

from petl_ext.ops.adapter import adapter, adapter_reference
from petl_ext.ops.apt import apt, apt_reference
from petl_ext.ops.attention_pool import attention_pool, attention_pool_reference
from petl_ext.ops.backends import backend
from petl_ext.ops.dropout import dropout_mask
from petl_ext.ops.kernels import cpu_path
from petl_ext.ops.triton import add_triton

__all__ = [
    "adapter",
    "adapter_reference",
    "apt",
    "apt_reference",
    "attention_pool",
    "attention_pool_reference",
    "backend",
    "cpu_path",
    "dropout_mask",
]

add_triton()
