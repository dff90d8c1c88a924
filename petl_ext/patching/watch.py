"""What a forward does beside its formula: where it drops out, and in which autocast it computes."""

import contextlib

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

DEVICES = ("cpu", "cuda")
_DROPOUTS = {F.dropout, torch.dropout}
# Autocast decides about their dtypes.
_PRODUCTS = {
    F.linear,
    F.layer_norm,
    torch.conv1d,
    torch.conv2d,
    torch.conv3d,
    torch.matmul,
    torch.mm,
    torch.bmm,
    torch.addmm,
    torch.einsum,
    torch.Tensor.matmul,
    torch.Tensor.__matmul__,
}
_CASTS = {
    torch.Tensor.to,
    torch.Tensor.type,
    torch.Tensor.type_as,
    torch.Tensor.float,
    torch.Tensor.half,
    torch.Tensor.bfloat16,
}


def _everything(values):
    return values


class Watch(TorchFunctionMode):
    """While it is on, no dropout draws.

    Args:
        passed: from the values that a dropout would have dropped some of, what it returns; all of them if not given.

    Attributes:
        dropouts: the probabilities of those that would not have.
        autocasts: {device: {(whether autocast is on, its dtype), ...}}, at each product.
        casts: whether a tensor was cast.
    """

    def __init__(self, passed=_everything):
        super().__init__()
        self._passed = passed
        self.dropouts, self.casts = [], False
        self.autocasts = {device: set() for device in DEVICES}

    def __torch_function__(self, function, types, arguments=(), named=None):
        if function in _DROPOUTS:
            return self._drop(*arguments, **(named or {}))
        if function in _PRODUCTS:
            for device, states in self.autocasts.items():
                is_on = torch.is_autocast_enabled(device)
                states.add((is_on, torch.get_autocast_dtype(device) if is_on else None))
        self.casts |= function in _CASTS
        return function(*arguments, **(named or {}))

    def _drop(self, input, p=0.5, training=True, inplace=False, train=True):
        if not (training and train and p):
            return input
        self.dropouts.append(float(p))
        return self._passed(input)


@contextlib.contextmanager
def autocast_everywhere(**dtypes):
    """Within, autocast is on for the devices that are named, and off for all others. Unlike torch.autocast, for devices
    that are not there too."""
    before = {device: (torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)) for device in DEVICES}
    try:
        for device, (_, dtype) in before.items():
            _set_autocast(device, device in dtypes, dtypes.get(device, dtype))
        yield
    finally:
        for device, (is_on, dtype) in before.items():
            _set_autocast(device, is_on, dtype)


def _set_autocast(device, is_on, dtype):
    torch.set_autocast_enabled(device, is_on)
    torch.set_autocast_dtype(device, dtype)


def own_autocast(outside, within):
    """What `Settings.autocast` says of a forward that was watched outside of autocast and within that of other dtypes
    than are usual.

    Raises:
        ValueError: it computes in part within an autocast of its own.
    """
    found = []
    for device in DEVICES:
        states = outside[device], within[device]
        if any(len(state) > 1 for state in states):
            raise ValueError("a part of it computes in an autocast of its own")
        for (is_on, dtype), (stays_on, other) in zip(*states, strict=False):
            if is_on and not stays_on:
                raise ValueError("it turns autocast off where it is on, and on where it is off")
            if is_on:
                found.append((device, True, dtype if dtype is other else None))
            elif not stays_on:
                # Where there is no such device, autocast says that it is off, whatever was asked for.
                is_there = device == "cpu" or torch.cuda.is_available()
                found.append((device, False if is_there else None, None))
    return tuple(found)
