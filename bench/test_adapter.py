"""ops.adapter against PyTorch's eager mode and torch.compile."""

import pytest
import torch
from clock import race, speed_up
from shapes import LLAMA, METER_IMAGE, VILT, VILT_ONE

from petl_ext import ops

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# The scaled parallel adapter beside a module, and the sequential one behind it.
FORMS = {"parallel": {"norm": True, "residual": False}, "sequential": {"norm": False, "residual": True}}
# Those of a kept module (ViLT, METER), and of the bypasses that replace a skipped one.
CASES = [
    *((VILT, bottleneck) for bottleneck in (96, 192, 288)),
    *((shape, 96) for shape in (VILT_ONE, METER_IMAGE)),
    (LLAMA, 32),
]


@pytest.fixture
def compiled():
    # Without it the ninth shape would run uncompiled, silently: a function is compiled anew eight times at most.
    torch._dynamo.reset()
    return torch.compile(ops.adapter_reference, dynamic=False)


def make_inputs(shape, bottleneck, dtype, norm, trained):
    generator = torch.Generator().manual_seed(0)

    def normal(*size, std=1.0):
        return (torch.randn(*size, generator=generator) * std).to(dtype).requires_grad_(trained)

    inputs = {
        "x": normal(shape.rows, shape.dim),
        "down": normal(bottleneck, shape.dim, std=0.02),
        "down_bias": normal(bottleneck, std=0.02),
        "up": normal(shape.dim, bottleneck, std=0.02),
        "up_bias": normal(shape.dim, std=0.02),
    }
    if norm:
        inputs["norm_weight"] = torch.ones(shape.dim, dtype=dtype, requires_grad=trained)
        inputs["norm_bias"] = torch.zeros(shape.dim, dtype=dtype, requires_grad=trained)
    return inputs


def forward(call, inputs):
    def run():
        with torch.no_grad():
            call()

    return run


def forward_backward(call, inputs):
    dout, tensors = torch.randn_like(inputs["x"]), list(inputs.values())
    return lambda: torch.autograd.grad(call(), tensors, dout)


@pytest.mark.parametrize("direction", [forward, forward_backward], ids=lambda f: f.__name__)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "bottleneck"), CASES, ids=lambda value: str(value))
def test_adapter(shape, bottleneck, dtype, form, direction, compiled, rounds, benchmark, record_property):
    inputs = make_inputs(shape, bottleneck, DTYPES[dtype], FORMS[form]["norm"], direction is forward_backward)
    arguments = {**inputs, "residual": inputs["x"]} if FORMS[form]["residual"] else inputs
    functions = {"eager": ops.adapter_reference, "compile": compiled, "ours": ops.adapter}
    contenders = {
        name: direction(lambda function=function: function(**arguments), inputs) for name, function in functions.items()
    }
    seconds = race(contenders, rounds)
    record_property(
        "comparison",
        {
            "name": f"adapter {direction.__name__} {dtype} {shape} B={bottleneck} {form}",
            "rows": shape.rows,
            "dim": shape.dim,
            "milliseconds": round(1e3 * sorted(seconds["ours"])[rounds // 2], 3),
            "speed_up": {f"vs {name}": speed_up(seconds, name, "ours") for name in ("eager", "compile")},
        },
    )
    benchmark.pedantic(contenders["ours"], rounds=rounds)
