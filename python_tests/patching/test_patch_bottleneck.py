"""Bottlenecks of any code: parts, layouts, ways to call them, and what changes after patching."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from ops_called import OpsCalled
from plain_bottlenecks import DIM, INNER, Plain, checked, rows
from torch import nn

import petl_ext
from petl_ext.patching import probe, recognize
from petl_ext.patching.recognize import kind_of

pytestmark = pytest.mark.usefixtures("no_floors")


class Convolved(nn.Module):
    """Of channels first."""

    def __init__(self, convolution):
        super().__init__()
        self.proj = nn.Sequential(convolution(DIM, INNER, 1), nn.GELU(), convolution(INNER, DIM, 1, bias=False))

    def forward(self, x):
        return self.proj(x) + x


class Transposing(nn.Module):
    """Of channels last, by convolutions."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv1d(DIM, INNER, 1), nn.Conv1d(INNER, DIM, 1)

    def forward(self, x):
        return self.b(F.silu(self.a(x.transpose(1, 2)))).transpose(1, 2)


class Called(Plain):
    """In several ways."""

    def forward(self, hidden, add=True, other=None, factor=1.0, *, unused=None):
        out = self.widen(F.relu(self.narrow(hidden)))
        if other is not None:
            return other + out * factor
        return hidden + out * factor if add else out * factor


SHAPES = {
    "biases": (lambda: Plain(bias=False), (2, 5, DIM)),
    "a norm without parameters": (lambda: Plain(norm=nn.LayerNorm(DIM, elementwise_affine=False)), (2, 5, DIM)),
    "a norm without a bias": (lambda: Plain(norm=nn.LayerNorm(DIM, bias=False)), (2, 5, DIM)),
    "a scale of the shape []": (lambda: Plain(scale=nn.Parameter(torch.tensor(3.0))), (2, 5, DIM)),
    "a scale of the shape [1]": (lambda: Plain(scale=nn.Parameter(torch.tensor([3.0]))), (2, 5, DIM)),
    "channels first": (lambda: Convolved(nn.Conv1d), (2, DIM, 5)),
    "images": (lambda: Convolved(nn.Conv2d), (2, DIM, 3, 5)),
    "channels last": (Transposing, (2, 5, DIM)),
}


@pytest.mark.parametrize(("make", "shape"), SHAPES.values(), ids=SHAPES)
def test_parts_and_layouts(make, shape):
    model = make()
    assert petl_ext.patch(model).report().fused == 1
    checked(model, rows(*shape))
    with torch.autocast("cpu", torch.bfloat16):
        checked(model, rows(*shape))
        checked(model, rows(*shape).bfloat16())
    checked(model.bfloat16(), rows(*shape).bfloat16())
    copied = pickle.loads(pickle.dumps(model))
    assert copied.petl_settings == model.petl_settings and kind_of(copied) is kind_of(model)


class Spaced(Plain):
    """In an autocast of its own, called by name."""

    def forward(self, x, residual=True):
        with torch.autocast("cpu", torch.bfloat16):
            out = self.widen(F.relu(self.narrow(self.norm(x)))) * self.scale
        return x + out if residual else out


COMPILED = {
    "channels first": (lambda: Convolved(nn.Conv1d), lambda m: m(rows(2, DIM, 5))),
    "an autocast": (
        lambda: Spaced(scale=nn.Parameter(torch.tensor(3.0)), norm=nn.LayerNorm(DIM)),
        lambda m: m(rows(2, 5, DIM), residual=False),
    ),
    "by name": (Called, lambda m: m(hidden=rows(2, 5, DIM), add=False)),
    "a Sequential": (
        lambda: nn.Sequential(nn.LayerNorm(DIM), nn.Linear(DIM, INNER), nn.SiLU(), nn.Linear(INNER, DIM)),
        lambda m: m(rows(2, 5, DIM)),
    ),
}


@pytest.mark.parametrize(("make", "call"), COMPILED.values(), ids=COMPILED)
def test_compiled_it_computes_the_same(make, call):
    model = make()
    own = call(model)
    petl_ext.patch(model)
    expected = call(model)
    assert expected.dtype is own.dtype and torch.allclose(expected, own, rtol=2e-2, atol=2e-2)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    call(compiled).sum().backward()
    with OpsCalled() as called:
        out = call(compiled)
    assert called.names == ["adapter"] and out.dtype is own.dtype and torch.allclose(out, expected, atol=1e-2)


CALLS = {
    "named": ((), {"hidden": rows(2, 5, DIM)}, ["adapter"]),
    "a switch": ((rows(2, 5, DIM), False), {}, ["adapter"]),
    "a named switch": ((rows(2, 5, DIM),), {"add": False}, ["adapter"]),
    "another residual": ((rows(2, 5, DIM), True, rows(2, 5, DIM, seed=1)), {}, ["adapter"]),
    "one residual for all": ((rows(2, 5, DIM),), {"other": rows(1, 5, DIM, seed=1)}, []),
    "by name alone": ((rows(2, 5, DIM),), {"unused": 1}, []),
    "another number": ((rows(2, 5, DIM),), {"factor": 2.0}, []),
}


@pytest.mark.parametrize(("arguments", "named", "runs"), CALLS.values(), ids=CALLS)
def test_ways_to_call_it(arguments, named, runs):
    model = Called()
    petl_ext.patch(model)
    checked(model, *arguments, runs=runs, **named)


