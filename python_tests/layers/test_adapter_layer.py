"""AdapterLayer: initialization, formula, residuals, dropout, training."""

import copy
import pickle

import pytest
import torch

from petl_ext import AdapterLayer, ops


def sizes(layer):
    return {name: tuple(p.shape) for name, p in layer.named_parameters()}


def test_initialization():
    torch.manual_seed(0)
    layer = AdapterLayer(768, layer_norm=True, scale=4.0, trainable_scale=True)
    for weight in (layer.down, layer.up):
        assert abs(weight.std().item() - 0.02) < 0.001 and abs(weight.mean().item()) < 0.001
    for bias in (layer.down_bias, layer.up_bias, layer.norm_bias):
        assert torch.equal(bias, torch.zeros_like(bias))
    assert torch.equal(layer.norm_weight, torch.ones(768))
    assert layer.gain.item() == 4.0


@pytest.mark.parametrize(
    ("options", "parameters"),
    [
        ({}, 148_320),  # a sequential adapter of the APT paper
        ({"layer_norm": True}, 149_856),  # an adapter of DAS, and its bypasses in ViLT and METER
        ({"layer_norm": True, "bottleneck": 192}, 297_408),
        ({"layer_norm": True, "bottleneck": 288}, 444_960),
        ({"trainable_scale": True}, 148_321),
    ],
)
def test_published_sizes(options, parameters):
    assert sum(p.numel() for p in AdapterLayer(768, **options).parameters()) == parameters


def test_names():
    assert sizes(AdapterLayer(8, 3)) == {"down": (3, 8), "down_bias": (3,), "up": (8, 3), "up_bias": (8,)}
    more = {"norm_weight": (8,), "norm_bias": (8,), "gain": (1,)}
    assert sizes(AdapterLayer(8, 3, layer_norm=True, trainable_scale=True)) == {**sizes(AdapterLayer(8, 3)), **more}


@pytest.mark.parametrize("layer_norm", [False, True])
@pytest.mark.parametrize("activation", ["relu", "gelu", "silu"])
def test_formula(activation, layer_norm):
    layer = AdapterLayer(64, 10, activation, layer_norm, scale=0.5).double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    x = torch.randn(2, 5, 64).double()
    act = {"relu": torch.nn.ReLU(), "gelu": torch.nn.GELU(), "silu": torch.nn.SiLU()}[activation]
    hidden = x
    if layer_norm:
        hidden = (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
        hidden = hidden * layer.norm_weight + layer.norm_bias
    hidden = act(hidden @ layer.down.T + layer.down_bias)
    torch.testing.assert_close(layer(x), x + 0.5 * (hidden @ layer.up.T + layer.up_bias))


def test_residuals():
    layer = AdapterLayer(64, 10)
    x, other = torch.randn(2, 5, 64).unbind()
    alone = AdapterLayer(64, 10, residual=False)
    alone.load_state_dict(layer.state_dict())
    torch.testing.assert_close(layer(x), x + alone(x))
    torch.testing.assert_close(layer(x, other), other + alone(x))
    assert torch.equal(layer(x, other), alone(x, other))


def test_trained_scale_is_the_number_to_begin_with():
    layer, trained = AdapterLayer(64, 10, scale=4.0), AdapterLayer(64, 10, scale=4.0, trainable_scale=True)
    trained.load_state_dict({**layer.state_dict(), "gain": trained.gain})
    x = torch.randn(5, 64)
    assert torch.equal(layer(x), trained(x))


def test_all_parameters_train():
    layer = AdapterLayer(64, 10, layer_norm=True, trainable_scale=True)
    layer(torch.randn(5, 64)).square().sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in layer.parameters())


def test_dropout_runs_in_training_only():
    torch.manual_seed(0)
    layer = AdapterLayer(64, 10, dropout=0.5)
    x = torch.randn(50, 64)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_narrow_activations(dtype):
    layer = AdapterLayer(64, 10, layer_norm=True)
    x = torch.randn(5, 64)
    for weights in (torch.float32, dtype):
        out = layer.to(weights)(x.to(dtype))
        assert out.dtype == dtype
        torch.testing.assert_close(out.float(), layer.float()(x), rtol=0.02, atol=0.02)


def test_deepcopy_and_pickle():
    layer, x = AdapterLayer(64, 10, layer_norm=True), torch.randn(5, 64)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(twin(x), layer(x))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("dim", 0), ("bottleneck", -1), ("bottleneck", True), ("bottleneck", 2.5)),
        *(("activation", "tanh"), ("layer_norm", "in"), ("residual", 1), ("trainable_scale", None)),
        *(("scale", "4"), ("scale", float("nan")), ("dropout", 1), ("dropout", "0.1")),
    ],
)
def test_wrong_arguments(name, value):
    with pytest.raises(ValueError, match=f"{name} must .*got {value!r}"):
        AdapterLayer(**{"dim": 64, name: value})


def test_training_follows_the_reference(device, monkeypatch):
    """The same losses over 30 steps, with the fused op and with the reference."""

    def losses():
        torch.manual_seed(0)
        layer = AdapterLayer(32, 16, layer_norm=True, trainable_scale=True).to(device.torch_device)
        x, target = torch.randn(2, 40 if device.is_interpreted else 200, 32).to(device.torch_device).unbind()
        optimizer, history = torch.optim.AdamW(layer.parameters(), lr=1e-2), []
        for _ in range(30):
            loss = (layer(x) - target).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            history.append(loss.item())
        return torch.tensor(history)

    fused = losses()
    monkeypatch.setattr("petl_ext.nn.adapter.adapter", ops.adapter_reference)
    reference = losses()
    assert fused[-1] < fused[0]
    torch.testing.assert_close(fused, reference, rtol=1e-4, atol=0)
