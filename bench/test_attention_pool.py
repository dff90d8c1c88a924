"""Cross-attention of one query: with torch's fused attention and all projections, and with the tokens pooled first."""

import pytest
import torch
import torch.nn.functional as F
from memory import saved_for_backward
from shapes import CLIP_IMAGE, CLIP_IMAGE_ONE, METER_IMAGE

from petl_ext import ops

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
HEADS = 12


def make_inputs(shape, dtype, visual_trains, trains):
    """One query row per sample, the image's tokens, and the four projections with their biases."""
    generator = torch.Generator().manual_seed(0)

    def normal(*size, std=1.0, trains=trains):
        return (torch.randn(*size, generator=generator) * std).to(dtype).requires_grad_(trains)

    inputs = {
        "visual": normal(shape.batch, shape.tokens, shape.dim, trains=trains and visual_trains),
        "row": normal(shape.batch, shape.dim),
    }
    for name in ("query", "key", "value", "out"):
        inputs[f"{name}_weight"] = normal(shape.dim, shape.dim, std=shape.dim**-0.5)
        inputs[f"{name}_bias"] = normal(shape.dim, std=0.02)
    return inputs


def by_head(tensor):
    return tensor.unflatten(-1, (HEADS, -1))


def fused_attention(visual, row, query_weight, query_bias, key_weight, key_bias, value_weight, value_bias, *out):
    query = by_head(F.linear(row[:, None], query_weight, query_bias)).transpose(1, 2)
    key = by_head(F.linear(visual, key_weight, key_bias)).transpose(1, 2)
    value = by_head(F.linear(visual, value_weight, value_bias)).transpose(1, 2)
    return F.linear(F.scaled_dot_product_attention(query, key, value).flatten(1), *out)


def pooled_first(pool):
    """The same function of the same arguments. The key's bias cancels in the softmax."""

    def attention(visual, row, query_weight, query_bias, key_weight, key_bias, value_weight, value_bias, *out):
        rows_of_heads = (HEADS, -1, visual.size(-1))
        query = by_head(F.linear(row, query_weight, query_bias)).transpose(0, 1)
        folded = (query @ key_weight.view(rows_of_heads)).transpose(0, 1)
        pooled = pool(visual, folded, scale=query.size(-1) ** -0.5)
        values = (pooled.transpose(0, 1) @ value_weight.view(rows_of_heads).mT).transpose(0, 1).flatten(1)
        return F.linear(values + value_bias, *out)

    return attention


@pytest.fixture
def functions():
    # Without it the ninth shape would run uncompiled, silently: a function is compiled anew eight times at most.
    torch._dynamo.reset()
    rewritten = pooled_first(ops.attention_pool_reference)
    return {
        "eager": fused_attention,
        "compile": torch.compile(fused_attention, dynamic=False),
        "pooled eager": rewritten,
        "pooled compile": torch.compile(rewritten, dynamic=False),
        "ours": pooled_first(ops.attention_pool),
    }


def forward(function, inputs):
    def run():
        with torch.no_grad():
            function(*inputs.values())

    return run


def forward_backward(function, inputs):
    dout = torch.randn_like(inputs["row"])
    trained = [tensor for tensor in inputs.values() if tensor.requires_grad]
    # The rewritten forms have no use for the key's bias: its gradient is zero.
    return lambda: torch.autograd.grad(function(*inputs.values()), trained, dout, allow_unused=True)


def saved_bytes(function, inputs):
    """What autograd keeps beyond the arguments."""
    return sum(saved_for_backward(lambda: function(*inputs.values()), inputs.values()))


# What runs, and whether the tokens need a gradient.
CASES = {
    "forward": (forward, False),
    "forward_backward": (forward_backward, True),
    "forward_backward visual frozen": (forward_backward, False),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [CLIP_IMAGE_ONE, CLIP_IMAGE, METER_IMAGE], ids=str)
def test_attention_pool(shape, dtype, case, functions, compare):
    direction, visual_trains = CASES[case]
    inputs = make_inputs(shape, DTYPES[dtype], visual_trains, direction is forward_backward)
    contenders = {name: direction(function, inputs) for name, function in functions.items()}
    kept = {}
    if direction is forward_backward:
        rivals = ("eager", "pooled eager", "ours")
        kept["saved_bytes"] = {name: saved_bytes(functions[name], inputs) for name in rivals}
    compare(f"attention_pool {case} {dtype} {shape} N={shape.tokens}", shape, contenders, **kept)
