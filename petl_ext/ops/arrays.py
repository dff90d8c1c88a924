"""The ops on arrays of other libraries, such as NumPy and CuPy: in and out by DLPack, without a copy."""

import functools
import importlib
import sys
from collections.abc import Callable
from contextlib import nullcontext
from typing import TypeVar

import torch

Function = TypeVar("Function", bound=Callable)
_CPU = 1  # DLPack's kDLCPU


def takes_arrays(op: Function) -> Function:
    """A decorator of an op's public function: where its first argument is an array, so is what it returns.

    Args:
        op: the function of tensors, whose first argument decides the library.
    """

    first_name = op.__code__.co_varnames[0]

    @functools.wraps(op)
    def call(*arguments, **named):
        first = arguments[0] if arguments else named.get(first_name)
        if isinstance(first, torch.Tensor) or not hasattr(first, "__dlpack__"):
            return op(*arguments, **named)
        return _call_on_arrays(op, first, arguments, named)

    return call


def _call_on_arrays(op, first, arguments, named):
    names = op.__code__.co_varnames
    with _stream_of(first):
        tensors = [_tensor_of(op, name, value) for name, value in zip(names, arguments, strict=False)]
        more = {name: _tensor_of(op, name, value) for name, value in named.items()}
        out = op(*tensors, *arguments[len(names) :], **more)
        return _library_of(first).from_dlpack(out.detach())


def _tensor_of(op, name, value):
    """The tensor over an array's memory; other arguments as they are."""
    if isinstance(value, torch.Tensor) or not hasattr(value, "__dlpack__"):
        return value
    try:
        # torch ends the process at a stride below zero.
        if min(getattr(value, "strides", None) or (0,)) < 0:
            raise ValueError("a stride is negative")
        if value.__dlpack_device__()[0] == _CPU:  # which has no streams to wait for
            return torch._C._from_dlpack(value.__dlpack__())
        return torch.from_dlpack(value)
    # NumPy raises a BufferError of what is not to be written to, and others of dtypes and strides.
    except Exception as error:
        raise TypeError(
            f"{op.__name__}: {name} must be an array that DLPack passes on without a copy, got a "
            f"{type(value).__name__} of {value.dtype} on {getattr(value, 'device', 'an unknown device')} with shape "
            f"{list(value.shape)} and strides {getattr(value, 'strides', None)}: {error}"
        ) from error


def _library_of(array):
    """The module that has the array's `from_dlpack`."""
    if hasattr(array, "__array_namespace__"):
        return array.__array_namespace__()
    return sys.modules[type(array).__module__.partition(".")[0]]


def _stream_of(array):
    """A context in which the op joins CuPy's current stream. By that stream's order alone, what CuPy does next with the
    result comes later, and memory that either library frees and uses again is free. Of others, DLPack makes torch's
    current stream wait for theirs."""
    if type(array).__module__.partition(".")[0] != "cupy":
        return nullcontext()
    stream = importlib.import_module("cupy").cuda.get_current_stream()
    return torch.cuda.stream(torch.cuda.ExternalStream(stream.ptr, device=array.device.id))
