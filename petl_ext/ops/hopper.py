"""The path of the CUDA kernels that is made for Hopper, GPUs of compute capability 9.0: whether it is on, and for what.

No GPU has confirmed it yet: it is off unless the environment variable PETL_HOPPER is 1 when the process begins.
"""

import os
from typing import NamedTuple

import torch

HOPPER_VARIABLE = "PETL_HOPPER"
CAPABILITY = (9, 0)


class HopperLimits(NamedTuple):
    """What the path takes, as C++ says it: elements of 16 bits, and these sizes.

    Attributes:
        ops: the names of those that have it, in one string.
        width_multiple: what the width D is a multiple of.
        max_inner: the greatest number of prompts P or bottleneck B.
        least_rows: fewer rows are the other path's.
    """

    ops: str
    width_multiple: int
    max_inner: int
    least_rows: int


def is_asked(op, dtype, dropout, sizes):
    """Whether calls of such an op in this dtype, with enough rows, are to run on it.

    Args:
        op: its name.
        dtype: of the tensors.
        dropout: its probability; the path has none.
        sizes: (width, inner size), or None: any that it takes.
    """
    limits = HopperLimits(*torch.ops.petl_ext.hopper_limits())
    is_on = torch.ops.petl_ext.hopper_state("").startswith("on")
    if not is_on or dropout > 0 or op not in limits.ops.split():
        return False
    width, inner = sizes or (limits.width_multiple, 1)
    fits = width % limits.width_multiple == 0 and inner <= limits.max_inner
    return fits and dtype in (torch.bfloat16, torch.float16)


def in_words():
    """For which calls it runs, where it is asked for."""
    return f"hopper from {HopperLimits(*torch.ops.petl_ext.hopper_limits()).least_rows} rows"


def obstacle(capability):
    """Why such calls raise, if they do. `capability`: of the GPU, None without one."""
    if torch.ops.petl_ext.hopper_state("") != "on":
        return f"{HOPPER_VARIABLE}=1 asks for kernels for sm_90a, which this build does not hold"
    if capability not in (None, CAPABILITY):
        wanted, found = (".".join(map(str, pair)) for pair in (CAPABILITY, capability))
        return f"{HOPPER_VARIABLE}=1 asks for a GPU of compute capability {wanted}, this one has {found}"
    return ""


def state_in_words():
    """One line for `petl-ext info`."""
    state = torch.ops.petl_ext.hopper_state("")
    if state == "unknown":
        return f"{HOPPER_VARIABLE} must be 0 or 1, got {os.environ.get(HOPPER_VARIABLE)!r}; calls on CUDA raise"
    hints = {
        "off": f" ({HOPPER_VARIABLE}=1 turns it on; no GPU has confirmed it yet)",
        "on": f" ({HOPPER_VARIABLE}=1; no GPU has confirmed it yet)",
    }
    return state + hints.get(state, "")
