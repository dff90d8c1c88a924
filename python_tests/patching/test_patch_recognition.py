"""Modules that almost match are left alone, with the reason; what of a model is patched, and what stays."""

import copy

import pytest
import torch
import torch.nn.functional as F
from accelerate import dispatch_model
from ops_called import OpsCalled
from original_modules import Adapter, Cross_Attention, LibraryAdapter, ParallelAdapter
from patched_modules import DIM, changed, made, prompts, rows, stream
from torch import nn

import petl_ext


class Gated(Adapter):
    def __init__(self, dim):
        super().__init__(dim)
        self.gate = nn.Parameter(torch.ones(dim))


class Doubled(Adapter):
    def forward(self, x):
        return x + 2 * self.up_sampler(self.activation(self.down_sampler(x)))


class OtherInTraining(Adapter):
    def forward(self, x):
        return super().forward(x) * (2 if self.training else 1)


class ReluLast(ParallelAdapter):
    def forward(self, x, add_residual=True, residual=None):
        return F.relu(super().forward(x, add_residual, residual))


class Clamped(Adapter):
    def forward(self, x):
        return super().forward(x).clamp(-100, 100)


class Weighted(Adapter):
    def forward(self, x, weights):
        return super().forward(x * weights)


def hooked(module):
    module.up_sampler.register_forward_pre_hook(lambda *_: None)
    return module


ALMOST = {
    "a gate": (lambda: Gated(DIM), "it also has gate"),
    "a missing scale": (lambda: changed(prompts(), scale=None), "it lacks scale"),
    "one linear layer": (
        lambda: changed(prompts(), mm=nn.Linear(DIM, DIM)),
        "not a Sequential",
    ),
    "sizes": (lambda: changed(Adapter(DIM), up_sampler=nn.Linear(8, 32)), "64 to 8 and 8 to 32"),
    "mm's sizes": (
        lambda: changed(prompts(), mm_tokens=nn.Parameter(rows(20, 8))),
        r"\[20, 8\]",
    ),
    "an activation": (lambda: changed(Adapter(DIM), activation=nn.Tanh()), "computes tanh, not relu or gelu or silu"),
    "a norm": (
        lambda: changed(ParallelAdapter(DIM, 8), adapter_layer_norm_before=nn.RMSNorm(DIM)),
        "it also has adapter_layer",
    ),
    "a scale per channel": (lambda: LibraryAdapter(DIM, 8, scaling="channel"), r"scale has the shape \[64\]"),
    "the library's gating": (lambda: LibraryAdapter(DIM, 8, gating=True), "it has a gate"),
    "another constant": (lambda: Doubled(DIM), "computes something else"),
    "another formula in training": (lambda: OtherInTraining(DIM), "computes something else"),
    "ReLU after": (lambda: ReluLast(DIM, 8), "computes something else"),
    "a clamp": (lambda: Clamped(DIM), "computes something else"),
    "other arguments": (lambda: Weighted(DIM), r"its forward takes \(self, x, weights\)"),
    "a hook": (lambda: hooked(Adapter(DIM)), "a part carries a hook"),
    "a forward of the instance": (lambda: changed(Adapter(DIM), forward=lambda x: x), "a forward of its own"),
    "heads": (lambda: changed(Cross_Attention(DIM, 0.0, 4), num_heads=5), "num_heads is 5"),
}


@pytest.mark.parametrize(("make", "reason"), ALMOST.values(), ids=ALMOST)
def test_what_almost_matches_is_left_alone_and_says_why(make, reason):
    model = nn.ModuleDict({"almost": make()})
    own_class = type(model["almost"])
    with pytest.raises(ValueError, match=f"(?s)must be left alone:.*almost, .*{reason}"):
        petl_ext.patch(model)
    assert type(model["almost"]) is own_class
    model["adapter"] = Adapter(DIM)
    report = petl_ext.patch(model).report()
    assert type(model["almost"]) is own_class
    assert report.fused == 1 and list(report.left_alone.values()) == [1]
    assert "1 of 2 fused" in str(report)


def test_recognizing_draws_no_random_numbers_and_runs_no_hook():
    model = made(lambda: prompts(0.1))
    model[0].register_forward_hook(pytest.fail)
    state, before = torch.get_rng_state(), copy.deepcopy(model.state_dict())
    petl_ext.patch(model)
    assert torch.equal(torch.get_rng_state(), state) and model.training and model[0].attn_drop.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_model_without_known_modules_is_refused():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    with pytest.raises(ValueError, match=r"holds nothing that is known.*approximate_prompt.*Cross_Attention"):
        petl_ext.patch(model)
    with pytest.raises(ValueError, match="nothing in Sequential is patched"):
        petl_ext.unpatch(model)
    for function in (petl_ext.patch, petl_ext.unpatch):
        with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got str"):
            function("model")


def test_patching_again_patches_what_is_new():
    model = nn.ModuleList([Adapter(DIM)])
    petl_ext.patch(model)
    patched_class = type(model[0])
    model.append(Adapter(DIM))
    assert petl_ext.patch(model).report().fused == 2
    assert type(model[0]) is type(model[1]) is patched_class
    petl_ext.unpatch(model)
    assert [type(module) for module in model] == [Adapter, Adapter]


def test_a_class_given_since_stays_on_top():
    """fully_shard gives a module such a class."""
    model = nn.Sequential(Adapter(DIM))
    bare = model(stream())
    petl_ext.patch(model)
    mark = type("Mark", (), {})
    model[0].__class__ = type("Sharded", (mark, type(model[0])), {})
    assert petl_ext.patch(model).report().fused == 1
    petl_ext.unpatch(model)
    assert type(model[0]).__bases__ == (mark, Adapter) and torch.equal(model(stream()), bare)


def test_hooks_of_a_device_map_stay(no_floors):
    model, bare = nn.Sequential(Adapter(DIM)), nn.Sequential(Adapter(DIM))
    bare.load_state_dict(model.state_dict())
    dispatch_model(model, {"": "cpu"}, force_hooks=True)
    assert petl_ext.patch(model).report().fused == 1
    with OpsCalled() as called:
        torch.testing.assert_close(model(stream()), bare(stream()))
    assert called.names == ["adapter"]
    petl_ext.unpatch(model)
    assert torch.equal(model(stream()), bare(stream()))


def test_weights_go_both_ways():
    model, other = made(lambda: Adapter(DIM)), nn.Sequential(Adapter(DIM))
    petl_ext.patch(model)
    other.load_state_dict(model.state_dict())
    model.load_state_dict(other.state_dict())
    petl_ext.unpatch(model)
    assert torch.equal(model(stream()), other(stream()))
