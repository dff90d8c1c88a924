"""The backend "triton": the ops in Triton, for GPUs for which petl_ext._C holds no kernel.

Triton itself is imported by the first call. With TRITON_INTERPRET=1 in the environment when petl_ext is imported, its
interpreter runs the kernels on CPU tensors: slowly, to look into them and to test them.
"""

import importlib
import importlib.util
import os
import re
from functools import cache, partial
from pathlib import Path

from petl_ext.ops.kernels import Limits, add_backend

OLDEST = (3, 6)  # what torch 2.10 brings; older ones have not been tried
INSTALL = "pip install 'petl_ext[triton]'"
LIMITS = {"apt": Limits(1, 8192, 512), "adapter": Limits(1, 8192, 512), "attention_pool": Limits(1, 8192, 64)}


@cache
def is_interpreted():
    return os.environ.get("TRITON_INTERPRET") == "1"


def _version_in(text):
    found = re.search(r"""^__version__ = ["'](\d+)\.(\d+)""", text, re.MULTILINE)
    return found and tuple(map(int, found.groups()))


def missing_because(spec):
    """Why Triton cannot be used, and what to do; "" where it can.

    Args:
        spec: that of the module, or None. Its version is read, not imported, which would take seconds.
    """
    if spec is None or spec.origin is None:
        return f"Triton is not installed: {INSTALL}"
    version = _version_in(Path(spec.origin).read_text(encoding="utf-8"))
    if version is None or version < OLDEST:
        got = "one without a version" if version is None else "{}.{}".format(*version)
        return f"Triton must be {OLDEST[0]}.{OLDEST[1]} or later, got {got}: {INSTALL}"
    return ""


@cache
def _check_driver():
    """Raises a RuntimeError where Triton finds no GPU that it can compile for."""
    from triton.runtime import driver

    try:
        driver.active.get_current_target()
    except Exception as error:
        raise RuntimeError(
            "petl_ext.ops: the backend triton was to compute, but Triton finds no working GPU driver: "
            f'{error}. petl_ext.ops.backend("reference") computes in plain PyTorch'
        ) from error


def _call(op, direction, *arguments):
    if not is_interpreted():
        _check_driver()
    return getattr(importlib.import_module(f"petl_ext.ops.triton.{op}"), f"{op}_{direction}")(*arguments)


def add_triton():
    """Enters the backend; called once, after the ops."""
    calls = {
        f"{op}_{direction}": partial(_call, op, direction) for op in LIMITS for direction in ("forward", "backward")
    }
    devices = ("cpu", "cuda", "xpu") if is_interpreted() else ("cuda", "xpu")
    add_backend("triton", devices, calls, LIMITS, missing_because(importlib.util.find_spec("triton")))
