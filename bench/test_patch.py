"""Modules of other code bases, patched against unpatched: what remains of the ops' gain behind `petl_ext.patch`.

Two calls of one module's own forward are compared too, where the patched one leaves it alone: their ratio is 1 but for
noise.
"""

import copy

import pytest
import torch
from clock import thread_clock
from original_modules import (
    Adapter,
    Cross_Attention,
    LibraryAdapter,
    ParallelAdapter,
    approximate_prompt,
)
from shapes import CLIP_IMAGE, CLIP_IMAGE_MANY, CLIP_IMAGE_ONE, METER_IMAGE, METER_TEXT_ONE, VILT, VILT_MANY, VILT_ONE

import petl_ext

# Of modules that are cast to it, or under autocast.
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "bfloat16 autocast": torch.float32}
# With the sizes at which they are published; the library's is its default for a width of 768.
MODULES = {
    "prompts-50": lambda dim: approximate_prompt(12, dim, 4, 50),
    "prompts-200": lambda dim: approximate_prompt(12, dim, 4, 200),
    "prompts-50-dropout": lambda dim: approximate_prompt(12, dim, 4, 50, attn_drop=0.1),
    "bottleneck-96": lambda dim: Adapter(dim, 96),
    "parallel-96": lambda dim: ParallelAdapter(dim, 96, adapter_scalar="4.0"),
    "parallel-192": lambda dim: ParallelAdapter(dim, 192),
    # AdaptFormer's own, in training.
    "parallel-64-dropout": lambda dim: ParallelAdapter(dim, 64, dropout=0.1, adapter_scalar="0.1"),
    "library-48": lambda dim: LibraryAdapter(dim, 48),
    "cross-attention": lambda dim: Cross_Attention(dim, 0.0, 12),
}
STREAMS = [METER_TEXT_ONE, VILT_ONE, VILT, METER_IMAGE, VILT_MANY]
IMAGES = [CLIP_IMAGE_ONE, CLIP_IMAGE, CLIP_IMAGE_MANY]
CASES = [(name, shape) for name in MODULES for shape in (IMAGES if name == "cross-attention" else STREAMS)]


def arguments_of(name, shape, dtype, trained):
    generator = torch.Generator().manual_seed(0)

    def normal(tokens, trained=trained):
        tensor = torch.randn(shape.batch, tokens, shape.dim, generator=generator).to(dtype)
        return tensor.requires_grad_(trained)

    if name == "cross-attention":
        # The images come from a frozen encoder.
        visual = normal(shape.tokens, trained=False)
        return visual, visual, normal(1), None
    x = normal(shape.tokens)
    if name.startswith("parallel"):
        return x, False
    return (x,) if name.startswith("bottleneck") else (x, normal(shape.tokens))


def forward(module, arguments, is_autocast):
    def run():
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=is_autocast):
            module(*arguments)

    return run


def forward_backward(module, arguments, is_autocast):
    """Of the parameters and of the streams, which have passed trained layers before."""
    wanted = [t for t in arguments if torch.is_tensor(t) and t.requires_grad] + list(module.parameters())

    def output():
        with torch.autocast("cpu", torch.bfloat16, enabled=is_autocast):
            out = module(*arguments)
        return out[0] if isinstance(out, tuple) else out

    dout = torch.randn_like(output())
    return lambda: torch.autograd.grad(output(), wanted, dout)


@pytest.mark.parametrize("direction", [forward, forward_backward], ids=lambda f: f.__name__)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("name", "shape"), CASES, ids=str)
def test_patch(name, shape, dtype, direction, compare):
    torch.manual_seed(0)
    module = MODULES[name](shape.dim).to(DTYPES[dtype])
    patched = petl_ext.patch(copy.deepcopy(module)).model
    arguments = arguments_of(name, shape, DTYPES[dtype], trained=direction is forward_backward)
    title = f"patch {name} {direction.__name__} {dtype} {shape}"
    modules = {"unpatched": module, "patched": patched}
    contenders = {name: direction(m, arguments, dtype.endswith("autocast")) for name, m in modules.items()}
    compare(title, shape, contenders, "patched", thread_clock)
