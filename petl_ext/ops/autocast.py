"""What torch.autocast does to the ops."""

import torch


def as_autocast_wants(tensor):
    """`tensor` in the dtype that torch.autocast gives to the operands of a matrix product; outside of it, itself."""
    if tensor.dtype is not torch.float32:
        return tensor
    device = tensor.device.type
    if device != "meta" and torch.is_autocast_enabled(device):
        return tensor.to(torch.get_autocast_dtype(device))
    return tensor
