"""Modules that are compiled, hooked or held twice, patched."""

import pytest
import torch
from live_tensors import count_tensors
from ops_called import OpsCalled
from original_modules import Adapter
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.utils.checkpoint import checkpoint

import petl_ext
from petl_ext.patching.patch import kind_of

pytestmark = pytest.mark.usefixtures("no_floors")
DIM = 32


def stream():
    return torch.randn(2, 5, DIM, generator=torch.Generator().manual_seed(0))


def around(model):
    return torch.compile(model, backend="aot_eager")


def around_the_adapter(model):
    model[0] = torch.compile(model[0], backend="aot_eager")
    return model


def compiled_itself(model):
    model[0].compile(backend="aot_eager")
    return model


@pytest.mark.parametrize("compiled", [around, around_the_adapter, compiled_itself])
def test_what_is_compiled_already_is_patched_and_unpatched(compiled):
    torch._dynamo.reset()
    model = compiled(nn.Sequential(Adapter(DIM)))
    before = model(stream())
    assert petl_ext.patch(model).report().fused == 1
    assert torch.allclose(model(stream()), before, atol=1e-5)
    with OpsCalled() as called:
        model(stream())
    assert called.names == ["adapter"]
    petl_ext.unpatch(model)
    assert torch.allclose(model(stream()), before, atol=1e-6)
    with OpsCalled() as called:
        model(stream())
    assert called.names == []


def test_a_compiled_part_is_not_passed_over():
    module = Adapter(DIM)
    module.down_sampler = torch.compile(module.down_sampler, backend="eager")
    report = petl_ext.patch(nn.Sequential(module, Adapter(DIM))).report()
    assert report.left_alone == {"a part has a forward of its own": 1}


def test_hooks_of_the_patched_module_run():
    model, met = nn.Sequential(Adapter(DIM)), []
    model[0].register_forward_pre_hook(lambda module, arguments: met.append("before"))
    model[0].register_forward_hook(lambda module, arguments, out: 2 * out)
    model[0].register_full_backward_hook(lambda module, inner, outer: met.append("backward"))
    before = model(stream().requires_grad_())
    assert petl_ext.patch(model).report().fused == 1 and met == ["before"]
    after = model(stream().requires_grad_())
    after.sum().backward()
    assert met == ["before", "before", "backward"] and torch.allclose(after, before, atol=1e-5)


def test_a_module_held_twice_is_patched_once():
    shared = Adapter(DIM)
    model = nn.ModuleDict({"first": shared, "second": nn.Sequential(shared, Adapter(DIM))})
    patch = petl_ext.patch(model)
    assert [row.name for row in patch.report().rows] == ["first", "second.1"]
    assert model["second"][0] is shared and kind_of(shared)
    patch.unpatch()
    assert type(shared) is Adapter


def test_a_module_of_two_models_is_patched_in_both():
    shared = Adapter(DIM)
    one, other = nn.Sequential(shared), nn.Sequential(shared, Adapter(DIM))
    petl_ext.patch(one)
    assert petl_ext.patch(other).report().fused == 2
    petl_ext.unpatch(one)
    assert petl_ext.patch(other).report().fused == 2


def test_layers_that_share_parts_compute_what_they_did():
    layers = [Adapter(DIM, 8) for _ in range(3)]
    layers[1].down_sampler, layers[2].up_sampler.weight = layers[0].down_sampler, layers[0].up_sampler.weight
    for layer in layers:
        layer.activation = layers[0].activation
    model = nn.Sequential(*layers)
    before = model(stream())
    assert petl_ext.patch(model).report().fused == 3
    after = model(stream())
    after.sum().backward()
    assert torch.allclose(after, before, atol=1e-5) and layers[0].down_sampler is layers[1].down_sampler


@pytest.fixture
def adapter_class():
    """A class of its own for each test, which is patched."""

    class Copy(Adapter):
        def forward(self, x):
            return x + self.up_sampler(self.activation(self.down_sampler(x)))

    petl_ext.patch_class(Copy)
    yield Copy
    petl_ext.unpatch_class(Copy)


def in_fake_tensors(module):
    with FakeTensorMode(allow_non_fake_inputs=True):
        module(torch.empty(2, 5, DIM))


WHERE_PROBES_DO_NOT_WORK = {
    "vmap": lambda module: torch.vmap(module)(stream()),
    "grad": lambda module: torch.func.grad(lambda x: module(x).sum())(stream()),
    "trace": lambda module: torch.jit.trace(module, stream(), check_trace=False),
    "fake tensors": in_fake_tensors,
}


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace:DeprecationWarning")
@pytest.mark.parametrize("run", WHERE_PROBES_DO_NOT_WORK.values(), ids=WHERE_PROBES_DO_NOT_WORK)
def test_instances_of_a_patched_class_wait_for_a_plain_call(run, adapter_class):
    module = adapter_class(DIM)
    run(module)
    assert not kind_of(module)
    module(stream())
    assert kind_of(module)


def test_looking_at_a_module_leaves_no_tensor_behind():
    petl_ext.patch(nn.Sequential(Adapter(DIM))).unpatch()
    before = count_tensors()
    petl_ext.patch(nn.Sequential(Adapter(DIM))).unpatch()
    assert count_tensors() == before


def test_instances_of_a_patched_class_are_probed_within_a_checkpoint(adapter_class):
    """Whose hooks are not for the probe's tensors."""
    module, packed = adapter_class(DIM), []
    inputs = [stream().requires_grad_() for _ in range(2)]
    checkpoint(module, inputs[0], use_reentrant=False).sum().backward()
    assert kind_of(module)
    module(inputs[1]).sum().backward()
    assert torch.allclose(inputs[0].grad, inputs[1].grad, atol=1e-5)
    with torch.autograd.graph.saved_tensors_hooks(packed.append, pytest.fail):
        petl_ext.patch(nn.Sequential(Adapter(DIM)))
    assert not packed
