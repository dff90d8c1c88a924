"""The ops as tests and benchmarks of the CUDA kernels see them: one entry each, and random problems for them."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from petl_ext import ops


def _apt_weights(normal, dim, inner):
    prompts = normal(inner, dim) * 0.05
    return [prompts, prompts + normal(inner, dim) * 0.01, normal(1) * 0.1]


def _call_apt(function, activation, x, y, prompts, keys, log_scale):
    return function(x, y, prompts, keys, log_scale, activation)


def _adapter_weights(normal, dim, inner):
    down, up = normal(inner, dim) * dim**-0.5, normal(dim, inner) * inner**-0.5
    return [down, normal(inner) * 0.1, up, normal(dim) * 0.1, 1 + normal(dim) * 0.1, normal(dim) * 0.1]


def _call_adapter(function, activation, x, down, down_bias, up, up_bias, norm_weight, norm_bias):
    norm = {"norm_weight": norm_weight, "norm_bias": norm_bias}
    return function(x, down, down_bias, up, up_bias, activation=activation, **norm, residual=x)


@dataclass(frozen=True)
class Op:
    """An op of petl_ext.ops.

    Attributes:
        inner: what its inner size is called.
        rows, weights: the names of its inputs, in the order in which `call` takes them.
        activations: those that it knows, the usual one first.
        draw_weights: from a source of normal numbers, the width and the inner size.
        call: from a function with the op's signature, the activation and the inputs.
    """

    name: str
    inner: str
    rows: tuple[str, ...]
    weights: tuple[str, ...]
    activations: tuple[str, ...]
    draw_weights: Callable
    call: Callable

    @property
    def ours(self):
        return getattr(ops, self.name)

    @property
    def reference(self):
        return getattr(ops, f"{self.name}_reference")

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
    draw_weights=_apt_weights,
    call=_call_apt,
)
ADAPTER = Op(
    "adapter",
    inner="B",
    rows=("x",),
    weights=("down", "down_bias", "up", "up_bias", "norm_weight", "norm_bias"),
    activations=("relu", "gelu", "silu"),
    draw_weights=_adapter_weights,
    call=_call_adapter,
)
OPS = {op.name: op for op in (APT, ADAPTER) if hasattr(ops, op.name)}


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

    weights = [weight.to(weight_dtype or dtype) for weight in op.draw_weights(normal, dim, inner)]
    inputs = [normal(rows, dim).to(dtype) for _ in op.rows] + weights
    return Problem(
        op, activation or op.activations[0], [tensor.requires_grad_() for tensor in inputs], normal(rows, dim).to(dtype)
    )


def forward(problem, function):
    """[out], as at inference."""
    with torch.no_grad():
        return [problem.op.call(function, problem.activation, *problem.inputs)]


def forward_backward(problem, function):
    """[out, the gradient of each input]."""
    out = problem.op.call(function, problem.activation, *problem.inputs)
    return [out.detach(), *torch.autograd.grad(out, problem.inputs, problem.dout)]
