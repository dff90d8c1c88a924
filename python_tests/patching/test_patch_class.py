"""A patched class: its instances old and new, those that do not match, subclasses."""

import pytest
import torch
from ops_called import OpsCalled
from original_modules import Adapter
from patched_modules import DIM, changed, stream
from torch import nn

import petl_ext
from petl_ext.patching.patch import kind_of


@pytest.fixture
def adapter_class():
    """A class of its own for each test, since it is changed."""

    class Copy(Adapter):
        def forward(self, x):
            return x + self.up_sampler(self.activation(self.down_sampler(x)))

    yield Copy
    if "petl_original" in vars(Copy.forward):
        petl_ext.unpatch_class(Copy)


def test_a_patched_class_takes_in_instances_old_and_new(adapter_class, no_floors):
    old = adapter_class(DIM)
    expected, original = old(stream()), adapter_class.forward
    patch = petl_ext.patch_class(adapter_class)
    new = adapter_class(DIM)
    assert patch.report().rows == []
    with OpsCalled() as called:
        assert torch.allclose(old(stream()), expected, atol=1e-5)
        new(stream())
    assert called.names == ["adapter"] * 2
    assert patch.report().fused == 2
    patch.unpatch()
    assert adapter_class.forward is original and type(old) is type(new) is adapter_class
    assert torch.equal(old(stream()), expected)
    with pytest.raises(ValueError, match="Copy is not patched"):
        petl_ext.unpatch_class(adapter_class)


def test_an_unpatched_instance_of_a_patched_class_stays_so(adapter_class, no_floors):
    module, other = adapter_class(DIM), adapter_class(DIM)
    expected = module(stream())
    patch = petl_ext.patch_class(adapter_class)
    module(stream()), other(stream())
    petl_ext.unpatch(module)
    assert torch.equal(module(stream()), expected) and type(module) is adapter_class
    assert patch.report().fused == 1


def test_an_instance_of_a_patched_class_that_does_not_match_says_so_once(adapter_class, no_floors, caplog):
    odd = [changed(adapter_class(DIM), activation=nn.Tanh()) for _ in range(2)]
    expected = [module(stream()) for module in odd]
    patch = petl_ext.patch_class(adapter_class)
    for _ in range(2):
        assert all(torch.equal(module(stream()), out) for module, out in zip(odd, expected, strict=True))
    assert len(caplog.messages) == 1 and "its activation computes tanh" in caplog.messages[0]
    assert list(patch.report().left_alone.values()) == [2]


def test_a_subclass_with_a_forward_of_its_own_keeps_it(adapter_class, no_floors):
    class Twice(adapter_class):
        def forward(self, x):
            return 2 * super().forward(x)

    class Heir(adapter_class):
        pass

    twice, heir = Twice(DIM), Heir(DIM)
    expected = twice(stream())
    petl_ext.patch_class(adapter_class)
    with OpsCalled() as called:
        assert torch.equal(twice(stream()), expected) and type(twice) is Twice
        heir(stream())
    assert called.names == ["adapter"]


def test_a_model_of_a_patched_class_compiles(adapter_class, no_floors):
    model = adapter_class(DIM)
    petl_ext.patch_class(adapter_class)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    before = compiled(stream())
    assert not kind_of(model)
    model(stream())
    assert torch.allclose(compiled(stream()), before, atol=1e-5)
    with OpsCalled() as called:
        compiled(stream())
    assert called.names == ["adapter"]


def test_a_class_that_cannot_match_is_refused(adapter_class):
    with pytest.raises(TypeError, match=r"cls must be a subclass of torch\.nn\.Module, got .*int"):
        petl_ext.patch_class(int)
    with pytest.raises(ValueError, match="forward of Bilinear is that of no known kind"):
        petl_ext.patch_class(nn.Bilinear)
    petl_ext.patch_class(adapter_class)
    with pytest.raises(ValueError, match=r"Copy, or a class that it inherits forward from, is patched already"):
        petl_ext.patch_class(adapter_class)
