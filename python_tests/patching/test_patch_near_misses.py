"""Modules that hold the two projections of a bottleneck and compute something else: none of them is taken for one."""

import pytest
import torch
import torch.nn.functional as F
from original_modules import Adapter
from torch import nn

import petl_ext
from petl_ext.patching.recognize import kind_of, recognize

DIM, INNER = 32, 8
ELSE = "its forward computes something else than [x +] s * [LN](up(act(down([LN] x))))"
BRANCHES = "its forward computes something else for "


class Near(nn.Module):
    """A bottleneck with something about it that a test gives."""

    def __init__(self, forward, down=None, up=None, **parts):
        super().__init__()
        self.down, self.up = down or nn.Linear(DIM, INNER), up or nn.Linear(INNER, DIM)
        self.computed, self.seen = forward, 0
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x):
        return self.computed(self, x)


class Wide(nn.Module):
    """T5's, ViT's."""

    def __init__(self):
        super().__init__()
        self.wi, self.wo = nn.Linear(DIM, 4 * DIM, bias=False), nn.Linear(4 * DIM, DIM, bias=False)

    def forward(self, x):
        return self.wo(F.relu(self.wi(x)))


class Tied(nn.Module):
    """One projection there and back."""

    def __init__(self):
        super().__init__()
        self.down = nn.Linear(DIM, INNER)

    def forward(self, x):
        return x + F.linear(F.relu(self.down(x)), self.down.weight.t())


def added(m, x):
    return m.up(F.relu(m.down(x)))


def seeing(m, x):
    m.seen += 1
    return x + added(m, x)


def keeping(m, x):
    hidden = F.relu(m.down(x))
    m.hidden = hidden
    return x + m.up(hidden)


def returning(m, x):
    hidden = F.relu(m.down(x))
    return x + m.up(hidden), hidden


def in_part(m, x):
    hidden = m.down(x)
    with torch.autocast("cpu", torch.bfloat16):
        return x + m.up(F.relu(hidden))


def asking(m, x):
    return x + (added(m, x.bfloat16().double()) if torch.is_autocast_enabled("cpu") else added(m, x))


def of_parameter(shape=(1,)):
    return nn.Parameter(torch.ones(shape))


def as_rows(m, x):
    return m.up(F.relu(m.down(x.mT))).mT


def squeezing(m, x):
    pooled = x.mean(1, keepdim=True)
    return x * torch.sigmoid(added(m, pooled))


