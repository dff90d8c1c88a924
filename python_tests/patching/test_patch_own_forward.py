"""Calls of a patched module that no kernel computes run the module's own forward."""

import copy

import pytest
import torch
from accelerate import cpu_offload
from ops_called import OpsCalled
from original_modules import Adapter, Cross_Attention, LibraryAdapter, ParallelAdapter
from patched_modules import DIM, hidden_tokens, made, one_query, prompts, stream, streams
from torch import nn

import petl_ext
from petl_ext.ops import kernels
from petl_ext.patching import dispatch


# What keeps a call from the kernel, once a module has been patched: (module, what is done to it, call, reported)
def lora(module):
    module.up_sampler = nn.Sequential(module.up_sampler, nn.Identity())


def watched(module):
    module.down_sampler.register_forward_hook(lambda *_: None)


class Switched(Adapter):
    """With a switch and a function as plain attributes, which forward goes by."""

    def __init__(self, dim):
        super().__init__(dim)
        self.enabled, self.after = True, torch.clone

    def forward(self, x):
        return self.after(super().forward(x)) if self.enabled else x


def with_gelu(module):
    module.activation = nn.GELU()
    return module


def other_gelu(module):
    module.activation = nn.GELU(approximate="tanh")


def offloaded(module):
    cpu_offload(module, execution_device=torch.device("cpu"))


def with_own_forward(module):
    module.up_sampler.forward = lambda hidden: hidden.new_zeros(*hidden.shape[:-1], DIM)


OWN_FORWARD = {
    "offloaded weights": (lambda: Adapter(DIM), offloaded, streams(), None),
    "a part's own forward": (lambda: Adapter(DIM), with_own_forward, streams(), "a part has a forward of its own"),
    "a switch": (lambda: Switched(DIM), lambda m: setattr(m, "enabled", False), streams(), "enabled was changed"),
    "a function": (lambda: Switched(DIM), lambda m: setattr(m, "after", torch.relu), streams(), "after was changed"),
    "another GELU": (lambda: with_gelu(Adapter(DIM)), other_gelu, streams(), "approximate was changed"),
    "dropout of the output": (
        lambda: LibraryAdapter(DIM, 16, dropout=0.1),
        None,
        lambda m, _: m(stream(), stream(1))[0],
        "dropout 0.1 in training, where the kernel has none",
    ),
    "dropout of an attention": (
        lambda: Cross_Attention(DIM, 0.2, 4),
        None,
        lambda m, _: m(v := stream(), v, v[:, :1], None),
        "dropout 0.2 in training, where the kernel has none",
    ),
    "float64": (lambda: Adapter(DIM).double(), None, lambda m, _: m(stream().double()), "float64"),
    "a part replaced": (lambda: Adapter(DIM), lora, streams(), "a part was replaced"),
    "a hook": (lambda: Adapter(DIM), watched, streams(), "a part carries a hook"),
    "two queries": (
        lambda: Cross_Attention(DIM, 0.0, 4),
        None,
        lambda m, dtype: m(v := stream().to(dtype), v, v[:, :2], None),
        None,
    ),
    "other values": (
        lambda: Cross_Attention(DIM, 0.0, 4),
        None,
        lambda m, dtype: m(stream().to(dtype), stream(1).to(dtype), stream(2)[:, :1].to(dtype), None),
        None,
    ),
    "one residual for all": (
        lambda: ParallelAdapter(DIM, 8),
        None,
        lambda m, _: m(stream(), residual=stream(1)[:1]),
        None,
    ),
    "one input for all": (prompts, None, lambda m, _: m(stream()[:1], stream(1)), None),
    "one query for all": (
        lambda: Cross_Attention(DIM, 0.0, 4),
        None,
        lambda m, _: m(v := stream(), v, stream(1)[:1, :1], None),
        None,
    ),
    "masks per head": (
        lambda: Cross_Attention(DIM, 0.0, 4),
        None,
        one_query(hidden_tokens().expand(8, 4, 1, 25)),
        None,
    ),
}


@pytest.mark.parametrize(("make", "change", "call", "reason"), OWN_FORWARD.values(), ids=OWN_FORWARD)
def test_what_no_kernel_computes_runs_the_modules_own_forward(make, change, call, reason, no_floors):
    model = made(make)
    unpatched = copy.deepcopy(model)
    patch = petl_ext.patch(model)
    for changed in (model, unpatched):
        if change:
            change(changed[0])
    torch.manual_seed(1)
    expected = call(unpatched[0], torch.float32)
    torch.manual_seed(1)
    with OpsCalled() as called:
        assert torch.equal(call(model[0], torch.float32), expected)
    assert called.names == []
    if reason:
        assert patch.report().left_alone == {reason: 1}
        assert reason in str(patch.report())


def test_devices_without_a_kernel_run_the_modules_own_forward(monkeypatch):
    model = nn.Sequential(Adapter(DIM), Adapter(60, 8)).to("meta")
    patch = petl_ext.patch(model)
    assert patch.report().left_alone == {"this build holds no kernel for meta": 2}
    assert model[0](torch.empty(3, DIM, device="meta")).shape == (3, DIM)
    monkeypatch.setattr(kernels, "_HELD", {("native", "adapter", "cuda")})
    reasons = [dispatch.own_forward_for_now(part, "cuda", torch.float32) for part in model]
    assert reasons == ["", "the CUDA kernel does not take a width of 60 with 8"]
