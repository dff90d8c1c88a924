"""Frozen layers on CUDA: weights packed once instead of by each call."""

import pytest
import torch
from devices import CUDA_DEVICES

from petl_ext import AdapterLayer, APTLayer, ops
from petl_ext.ops.apt import packed_apt

ON_CUDA = pytest.mark.parametrize("device", CUDA_DEVICES, ids=str, indirect=True)
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
LAYERS = {
    "relu": lambda dim: APTLayer(dim, num_prompts=50, rank=2),
    "softmax": lambda dim: APTLayer(dim, num_prompts=100, rank=2, activation="softmax"),
    "sequential": lambda dim: AdapterLayer(dim, 40),
    "norm": lambda dim: AdapterLayer(dim, 100, "gelu", layer_norm=True, residual=False, trainable_scale=True),
}
every_layer = pytest.mark.parametrize("name", LAYERS)


def make(device, name, dtype, dim=64):
    """(a layer that serves, its inputs)."""
    torch.manual_seed(0)
    layer = LAYERS[name](dim).to(device.torch_device, dtype).eval().requires_grad_(False)
    for parameter in layer.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))
    inputs = torch.randn(1 + isinstance(layer, APTLayer), 30, dim, device=device.torch_device).to(dtype)
    return layer, inputs


def packed_of(layer):
    value = layer._frozen.value
    return value[1] if isinstance(layer, APTLayer) else value


@ON_CUDA
@DTYPES
@every_layer
def test_a_call_takes_what_was_packed(device, name, dtype):
    layer, inputs = make(device, name, dtype)
    expected = layer(*inputs)
    layer.freeze()
    assert layer.is_frozen and torch.equal(layer(*inputs), expected)
    packed_of(layer).data.zero_()
    assert not torch.equal(layer(*inputs), expected)
    layer.thaw()
    assert not layer.is_frozen and torch.equal(layer(*inputs), expected)


@ON_CUDA
@every_layer
def test_one_packing_serves_any_number_of_rows(device, name):
    layer, inputs = make(device, name, torch.bfloat16, dim=264)
    layer.freeze()
    for rows in (0, 1, 129, 2049):  # of which the last are more than few
        some = [tensor.repeat(69, 1)[:rows] for tensor in inputs]
        frozen = layer(*some)
        with torch.enable_grad():  # which packs anew
            expected = layer(some[0].requires_grad_(), *some[1:])
        assert torch.equal(frozen, expected.detach())


@ON_CUDA
@every_layer
def test_another_dtype_than_it_was_made_for_packs_anew(device, name):
    layer, inputs = make(device, name, torch.bfloat16)
    expected = layer(*inputs.half())
    layer.freeze()
    packed_of(layer).data.zero_()
    assert torch.equal(layer(*inputs.half()), expected)
    layer.freeze(torch.float16)
    assert torch.equal(layer(*inputs.half()), expected)
    packed_of(layer).data.zero_()
    assert not torch.equal(layer(*inputs.half()), expected)


@ON_CUDA
def test_under_autocast_it_is_made_for_autocasts_dtype(device):
    layer, (x,) = make(device, "norm", torch.float32)
    with torch.autocast(device.torch_device.type, torch.bfloat16):
        layer.freeze()
        assert packed_of(layer).dtype is torch.bfloat16
        frozen = layer(x)
        layer.thaw()
        assert torch.equal(frozen, layer(x))


@ON_CUDA
@every_layer
def test_a_changed_weight_is_seen(device, name):
    layer, inputs = make(device, name, torch.bfloat16)
    layer.freeze()
    before = layer(*inputs)
    next(layer.parameters()).mul_(3)
    assert not layer.is_frozen
    after = layer(*inputs)
    layer.thaw()
    assert torch.equal(after, layer(*inputs)) and not torch.equal(after, before)


@ON_CUDA
def test_a_width_that_no_kernel_takes_is_not_packed(device):
    layer = AdapterLayer(12, 4, device=device.torch_device).eval()
    layer.freeze()
    assert not layer.is_frozen


@ON_CUDA
def test_packed_of_other_sizes_is_refused(device):
    (layer, (x, y)), (other, _) = (make(device, name, torch.bfloat16) for name in ("relu", "softmax"))
    packed = packed_apt(other.prompts, other.keys(), "softmax", torch.bfloat16)
    with pytest.raises(RuntimeError, match=r"apt: packed must be contiguous, uint8 and have \d+ elements.*, got \d+"):
        ops.apt(x, y, layer.prompts, layer.keys(), layer.log_scale, packed=packed)


def test_on_a_cpu_an_adapter_derives_nothing():
    layer = AdapterLayer(64, 10).eval()
    layer.freeze()
    assert not layer.is_frozen
    with pytest.raises(RuntimeError, match=r"AdapterLayer: freeze is for serving.* call eval\(\) first"):
        layer.train().freeze()
