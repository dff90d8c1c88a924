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
_NO_STREAM = nullcontext()
_from_dlpack = torch._C._from_dlpack


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
    with _stream_of(first):
        tensors = [_tensor_of(op, position, value) for position, value in enumerate(arguments)]
        more = {name: _tensor_of(op, name, value) for name, value in named.items()}
        out = op(*tensors, **more)
        if out.requires_grad:
            out = out.detach()
        return _library_of(first).from_dlpack(_OnCpu(out) if out.is_cpu else out)


def _tensor_of(op, argument, value):
    """The tensor over an array's memory; other arguments as they are.

    Args:
        argument: the argument's name, or its position.
    """
    pack = getattr(value, "__dlpack__", None)
    if pack is None or isinstance(value, torch.Tensor):
        return value
    try:
        for stride in getattr(value, "strides", None) or ():
            if stride < 0:  # torch ends the process
                raise ValueError("a stride is negative")
        if value.__dlpack_device__()[0] == _CPU:  # which has no streams to wait for
            return _from_dlpack(pack())
        return torch.from_dlpack(value)
    # NumPy raises a BufferError of what is not to be written to, and others of dtypes and strides.
    except Exception as error:
        name = argument if isinstance(argument, str) else op.__code__.co_varnames[argument]
        raise TypeError(
            f"{op.__name__}: {name} must be an array that DLPack passes on without a copy, got a "
            f"{type(value).__name__} of {value.dtype} on {getattr(value, 'device', 'an unknown device')} with shape "
            f"{list(value.shape)} and strides {getattr(value, 'strides', None)}: {error}"
        ) from error


class _OnCpu:
    """A tensor on the CPU, for `from_dlpack`: what torch's own `__dlpack__` does beside this takes longer than a small
    op."""

    __slots__ = ("tensor",)

    def __init__(self, tensor):
        self.tensor = tensor

    def __dlpack_device__(self):
        return _CPU, 0

    def __dlpack__(self, *, max_version=None, **_):
        pack = torch._C._to_dlpack_versioned if max_version and max_version[0] else torch._C._to_dlpack
        return pack(self.tensor)


@functools.cache
def _package_of(class_):
    return class_.__module__.partition(".")[0]


def _library_of(array):
    """The module that has the array's `from_dlpack`."""
    package = sys.modules[_package_of(type(array))]
    return package if hasattr(package, "from_dlpack") else array.__array_namespace__()


def _stream_of(array):
    """A context in which the op joins CuPy's current stream. By that stream's order alone, what CuPy does next with the
    result comes later, and memory that either library frees and uses again is free. Of others, DLPack makes torch's
    current stream wait for theirs."""
    if _package_of(type(array)) != "cupy":
        return _NO_STREAM
    stream = importlib.import_module("cupy").cuda.get_current_stream()
    return torch.cuda.stream(torch.cuda.ExternalStream(stream.ptr, device=array.device.id))
