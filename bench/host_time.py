"""What a forward costs the host before any launch, in microseconds: python bench/host_time.py

The ops of the emulated build are called with zero rows: all checks, views and allocations, and no kernel. They take
turns, since these machines are shared.
"""

import statistics
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "python_tests" / "support"), str(ROOT / "build_backend")]

from devices import emulated_module  # noqa: E402

from petl_ext.ops.apt import _APT  # noqa: E402
from petl_ext.ops.kernels import raw_ops_for  # noqa: E402

WIDTH, PROMPTS, BOTTLENECK = 768, 200, 96
CALLS, ROUNDS = 3000, 15


def calls():
    """{name: a call of a raw op}, activations in bfloat16 beside float32 weights."""
    emulated_module()
    raw = torch.ops.petl_emulated
    x, norm, bias = torch.empty(0, WIDTH, dtype=torch.bfloat16), torch.ones(WIDTH), torch.zeros(WIDTH)
    prompts, down = torch.randn(PROMPTS, WIDTH), torch.randn(BOTTLENECK, WIDTH)
    apt = x, x, prompts, prompts, torch.zeros(1), "relu", False
    training = [tensor.clone().requires_grad_() for tensor in apt[:5]]
    adapter = x, x, norm, bias, down, torch.zeros(BOTTLENECK), down.mT.contiguous(), bias, None, 1.0, 1e-5, "relu"
    return {
        "apt": lambda: raw.apt_forward.default(*apt),
        "adapter": lambda: raw.adapter_forward.default(*adapter),
        "apt in its autograd.Function": lambda: _APT.apply(*training, "relu", "petl_emulated", 0.0, None),
        "an empty Function with as many inputs": lambda: Empty.apply(*training, "relu", "petl_emulated", 0.0, None),
        "who computes apt": lambda: raw_ops_for("apt", training),
        "torch.add, for scale": lambda: torch.add(x, x),
    }


class Empty(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, *others):
        return x.new_empty(0)

    @staticmethod
    def backward(ctx, dout):
        return (None,) * len(ctx.needs_input_grad)


def microseconds(call):
    """Of so many calls, their mean."""
    begin = time.perf_counter()
    for _ in range(CALLS):
        call()
    return 1e6 * (time.perf_counter() - begin) / CALLS


if __name__ == "__main__":
    torch.set_num_threads(1)
    found = {name: [] for name in calls()}
    for _ in range(ROUNDS):
        for name, call in calls().items():
            found[name].append(microseconds(call))
    for name, times in found.items():
        print(f"{name}: least {min(times):.1f}, median {statistics.median(times):.1f}")