# name: (what it computes, its parts, why it is left alone)
NEAR_MISSES = {
    "a norm too many": (
        lambda m, x: x + m.second(added(m, m.first(x))),
        {"first": nn.LayerNorm(DIM), "second": nn.LayerNorm(DIM)},
        "it has 2 LayerNorms, first and second",
    ),
    "a norm of the sum": (lambda m, x: m.norm(x + added(m, x)), {"norm": nn.LayerNorm(DIM)}, ELSE),
    "a norm of the residual too": (
        lambda m, x: m.norm(x) + added(m, m.norm(x)),
        {"norm": nn.LayerNorm(DIM)},
        ELSE,
    ),
    "a norm of its hidden units": (
        lambda m, x: x + m.up(m.norm(F.relu(m.down(x)))),
        {"norm": nn.LayerNorm(INNER)},
        "its norm is LayerNorm((8,), eps=1e-05, elementwise_affine=True, bias=True), not nn.LayerNorm(32)",
    ),
    "a norm without a part": (lambda m, x: x + added(m, F.layer_norm(x, (DIM,))), {}, ELSE),
    "another norm": (lambda m, x: x + added(m, m.norm(x)), {"norm": nn.RMSNorm(DIM)}, "it also has norm"),
    "a gate": (lambda m, x: x + m.gate.sigmoid() * added(m, x), {"gate": of_parameter()}, ELSE),
    "a gate of the residual": (lambda m, x: m.gate * x + added(m, x), {"gate": of_parameter()}, ELSE),
    "a gate of both": (lambda m, x: m.gate * (x + added(m, x)), {"gate": of_parameter()}, ELSE),
    "a gate per channel": (
        lambda m, x: x + m.gate * added(m, x),
        {"gate": of_parameter(DIM)},
        "it also has gate",
    ),
    "a gate of the input": (
        lambda m, x: x + torch.sigmoid(m.gate(x)) * added(m, x),
        {"gate": nn.Linear(DIM, 1)},
        None,
    ),
    "two scales": (
        lambda m, x: x + m.a * m.b * added(m, x),
        {"a": of_parameter(), "b": of_parameter()},
        "it has 2 scales, a and b",
    ),
    "a scale's exponential": (lambda m, x: x + m.s.exp() * added(m, x), {"s": of_parameter()}, ELSE),
    "a scale's size": (
        lambda m, x: x + m.s.abs() * added(m, x),
        {"s": of_parameter()},
        "its forward computes something",
    ),
    "a scale that is clamped": (
        lambda m, x: x + m.s.clamp(-0.5, 0.5) * added(m, x),
        {"s": of_parameter()},
        "its forward computes something else",
    ),
    "a scale of more axes": (
        lambda m, x: x + m.s * added(m, x),
        {"s": of_parameter((1, 1))},
        "its scale has the shape [1, 1], not [] or [1]",
    ),
    "another constant": (lambda m, x: x + 2 * added(m, x), {}, ELSE),
    "half of the residual": (lambda m, x: 0.5 * x + added(m, x), {}, ELSE),
    "tied halves": (lambda m, x: x + F.linear(F.relu(m.down(x)), m.down.weight.t(), m.up.bias), {}, ELSE),
    "a branch on the length": (lambda m, x: x if x.size(1) > 600 else x + added(m, x), {}, BRANCHES + "[1, 640, 32]"),
    "a branch on the batch": (lambda m, x: x if x.size(0) > 600 else x + added(m, x), {}, BRANCHES + "[640, 1, 32]"),
    "a branch on training": (lambda m, x: x + added(m, x) * (1 + m.training), {}, "something else in training than"),
    "a side effect": (seeing, {}, "its forward sets seen"),
    "hidden units that are kept": (keeping, {}, "its forward sets hidden"),
    "hidden units that are returned": (returning, {}, "its forward returns its hidden units too"),
    "a pair of outputs": (lambda m, x: (x, x + added(m, x)), {}, "its forward returns 2 values"),
    "no tensor": (lambda m, x: {"out": x + added(m, x)}, {}, "its forward returns dict, no tensor"),
    "other widths": (
        lambda m, x: added(m, x),
        {"up": nn.Linear(INNER, 2 * DIM)},
        "its projections are 32 to 8 and 8 to 64",
    ),
    "a gated half": (
        lambda m, x: x + m.up(F.glu(m.down(x))),
        {"up": nn.Linear(INNER // 2, DIM)},
        "its projections are 32 to 8 and 4 to 32",
    ),
    "an activation behind": (lambda m, x: x + F.relu(added(m, x)), {}, ELSE),
    "an activation before": (lambda m, x: x + added(m, F.relu(x)), {}, ELSE),
    "another activation": (
        lambda m, x: x + m.up(F.leaky_relu(m.down(x))),
        {},
        "its activation computes leaky ReLU of slope 0.01, not relu or gelu or silu",
    ),
    "an activation that trains": (
        lambda m, x: x + m.up(m.act(m.down(x))),
        {"act": nn.PReLU()},
        "what it computes between its projections is not relu or gelu or silu",
    ),
    "hidden units that are clamped late, behind a norm": (
        lambda m, x: x + m.up(F.relu(m.down(m.norm(x))).clamp(max=100)),
        {"norm": nn.LayerNorm(DIM, elementwise_affine=False)},
        "what it computes between its projections is not relu or gelu or silu",
    ),
    "softmax": (
        lambda m, x: x + m.up(m.down(x).softmax(-1)),
        {},
        "what it computes between its projections is not relu or gelu or silu",
    ),
    "no activation": (lambda m, x: x + m.up(m.down(x)), {}, "its activation computes the identity"),
    "a mean over tokens": (lambda m, x: x + added(m, x).mean(1, keepdim=True), {}, ELSE),
    "tokens in the place of channels": (as_rows, {}, "its forward raises RuntimeError"),
    "squeeze and excitation": (squeezing, {}, ELSE),
    "a clamp": (lambda m, x: (x + added(m, x)).clamp(-100, 100), {}, ELSE),
    "no gradient for its input": (lambda m, x: x + added(m, x.detach()), {}, "its forward passes other gradients back"),
    "dropout in evaluation": (
        lambda m, x: x + m.up(F.dropout(F.relu(m.down(x)), 0.1)),
        {},
        "its forward drops out in evaluation too",
    ),
    "noise": (lambda m, x: x + added(m, x + 0 * torch.randn(1)), {}, "its forward draws random numbers"),
    "half precision within": (lambda m, x: x + added(m, x.float().double()), {}, ELSE),
    "an output in float32": (
        lambda m, x: (x + added(m, x)).type(torch.promote_types(x.dtype, torch.float32)),
        {},
        "its forward returns torch.float32 of torch.bfloat16",
    ),
    "autocast in part": (in_part, {}, "a part of it computes in an autocast of its own"),
    "what goes by autocast": (asking, {}, "its forward computes something else under autocast"),
    "a change of its input": (lambda m, x: x.add_(added(m, x)), {}, "its forward changes its input"),
    "a convolution over tokens": (
        lambda m, x: x + m.up(F.relu(m.down(x.mT))).mT,
        {"down": nn.Conv1d(DIM, INNER, 3, padding=1), "up": nn.Conv1d(INNER, DIM, 1)},
        "a projection is Conv1d(32, 8, kernel_size=(3,), stride=(1,), padding=(1,)), neither nn.Linear nor",
    ),
    "steps": (
        lambda m, x: m.up(F.relu(m.down(x.mT))).mT,
        {"down": nn.Conv1d(DIM, INNER, 1, stride=2), "up": nn.Conv1d(INNER, DIM, 1)},
        "a projection is Conv1d(32, 8, kernel_size=(1,), stride=(2,)), neither nn.Linear nor",
    ),
    "no narrower within": (
        lambda m, x: x + added(m, x),
        {"down": nn.Linear(DIM, DIM), "up": nn.Linear(DIM, DIM)},
        None,
    ),
}
CASES = {name: (lambda f=f, p=p: Near(f, **p), why) for name, (f, p, why) in NEAR_MISSES.items()}
CASES |= {"an MLP that widens": (Wide, None), "one projection": (Tied, None)}


@pytest.mark.parametrize(("make", "reason"), CASES.values(), ids=CASES)
def test_a_near_miss_is_left_alone(make, reason):
    module = make()
    recognized = recognize(module, {})
    assert recognized is None if reason is None else reason in recognized.reason
    model = nn.ModuleList([module, Adapter(DIM)])
    assert petl_ext.patch(model).report().fused == 1
    assert [bool(kind_of(part)) for part in model] == [False, True]


def test_what_it_is_near_to_is_taken():
    assert recognize(Near(lambda m, x: x + added(m, x)), {}).reason == ""
