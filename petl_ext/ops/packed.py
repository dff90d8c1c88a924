"""What a call on CUDA finds done already: its weights packed, or a part of its work queued."""

from typing import NamedTuple

import torch


class Packed(NamedTuple):
    """What a raw op such as `petl_ext::apt_pack` has made of an op's weights, as they were then.

    Attributes:
        data: uint8, on the weights' device.
        dtype: of the products that it is for.
    """

    data: torch.Tensor
    dtype: torch.dtype


class Begun(NamedTuple):
    """What a raw op such as `petl_ext::apt_begin` has queued of a call.

    Attributes:
        data: uint8, for the rest of the call alone.
        x: the call's.
    """

    data: torch.Tensor
    x: torch.Tensor


def data_for(packed, raw_ops, dtype):
    """The data of a `Packed`, or None where the ops of this namespace multiply in another dtype, or take none."""
    fits = packed is not None and raw_ops == "petl_ext" and packed.dtype is dtype
    return packed.data if fits else None


def dtype_of_activations(weight):
    """What is to be expected beside a weight: autocast's dtype where that is on, or else the weight's."""
    device = weight.device.type
    if device != "meta" and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return weight.dtype
