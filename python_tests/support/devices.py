"""Devices for an op: each CPU path, the emulator (CUDA kernels on the CPU), Triton, and a GPU if there is one."""

import functools
import importlib
import os
import sys
import warnings
from contextlib import contextmanager
from dataclasses import dataclass

import pytest
import torch

# Where there is no GPU, Triton interprets its kernels; it reads this when it is imported, and so does petl_ext.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import emulated_build

from petl_ext import ops
from petl_ext.ops.kernels import MIXING, OPS

# More rows than a slab of the Triton kernels has, and a width of more than one of their tiles and no multiple of one.
TRITON_SLAB, INTERPRETED_WIDTH = 530, 136
TRITON_TILE = 70  # and more rows than any of their tiles has
CPU_PATHS = torch.ops.petl_ext.cpu_paths().split()
EMULATED_OPS = [*(raw_op for op in OPS.values() for raw_op in op.flops), "apt_pack", "apt_begin", "adapter_pack"]


@dataclass(frozen=True)
class Device:
    name: str

    @property
    def rounds_for_tensor_cores(self):
        return self.name in ("emulated", "cuda", "triton")

    @property
    def mixes_dtypes(self):
        return self.name in CPU_PATHS

    @property
    def is_interpreted(self):
        return self.name == "triton" and self.torch_device.type == "cpu"

    def cut(self, sizes, most_rows=130):
        """A problem's sizes, smaller where a large one would take the interpreter minutes: rows and the width."""
        if not self.is_interpreted:
            return sizes
        *batch, rows, width, inner = sizes
        return *batch, min(rows, most_rows), min(width, INTERPRETED_WIDTH), inner

    def draws(self, number):
        """How many problems of a size are drawn: a few where each takes long."""
        return min(number, 4) if self.is_interpreted else number

    def raw(self, op, direction):
        """Of the two ops behind an `Op` of the table of problems, "forward" or "backward", the one that runs here."""
        return getattr(
            torch.ops.petl_triton if self.name == "triton" else torch.ops.petl_ext, f"{op}_{direction}"
        ).default

    @property
    def torch_device(self):
        on_gpu = self.name == "cuda" or (self.name == "triton" and torch.cuda.is_available())
        return torch.device("cuda" if on_gpu else "cpu")

    def put(self, tensors):
        return [tensor.to(self.torch_device) for tensor in tensors]

    def __str__(self):
        return self.name

    @contextmanager
    def entered(self):
        if self.name == "emulated":
            with emulation():
                yield
        elif self.name == "triton":
            with warnings.catch_warnings(), ops.backend("triton"):
                # NumPy's, of infinities, in the interpreter.
                warnings.filterwarnings("ignore", ".* encountered in ", RuntimeWarning)
                yield
        elif self.name == "cuda":
            yield
        else:
            ops.cpu_path(self.name)
            try:
                yield
            finally:
                ops.cpu_path("auto")


EMULATED = Device("emulated")
CUDA_DEVICES = [EMULATED, *([Device("cuda")] if torch.cuda.is_available() else [])]
CPU_DEVICES = [Device(name) for name in CPU_PATHS]
TRITON = Device("triton")
DEVICES = [*CPU_DEVICES, *CUDA_DEVICES, TRITON]
# One CPU path and all others, for what every CPU path gets from the same code around the kernels.
ONE_OF_EACH = [CPU_DEVICES[0], *CUDA_DEVICES, TRITON]


DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# For what a dtype does not change in the Triton kernels themselves: the interpreter, which is slow, takes one.
device_and_dtype = pytest.mark.parametrize(
    ("device", "dtype"),
    [(device, dtype) for device in DEVICES for dtype in (DTYPES[1:2] if device.is_interpreted else DTYPES)],
    ids=str,
    indirect=["device"],
)


@functools.cache
def emulated_module():
    """petl_emulated, built where it is not up to date, with its ops defined as petl_ext's are."""
    emulated_build.build(capture_output=True, text=True)
    for name in EMULATED_OPS:
        schema = str(getattr(torch.ops.petl_ext, name).default._schema)
        torch.library.define(f"petl_emulated::{name}", schema[schema.index("(") :])
    sys.path.insert(0, str(emulated_build.folder()))
    return importlib.import_module("petl_emulated")


@contextmanager
def emulation(**settings):
    """The ops of petl_ext run the emulated CUDA kernels on CPU tensors.

    Args:
        settings: of petl_emulated.configure.
    """
    module = emulated_module()
    before = module.settings()
    library = torch.library.Library("petl_ext", "IMPL")
    mixing = set(MIXING)
    MIXING.clear()
    try:
        module.configure(**{**before, **settings})
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Warning only once for all operators")
            for name in EMULATED_OPS:
                library.impl(name, getattr(torch.ops.petl_emulated, name).default, "CPU", allow_override=True)
        yield
    finally:
        library._destroy()
        module.configure(**before)
        MIXING.update(mixing)
