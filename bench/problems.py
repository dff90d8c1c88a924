"""The ops as tests and benchmarks of the CUDA kernels see them: one entry each, and random problems for them."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from petl_ext import ops

TOKENS = 197  # of an image, as ViT-B/16 makes them at 224 pixels


def _draw_apt(normal, rows, dim, inner):
    prompts = normal(inner, dim) * 0.05
    weights = [prompts, prompts + normal(inner, dim) * 0.01, normal(1) * 0.1]
    return [normal(rows, dim), normal(rows, dim)], weights, normal(rows, dim)


def _call_apt(function, activation, x, y, prompts, keys, log_scale):
    return function(x, y, prompts, keys, log_scale, activation)


def _draw_adapter(normal, rows, dim, inner):
    down, up = normal(inner, dim) * dim**-0.5, normal(dim, inner) * inner**-0.5
    weights = [down, normal(inner) * 0.1, up, normal(dim) * 0.1, 1 + normal(dim) * 0.1, normal(dim) * 0.1]
    return [normal(rows, dim)], weights, normal(rows, dim)


def _call_adapter(function, activation, x, down, down_bias, up, up_bias, norm_weight, norm_bias):
    norm = {"norm_weight": norm_weight, "norm_bias": norm_bias}
    return function(x, down, down_bias, up, up_bias, activation=activation, **norm, residual=x)


def _draw_attention_pool(normal, rows, dim, inner):
    """As many samples as have TOKENS tokens each or, of the remainder, a few more."""
    samples = max(1, rows // TOKENS)
    return [normal(samples, rows // samples, dim)], [normal(samples, inner, dim)], normal(samples, inner, dim)


def _call_attention_pool(function, activation, visual, query):
    return function(visual, query, scale=visual.size(-1) ** -0.5)


@dataclass(frozen=True)
class Op:
    """An op of petl_ext.ops.

    Attributes:
        inner: what its inner size is called.
        rows, weights: the names of its inputs, in the order in which `call` takes them.
        activations: those that it knows, the usual one first.
        sizes: inner sizes at which it is measured.
        every_size: inner sizes, one for each shape of the kernels.
        draw: from a source of normal numbers, the rows, the width and the inner size: (rows, weights, dout).
        call: from a function with the op's signature, the activation and the inputs.
        sample: of how many rows one sample consists.
        launches: kernels of a forward call.
    """

    name: str
    inner: str
    rows: tuple[str, ...]
    weights: tuple[str, ...]
    activations: tuple[str, ...]
    sizes: tuple[int, ...]
    every_size: tuple[int, ...]
    draw: Callable
    call: Callable
    sample: int = 1
    launches: int = 1

    @property
    def ours(self):
        return getattr(ops, self.name)

    @property
    def reference(self):
        return getattr(ops, f"{self.name}_reference")

    def whole(self, rows):
        """So many rows, and those that the last sample lacks."""
        return -(-rows // self.sample) * self.sample

    @property
    def results(self):
        """What forward_backward returns."""
        return ("out", *(f"d{name}" for name in (*self.rows, *self.weights)))

    def __str__(self):
        return self.name


APT = Op(
    "apt",
    inner="P",
    rows=("x", "y"),
    weights=("prompts", "keys", "log_scale"),
    activations=("relu", "softmax"),
    sizes=(50, 200),
    every_size=(50, 100, 200, 300),
    draw=_draw_apt,
    call=_call_apt,
)
ADAPTER = Op(
    "adapter",
    inner="B",
    rows=("x",),
    weights=("down", "down_bias", "up", "up_bias", "norm_weight", "norm_bias"),
    activations=("relu", "gelu", "silu"),
    sizes=(96, 192),
    every_size=(50, 100, 200, 300),
    draw=_draw_adapter,
    call=_call_adapter,
)
ATTENTION_POOL = Op(
    "attention_pool",
    inner="H",
    rows=("visual",),
    weights=("query",),
    activations=("softmax",),
    sizes=(12,),
    every_size=(12, 40),
    draw=_draw_attention_pool,
    call=_call_attention_pool,
    sample=TOKENS,
    launches=2,
)
OPS = {op.name: op for op in (APT, ADAPTER, ATTENTION_POOL)}


@dataclass(frozen=True)
class Problem:
    """An op, its inputs, all of which want a gradient, and a gradient of its output."""

    op: Op
    activation: str
    inputs: list
    dout: torch.Tensor

    def to(self, *place):
        """A copy on another device or in another dtype."""
        inputs = [tensor.detach().to(*place, copy=True).requires_grad_() for tensor in self.inputs]
        return Problem(self.op, self.activation, inputs, self.dout.to(*place, copy=True))


def draw(op, rows, dim, inner, dtype, weight_dtype=None, activation=None, device="cpu", seed=0):
    """A problem of `rows` rows; `weight_dtype` and `activation` are `dtype` and the op's usual one if not given."""
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, device=device)

    tensors, weights, dout = op.draw(normal, rows, dim, inner)
    inputs = [tensor.to(dtype) for tensor in tensors] + [weight.to(weight_dtype or dtype) for weight in weights]
    inputs = [tensor.requires_grad_() for tensor in inputs]
    return Problem(op, activation or op.activations[0], inputs, dout.to(dtype))


def forward(problem, function):
    """[out], as at inference."""
    with torch.no_grad():
        return [problem.op.call(function, problem.activation, *problem.inputs)]


def forward_backward(problem, function):
    """[out, the gradient of each input]."""
    out = problem.op.call(function, problem.activation, *problem.inputs)
    return [out.detach(), *torch.autograd.grad(out, problem.inputs, problem.dout)]