@pytest.mark.parametrize("arguments", [(), (1, 2, 3, 4, 5, 6)])
def test_calls_that_it_refused_are_refused(arguments):
    model = Called()
    petl_ext.patch(model)
    with pytest.raises(TypeError, match=r"forward\(\)"):
        model(*arguments)
    with pytest.raises(TypeError, match="unexpected keyword argument 'x'"):
        model(rows(2, 5, DIM), x=1)


def replaced(module, name, part):
    delattr(module, name)
    setattr(module, name, part)


# What changes after patching, and what the report says of it.
CHANGES = {
    "a scale per channel": (
        lambda: Plain(scale=nn.Parameter(torch.ones(1))),
        lambda m: replaced(m, "scale", nn.Parameter(rows(DIM))),
        "its scale has the shape [32], not [] or [1]",
    ),
    "a scale that comes": (
        lambda: Plain(),
        lambda m: replaced(m, "scale", nn.Parameter(rows(DIM))),
        "scale was changed",
    ),
    "a number": (lambda: Plain(scale=2.0), lambda m: setattr(m, "scale", 3.0), "scale was changed"),
    "a parameter": (
        lambda: Registered(),
        lambda m: setattr(m, "gate", nn.Parameter(rows(DIM))),
        "it has got gate",
    ),
    "another norm": (
        lambda: Plain(norm=nn.LayerNorm(DIM)),
        lambda m: setattr(m, "norm", nn.LayerNorm((5, DIM))),
        "normalized_shape was changed",
    ),
    "a wider projection": (
        lambda: Free(),
        lambda m: setattr(m, "widen", nn.Linear(INNER, 2 * DIM)),
        "its projections have the shapes [8, 32] and [64, 8]",
    ),
    "a convolution that strides": (
        lambda: Transposing(),
        lambda m: setattr(m, "b", nn.Conv1d(INNER, DIM, 1, padding=1)),
        "padding was changed",
    ),
}


class Registered(Plain):
    def __init__(self):
        super().__init__()
        self.register_parameter("gate", None)

    def forward(self, x):
        out = super().forward(x)
        return out if self.gate is None else out * self.gate


class Free(Plain):
    def forward(self, x):
        return self.widen(F.relu(self.narrow(x)))


@pytest.mark.parametrize(("make", "change", "reason"), CHANGES.values(), ids=CHANGES)
def test_what_has_changed_runs_its_own_forward(make, change, reason):
    model = make()
    patch = petl_ext.patch(model)
    assert patch.report().fused == 1
    change(model)
    assert patch.report().left_alone == {reason: 1}
    checked_own = copy.deepcopy(model)
    petl_ext.unpatch(checked_own)
    with OpsCalled() as called:
        out = model(rows(2, 5, DIM))
    assert called.names == [] and torch.equal(out, checked_own(rows(2, 5, DIM)))


def test_inputs_of_another_dtype_go_on_raising():
    model = Plain()
    petl_ext.patch(model)
    with pytest.raises(RuntimeError, match="dtype"):
        model(rows(2, 5, DIM).bfloat16())


def test_a_piece_of_a_patched_sequential_computes_what_it_did():
    model = nn.Sequential(nn.Linear(DIM, INNER), nn.ReLU(), nn.Linear(INNER, DIM))
    patch = petl_ext.patch(model)
    piece = model[:2]
    assert torch.equal(piece(rows(2, DIM)), F.relu(model[0](rows(2, DIM))))
    assert petl_ext.patch(piece).report().left_alone == {"it is made of pieces of a patched module": 1}
    petl_ext.unpatch(piece)
    assert type(piece) is nn.Sequential and kind_of(model)
    patch.unpatch()


def test_the_inner_of_two_that_compute_the_same_is_taken_and_the_outer_of_two_that_do_not():
    same, other = nn.Sequential(Plain(), nn.Dropout(0.5)), nn.ModuleList([Around(Free())])
    petl_ext.patch(same), petl_ext.patch(other)
    assert [bool(kind_of(part)) for part in (same, same[0], other[0], other[0].inner)] == [False, True, True, False]
    checked(other[0], rows(2, 5, DIM))


class Around(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return x + self.inner(x)


def test_a_module_around_a_patched_one_stays_as_it_is():
    inner = Free()
    petl_ext.patch(inner)
    model = Around(inner)
    assert petl_ext.patch(model).report().rows[0].name == "inner"
    assert type(model) is Around


def test_the_report_tells_what_pytorch_computes_beside():
    model = After()
    report = petl_ext.patch(model).report()
    assert report.fused == 1 and report.rows[0].kernel.endswith(", LayerNorm by PyTorch")
    checked(model, rows(2, 5, DIM))


class After(Plain):
    def __init__(self):
        super().__init__(norm=nn.LayerNorm(DIM))
        self.factor = 0.5

    def forward(self, x):
        return x + self.factor * self.norm(self.widen(F.relu(self.narrow(x))))


def test_what_wraps_a_model_is_not_run(monkeypatch):
    run = []
    monkeypatch.setattr(recognize, "probe", lambda kind, module: run.append(type(module)) or probe.probe(kind, module))
    patch = petl_ext.patch(nn.DataParallel(Free()))
    assert run == [Free] and [row.name for row in patch.report().rows] == ["module"]
