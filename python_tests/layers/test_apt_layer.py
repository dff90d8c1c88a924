"""APTLayer: initialization, formula, the cached keys, dropout, training."""

import copy
import pickle

import pytest
import torch

from petl_ext import APTLayer, ops
from petl_ext.nn.apt import apt_keys


def test_initialization():
    torch.manual_seed(0)
    layer = APTLayer(768, num_prompts=200)
    assert sum(p.numel() for p in layer.parameters()) == 159_745
    for weight in (layer.prompts, layer.down, layer.up):
        assert abs(weight.std().item() - 0.02) < 0.001
    assert layer.log_scale.item() == 0


@pytest.mark.parametrize("activation", ["relu", "softmax"])
def test_formula(activation):
    layer = APTLayer(64, num_prompts=10, rank=3, activation=activation).double()
    with torch.no_grad():
        layer.log_scale.fill_(0.3)
    x, y = torch.randn(2, 5, 64).double(), torch.randn(2, 5, 64).double()
    keys = layer.prompts + (layer.prompts @ layer.down.T) @ layer.up.T
    scores = (x @ keys.T).relu() if activation == "relu" else (x @ keys.T).softmax(-1)
    expected = layer.log_scale.exp() * (y + scores.max(-1, keepdim=True).values * (scores @ layer.prompts))
    torch.testing.assert_close(layer(x, y), expected)


def test_all_parameters_train():
    layer = APTLayer(64, num_prompts=10)
    layer(torch.randn(5, 64), torch.randn(5, 64)).square().sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in layer.parameters())


def frozen_layer():
    layer = APTLayer(8, num_prompts=4, rank=2).eval()
    layer.freeze()
    return layer


def test_frozen_keys_are_made_once(monkeypatch):
    layer, made = APTLayer(8, num_prompts=4, rank=2).eval(), []
    monkeypatch.setattr("petl_ext.nn.apt.apt_keys", lambda *tensors: made.append(1) or apt_keys(*tensors))
    x, y = torch.randn(2, 3, 8)
    with torch.no_grad():
        expected = [layer(x, y) for _ in range(3)]
        assert len(made) == 3 and not layer.is_frozen
        layer.freeze()
        assert len(made) == 4 and layer.is_frozen
        assert all(torch.equal(layer(x, y), out) for out in expected) and len(made) == 4
        layer.eval()
        assert layer.is_frozen
        layer.thaw()
        assert not layer.is_frozen and torch.equal(layer(x, y), expected[0]) and len(made) == 5


@pytest.mark.parametrize(
    "change",
    [
        lambda layer: layer.train().eval(),
        lambda layer: layer.load_state_dict(APTLayer(8, num_prompts=4, rank=2).state_dict()),
        lambda layer: layer.load_state_dict(APTLayer(8, num_prompts=4, rank=2).state_dict(), assign=True),
        lambda layer: layer.double(),
        lambda layer: layer.up.mul_(2),
        lambda layer: setattr(layer, "prompts", torch.nn.Parameter(torch.randn(4, 8))),
        lambda layer: setattr(layer.down, "data", torch.randn(2, 8)),
    ],
    ids=["train", "load", "assign", "cast", "in place", "another parameter", "other data"],
)
def test_what_thaws(change):
    layer = frozen_layer()
    with torch.no_grad():
        change(layer)
        assert not layer.is_frozen
        assert torch.equal(layer.keys(), apt_keys(layer.prompts, layer.down, layer.up))


def test_a_move_to_where_it_is_thaws_nothing():
    """Trainer and accelerate move every model."""
    layer = frozen_layer()
    assert layer.to("cpu").is_frozen


def test_copies_and_pickles_are_not_frozen():
    layer = frozen_layer()
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert not twin.is_frozen and torch.equal(twin.keys(), layer.requires_grad_(False).keys())


def test_a_frozen_layer_refuses_gradients_to_what_it_has_folded():
    layer = frozen_layer()
    x, y = torch.randn(2, 3, 8)
    with pytest.raises(RuntimeError, match=r"frozen keys pass no gradient on .* call thaw\(\) or train\(\)"):
        layer(x, y)
    layer.requires_grad_(False).log_scale.requires_grad_()
    layer(x.requires_grad_(), y).sum().backward()
    assert layer.log_scale.grad is not None and x.grad is not None


def test_freezing_in_training_mode_is_refused():
    with pytest.raises(RuntimeError, match=r"in training mode; call eval\(\) first"):
        APTLayer(8).freeze()


def test_keys_follow_what_raises_no_version():
    layer = APTLayer(8, num_prompts=4, rank=2).eval()
    optimizer = torch.optim.AdamW(layer.parameters(), 0.1, fused=True)
    x, y = torch.randn(2, 3, 8)
    with torch.no_grad():
        before = layer(x, y)
    layer(x, y).sum().backward()
    optimizer.step()
    with torch.no_grad():
        after = layer(x, y)
        assert not torch.equal(after, before) and torch.equal(after, copy.deepcopy(layer)(x, y))
        layer.prompts.data.add_(1)
        assert torch.equal(layer(x, y), copy.deepcopy(layer)(x, y)) and not torch.equal(layer(x, y), after)


def test_keys_stay_wide_in_bfloat16():
    layer = APTLayer(64, num_prompts=10).bfloat16()
    assert layer.keys().dtype is torch.float32
    layer.float()
    with torch.autocast("cpu", torch.bfloat16):
        assert layer.keys().dtype is torch.float32


def test_dropout_runs_in_training_only():
    torch.manual_seed(0)
    layer = APTLayer(64, num_prompts=10, dropout=0.5)
    x, y = torch.randn(50, 64), torch.randn(50, 64)
    assert not torch.equal(layer(x, y), layer(x, y))
    layer.eval()
    assert torch.equal(layer(x, y), layer(x, y))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("dim", 0), ("num_prompts", -1), ("num_prompts", True), ("rank", 2.5)),
        *(("activation", "gelu"), ("dropout", 1), ("dropout", "0.1")),
    ],
)
def test_wrong_arguments(name, value):
    with pytest.raises(ValueError, match=f"{name} must .*got {value!r}"):
        APTLayer(**{"dim": 64, name: value})


def test_training_follows_the_reference(device, monkeypatch):
    """The same losses over 30 steps, with the fused op and with the reference."""

    def losses():
        torch.manual_seed(0)
        layer = APTLayer(32, num_prompts=16).to(device.torch_device)
        x, y, target = torch.randn(3, 40 if device.is_interpreted else 200, 32).to(device.torch_device).unbind()
        optimizer, history = torch.optim.AdamW(layer.parameters(), lr=1e-2), []
        for _ in range(30):
            loss = (layer(x, y) - target).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            history.append(loss.item())
        return torch.tensor(history)

    fused = losses()
    monkeypatch.setattr("petl_ext.nn.apt.apt", ops.apt_reference)
    reference = losses()
    assert fused[-1] < fused[0]
    torch.testing.assert_close(fused, reference, rtol=1e-4, atol=0)
