"""What torch.autocast does to the ops."""

import torch

from petl_ext.ops.kernels import MIXING


def dtype_of_products(tensor):
    """The dtype that torch.autocast gives to a tensor as an operand of a matrix product; outside of it, its own."""
    device = tensor.device.type
    if tensor.dtype is torch.float32 and device != "meta" and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return tensor.dtype


def as_autocast_wants(tensor):
    """`tensor` in the dtype that torch.autocast gives to the operands of a matrix product; outside of it, itself."""
    return tensor.to(dtype_of_products(tensor))


def rounds_inside(raw_ops, x):
    """Whether the raw ops of this namespace round x to what autocast wants, and nobody has to before.

    Args:
        raw_ops: None where the reference computes.
    """
    is_wide = x.dtype is torch.float32 and dtype_of_products(x) is torch.bfloat16
    return is_wide and (raw_ops, x.device.type) in MIXING
