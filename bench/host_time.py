"""What a raw forward costs the host before any launch, in microseconds: python bench/host_time.py

The ops of the emulated build are called with zero rows: all checks, views and allocations, and no kernel.
"""

import statistics
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "python_tests" / "support"), str(ROOT / "build_backend")]

from devices import emulated_module  # noqa: E402

WIDTH, PROMPTS, BOTTLENECK = 768, 200, 96
CALLS, ROUNDS = 3000, 15


def calls():
    """{name: a call of a raw op}, activations in bfloat16 beside float32 weights."""
    emulated_module()
    raw = torch.ops.petl_emulated
    x, norm, bias = torch.empty(0, WIDTH, dtype=torch.bfloat16), torch.ones(WIDTH), torch.zeros(WIDTH)
    prompts, down = torch.randn(PROMPTS, WIDTH), torch.randn(BOTTLENECK, WIDTH)
    apt = x, x, prompts, prompts, torch.zeros(1), "relu", False
    adapter = x, x, norm, bias, down, torch.zeros(BOTTLENECK), down.mT.contiguous(), bias, None, 1.0, 1e-5, "relu"
    return {
        "apt": lambda: raw.apt_forward.default(*apt),
        "adapter": lambda: raw.adapter_forward.default(*adapter),
        "torch.add, for scale": lambda: torch.add(x, x),
    }


def microseconds(call):
    """Of each round's calls, their mean."""
    for _ in range(ROUNDS):
        begin = time.perf_counter()
        for _ in range(CALLS):
            call()
        yield 1e6 * (time.perf_counter() - begin) / CALLS


if __name__ == "__main__":
    torch.set_num_threads(1)
    for name, call in calls().items():
        call()
        times = list(microseconds(call))
        print(f"{name}: least {min(times):.1f}, median {statistics.median(times):.1f}")
