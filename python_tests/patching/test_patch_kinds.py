"""A kind is one class: defined anywhere, it is recognized, computes, reports and is given back as the others are."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from ops_called import OpsCalled
from original_modules import Adapter
from tolerance import assert_as_good_as_torch
from torch import nn

import petl_ext
from petl_ext.ops import floors, kernels
from petl_ext.ops.adapter import adapter
from petl_ext.patching import kinds
from petl_ext.patching.dispatch import own_forward_because
from petl_ext.patching.kind import Kind, Settings, names_in, refuse_bottleneck, refuse_names
from petl_ext.patching.patch import kind_of

DIM = 32


class Squeeze(nn.Module):
    """Somebody's module; names of its class, such as `compute`, must stay its own."""

    name, op = "squeeze", "squeeze"

    def __init__(self, dim, inner):
        super().__init__()
        self.narrow, self.widen = nn.Linear(dim, inner), nn.Linear(inner, dim)

    def forward(self, x):
        return self.compute(x)

    def compute(self, x):
        return self.widen(F.silu(self.narrow(x)))

    def sizes(self):
        return self.op, self.narrow.out_features


class SqueezeKind(Kind):
    """widen(silu(narrow(x)))."""

    petl_name = "squeeze"
    petl_op = "adapter"
    petl_published = "Squeeze of this test (narrow, widen)"

    def forward(self, x):
        if own_forward_because(self, x):
            return super().forward(x)
        return self.petl_compute(self, x)

    @staticmethod
    def petl_looks_like(module):
        return {"narrow", "widen"} <= names_in(module)

    @staticmethod
    def petl_refusal(module):
        return refuse_names(module, ("narrow", "widen")) or refuse_bottleneck(module.narrow, module.widen)

    @staticmethod
    def petl_candidates(module):
        return [Settings("silu")]

    @staticmethod
    def petl_examples(module, draw, *size):
        return [(draw(*size, module.narrow.in_features),)]

    @staticmethod
    def petl_compute(module, x):
        narrow, widen = module.narrow, module.widen
        activation = module.petl_settings.activation
        return adapter(x, narrow.weight, narrow.bias, widen.weight, widen.bias, activation=activation)

    @staticmethod
    def petl_sizes(module):
        return module.narrow.in_features, module.narrow.out_features


@pytest.fixture
def squeeze(monkeypatch):
    """The kind is known, and no row is too few."""
    monkeypatch.setattr(floors, "FLOORS", {})
    kinds.KINDS.append(SqueezeKind)
    yield
    kinds.KINDS.remove(SqueezeKind)


def stream(dtype=torch.float32):
    return torch.randn(4, 6, DIM, generator=torch.Generator().manual_seed(0)).to(dtype)


def test_the_kinds_are_those_of_the_folder():
    assert {kind.petl_op for kind in kinds.KINDS} == kernels.OPS.keys()
    assert sorted(kind.__name__ for kind in kinds.KINDS) == [
        *("Bottleneck", "CrossAttention", "LibraryAdapter", "PromptDiffusion")
    ]


def test_a_kind_that_joins_is_patched(squeeze):
    model = nn.Sequential(Squeeze(DIM, 8), Adapter(DIM))
    before, oracle = model[0](stream()), copy.deepcopy(model[0]).double()(stream(torch.float64))
    patch = petl_ext.patch(model)
    assert [row.kind for row in patch.report().rows] == ["squeeze", "bottleneck adapter"]
    assert patch.report().rows[0].kernel == kernels.kernel_for("adapter", "cpu", torch.float32).name
    assert kind_of(model[0]) is SqueezeKind and isinstance(model[0], Squeeze)
    with OpsCalled() as called:
        after = model[0](stream())
    assert called.names == ["adapter"]
    assert_as_good_as_torch("out", after, before, oracle)
    assert (model[0].name, model[0].sizes()) == ("squeeze", ("squeeze", 8))
    assert torch.equal(model[0].compute(stream()), before)
    copied = pickle.loads(pickle.dumps(model))
    assert kind_of(copied[0]) is SqueezeKind and torch.equal(copied(stream()), model(stream()))
    patch.unpatch()
    assert type(model[0]) is Squeeze and torch.equal(model[0](stream()), before)


def test_a_kind_that_joins_says_why_not(squeeze):
    class Doubled(Squeeze):
        def forward(self, x):
            return 2 * super().forward(x)

    with pytest.raises(ValueError, match="computes something else than Squeeze of this test"):
        petl_ext.patch(nn.Sequential(Doubled(DIM, 8)))
    with pytest.raises(ValueError, match=r"Looked for: .*Squeeze of this test"):
        petl_ext.patch(nn.Sequential(nn.Linear(DIM, DIM)))


def test_without_its_kind_it_is_a_bottleneck_as_others():
    report = petl_ext.patch(nn.Sequential(Squeeze(DIM, 8))).report()
    assert [row.kind for row in report.rows] == ["bottleneck adapter"]


@pytest.mark.parametrize("kind", kinds.KINDS, ids=lambda kind: kind.__name__)
def test_a_kind_takes_no_name_from_other_peoples_modules(kind):
    """But forward, and what pickling asks."""
    own = {name for its_class in (kind, Kind) for name in vars(its_class) if not name.startswith("__")}
    assert {name for name in own if not name.startswith("petl_")} == {"forward"}
