"""APTLayer in eval mode, with the keys made in each forward and with frozen ones."""

import pytest
import torch
from clock import thread_clock
from shapes import VILT, VILT_ONE

import petl_ext


@pytest.mark.parametrize("num_prompts", [50, 200])
@pytest.mark.parametrize("shape", [VILT_ONE, VILT], ids=str)
def test_freeze(shape, num_prompts, compare):
    torch.manual_seed(0)
    layers = {name: petl_ext.APTLayer(shape.dim, num_prompts).eval() for name in ("computed", "frozen")}
    layers["frozen"].freeze()
    x, y = torch.randn(2, shape.rows, shape.dim)
    with torch.no_grad():
        contenders = {name: lambda layer=layer: layer(x, y) for name, layer in layers.items()}
        compare(f"APTLayer forward float32 {shape} P={num_prompts}", shape, contenders, "frozen", thread_clock)
