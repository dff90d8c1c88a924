"""The ops as tests and benchmarks see them: one entry each, and random problems for them."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from shapes import CLIP_TEXT, LLAMA, METER_IMAGE, VILT, VILT_ONE

from petl_ext import ops
from petl_ext.ops.adapter import ACTIVATIONS as ADAPTER_ACTIVATIONS
from petl_ext.ops.apt import ACTIVATIONS as APT_ACTIVATIONS

TOKENS = 197  # of an image, as ViT-B/16 makes them at 224 pixels


class Numbers:
    """Random tensors from one seed, on one device."""

    def __init__(self, seed, device):
        self._where = {"generator": torch.Generator(device).manual_seed(seed), "device": device}

    def normal(self, *shape, std=1.0, mean=0.0):
        return torch.randn(*shape, **self._where) * std + mean

    def true(self, share, *shape):
        """True in about this share of places."""
        return torch.rand(*shape, **self._where) >= 1 - share


def _draw_apt(numbers, rows, dim, num_prompts, std=0.05):
    prompts = numbers.normal(num_prompts, dim, std=std)
    keys = prompts + numbers.normal(num_prompts, dim, std=std / 5)
    x, y = numbers.normal(rows, dim), numbers.normal(rows, dim)
    tensors = {"x": x, "y": y, "prompts": prompts, "keys": keys, "log_scale": x.new_tensor([0.1])}
    return {"tensors": tensors, "dout": numbers.normal(rows, dim)}


def _draw_adapter(numbers, rows, dim, bottleneck, norm=False, residual=None, gain=False, scale=1.0, std=0.05):
    """residual: None, "x" or "another" tensor. gain: whether the scale is a tensor."""
    tensors = {
        "x": numbers.normal(rows, dim),
        "down": numbers.normal(bottleneck, dim, std=std),
        "down_bias": numbers.normal(bottleneck, std=0.1),
        "up": numbers.normal(dim, bottleneck, std=std),
        "up_bias": numbers.normal(dim, std=0.1),
    }
    if norm:
        tensors["norm_weight"] = numbers.normal(dim, std=0.2, mean=1.0)
        tensors["norm_bias"] = numbers.normal(dim, std=0.2)
    if gain:
        tensors["scale"] = tensors["x"].new_tensor([0.7])
    if residual == "another":
        tensors["residual"] = numbers.normal(rows, dim)
    return {
        "tensors": tensors,
        "dout": numbers.normal(rows, dim),
        "options": {} if gain else {"scale": scale},
        "same": {"residual": "x"} if residual == "x" else {},
    }


def _draw_attention_pool(numbers, batch, tokens, dim, heads, masked=None, std=None, scale=0.125):
    """masked: the share of tokens that take no part; the first always does. std: of the query, such that scores have a
    deviation of about 2 if not given.
    """
    mask = None
    if masked is not None:
        mask = numbers.true(1 - masked, batch, tokens)
        mask[:, 0] = True
    tensors = {
        "visual": numbers.normal(batch, tokens, dim),
        "query": numbers.normal(batch, heads, dim, std=std or 2 / (scale * dim**0.5)),
    }
    return {
        "tensors": tensors,
        "dout": numbers.normal(batch, heads, dim),
        "options": {"mask": mask, "scale": scale},
    }


def _samples(rows, dim, heads):
    """As many samples as have TOKENS tokens each or, of the remainder, a few more."""
    samples = max(1, rows // TOKENS)
    return samples, rows // samples, dim, heads


@dataclass(frozen=True, eq=False)
class Op:
    """An op of petl_ext.ops.

    Attributes:
        inner: what its inner size is called.
        rows, weights: names of tensors: those with as many rows as there are tokens, and those of the trained layer.
        out_like: the tensor whose dtype the output has.
        activations: those that it knows, the usual one first; where there are several, `activation` is an argument.
        draw: from Numbers, the sizes of a problem, the inner one last, and a form: fields of a Problem.
        forms: the ways to call it, by name: each what `draw` takes, and an activation if not the usual one.
        form: the one that is measured on a GPU.
        sizes: inner sizes at which it is measured there.
        every_size: inner sizes, one for each shape of the CUDA kernels.
        sizes_of: from rows, a width and an inner size: the sizes of a problem.
        sample: of how many rows one sample consists.
        cpu_cases: shapes and inner sizes at which it is measured on a CPU.
        cpu_forms: names of the forms that are measured there.
    """

    name: str
    inner: str
    rows: tuple[str, ...]
    weights: tuple[str, ...]
    out_like: str
    activations: tuple[str, ...]
    draw: Callable
    forms: dict
    form: dict
    sizes: tuple[int, ...]
    every_size: tuple[int, ...]
    sizes_of: Callable = lambda *sizes: sizes
    sample: int = 1
    cpu_cases: tuple = ()
    cpu_forms: tuple[str, ...] = ()

    @property
    def ours(self):
        return getattr(ops, self.name)

    @property
    def reference(self):
        return getattr(ops, f"{self.name}_reference")

    def raw(self, direction):
        """Of the two ops behind it, "forward" or "backward", the one that the dispatcher knows."""
        return getattr(torch.ops.petl_ext, f"{self.name}_{direction}").default

    def whole(self, rows):
        """So many rows, and those that the last sample lacks."""
        return -(-rows // self.sample) * self.sample

    def __str__(self):
        return self.name


APT = Op(
    "apt",
    inner="P",
    rows=("x", "y"),
    weights=("prompts", "keys", "log_scale"),
    out_like="y",
    activations=APT_ACTIVATIONS,
    draw=_draw_apt,
    forms={"relu": {}, "softmax": {"activation": "softmax"}},
    form={},
    sizes=(50, 200),
    every_size=(50, 90, 120, 180, 200, 300, 500),
    cpu_cases=tuple((shape, size) for shape in (VILT, VILT_ONE, METER_IMAGE, CLIP_TEXT, LLAMA) for size in (50, 200)),
    cpu_forms=("relu",),
)
ADAPTER = Op(
    "adapter",
    inner="B",
    rows=("x",),
    weights=("down", "down_bias", "up", "up_bias", "norm_weight", "norm_bias", "scale"),
    out_like="x",
    activations=tuple(ADAPTER_ACTIVATIONS),
    draw=_draw_adapter,
    forms={
        "parallel": {"norm": True, "scale": 4.0},
        "sequential": {"residual": "x"},
        "bypass": {"norm": True, "residual": "x", "gain": True},
        "other residual": {"residual": "another", "scale": -0.5},
        "bare": {"gain": True},
    },
    form={"norm": True, "residual": "x"},
    sizes=(96, 192),
    every_size=(50, 90, 120, 180, 200, 300, 500),
    # Those of a kept module (ViLT, METER), and of the bypasses that replace a skipped one.
    cpu_cases=((VILT, 96), (VILT, 192), (VILT, 288), (VILT_ONE, 96), (METER_IMAGE, 96), (LLAMA, 32)),
    cpu_forms=("parallel", "sequential"),
)
# On a CPU, test_attention_pool.py measures it with the projections that it saves.
ATTENTION_POOL = Op(
    "attention_pool",
    inner="H",
    rows=("visual",),
    weights=("query",),
    out_like="visual",
    activations=("softmax",),
    draw=_draw_attention_pool,
    forms={"all tokens": {}, "masked": {"masked": 0.5}},
    form={},
    sizes=(12,),
    every_size=(12, 40),
    sizes_of=_samples,
    sample=TOKENS,
)
OPS = {op.name: op for op in (APT, ADAPTER, ATTENTION_POOL)}


@dataclass(frozen=True)
class Problem:
    """An op, its arguments by name, and a gradient of its output.

    Attributes:
        tensors: those that have gradients.
        options: the other arguments, a mask among them.
        same: arguments that are one of the others, such as a residual that is x itself.
    """

    op: Op
    tensors: dict
    dout: torch.Tensor
    options: dict = field(default_factory=dict)
    same: dict = field(default_factory=dict)

    def __getitem__(self, name):
        """An argument."""
        return self.tensors[name] if name in self.tensors else self.options[name]

    def call(self, function, tensors=None):
        """The output of a function with the op's signature, of its own tensors or of others."""
        arguments = {**self.options, **(self.tensors if tensors is None else tensors)}
        return function(**arguments, **{name: arguments[other] for name, other in self.same.items()})

    def run(self, function):
        """As forward_backward, whether its tensors want gradients or not."""
        return forward_backward(self.trained(), function)

    def change(self, **arguments):
        """With other arguments in the place of some; None takes a tensor away."""
        options = {name: arguments.pop(name, option) for name, option in self.options.items()}
        tensors = {name: tensor for name, tensor in {**self.tensors, **arguments}.items() if tensor is not None}
        return replace(self, tensors=tensors, options=options)

    def to(self, device=None, dtype=None):
        """On another device, or in another dtype but for masks."""
        tensors = {
            name: tensor.detach().to(device=device, dtype=dtype).requires_grad_(tensor.requires_grad)
            for name, tensor in self.tensors.items()
        }
        options = {
            name: option.to(device=device) if torch.is_tensor(option) else option
            for name, option in self.options.items()
        }
        return replace(self, tensors=tensors, dout=self.dout.to(device=device, dtype=dtype), options=options)

    def double(self):
        return self.to(dtype=torch.float64)

    def trained(self):
        """With tensors that want gradients and share their memory with its own."""
        return replace(self, tensors={name: t.detach().requires_grad_() for name, t in self.tensors.items()})


