"""ops.apt against PyTorch's eager mode and torch.compile."""

import pytest
import torch
from clock import race, speed_up
from shapes import CLIP_TEXT, LLAMA, METER_IMAGE, VILT, VILT_ONE

from petl_ext import ops

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@pytest.fixture
def compiled():
    # Without it the ninth shape would run uncompiled, silently: a function is compiled anew eight times at most.
    torch._dynamo.reset()
    return torch.compile(ops.apt_reference, dynamic=False)


def make_inputs(shape, num_prompts, dtype, trained):
    generator = torch.Generator().manual_seed(0)

    def normal(*size, std=1.0):
        return (torch.randn(*size, generator=generator) * std).to(dtype).requires_grad_(trained)

    x, y = normal(shape.rows, shape.dim), normal(shape.rows, shape.dim)
    prompts, keys = normal(num_prompts, shape.dim, std=0.02), normal(num_prompts, shape.dim, std=0.02)
    return [x, y, prompts, keys, torch.zeros(1, dtype=dtype, requires_grad=trained)]


def forward(function, inputs):
    def run():
        with torch.no_grad():
            function(*inputs)

    return run


def forward_backward(function, inputs):
    dout = torch.randn_like(inputs[1])
    return lambda: torch.autograd.grad(function(*inputs), inputs, dout)


@pytest.mark.parametrize("direction", [forward, forward_backward], ids=lambda f: f.__name__)
@pytest.mark.parametrize("num_prompts", [50, 200])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [VILT, VILT_ONE, METER_IMAGE, CLIP_TEXT, LLAMA], ids=str)
def test_apt(shape, dtype, num_prompts, direction, compiled, rounds, benchmark, record_property):
    inputs = make_inputs(shape, num_prompts, DTYPES[dtype], trained=direction is forward_backward)
    functions = {"eager": ops.apt_reference, "compile": compiled, "ours": ops.apt}
    contenders = {name: direction(function, inputs) for name, function in functions.items()}
    seconds = race(contenders, rounds)
    record_property(
        "comparison",
        {
            "name": f"apt {direction.__name__} {dtype} {shape} P={num_prompts}",
            "rows": shape.rows,
            "dim": shape.dim,
            "milliseconds": round(1e3 * sorted(seconds["ours"])[rounds // 2], 3),
            "speed_up": {f"vs {name}": speed_up(seconds, name, "ours") for name in ("eager", "compile")},
        },
    )
    benchmark.pedantic(contenders["ours"], rounds=rounds)