def draw(op, *sizes, dtype=torch.float32, weight_dtype=None, activation=None, device="cpu", seed=0, **form):
    """A problem whose tensors want no gradients.

    Args:
        sizes, form: what the op's `draw` takes.
        weight_dtype: that of the op's weights, `dtype` if not given.
        activation: the op's usual one if not given.
    """
    fields = op.draw(Numbers(seed, device), *sizes, **form)
    tensors = {
        name: tensor.to((weight_dtype or dtype) if name in op.weights else dtype)
        for name, tensor in fields["tensors"].items()
    }
    options = dict(fields.get("options", {}))
    if len(op.activations) > 1:
        options["activation"] = activation or op.activations[0]
    return Problem(op, tensors, fields["dout"].to(dtype), options, fields.get("same", {}))


def draw_rows(op, rows, dim, inner, dtype, weight_dtype=None, **more):
    """A problem of so many rows, as it is measured on a GPU. Its tensors want gradients."""
    sizes = op.sizes_of(rows, dim, inner)
    return draw(op, *sizes, dtype=dtype, weight_dtype=weight_dtype, **more, **op.form).trained()


def forward(problem, function):
    """{"out": the output}, as at inference."""
    with torch.no_grad():
        return {"out": problem.call(function)}


def forward_backward(problem, function):
    """{"out": the output, "dx": the gradient of x}, and so on for each tensor."""
    out = problem.call(function)
    gradients = torch.autograd.grad(out, list(problem.tensors.values()), problem.dout.to(out.dtype))
    return {"out": out.detach(), **dict(zip((f"d{name}" for name in problem.tensors), gradients, strict=True))}
