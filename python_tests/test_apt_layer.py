"""APTLayer: initialisation, formula, the cached keys, dropout, training."""

import pytest
import torch

from petl_ext import APTLayer, ops
from petl_ext.nn.apt import apt_keys


def test_initialisation():
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


def test_keys_are_cached_in_eval_until_a_parameter_changes():
    layer = APTLayer(64, num_prompts=10).eval()
    with torch.no_grad():
        first = layer.keys()
        assert layer.keys() is first
        layer.up.add_(1)
        changed = layer.keys()
        assert not torch.equal(changed, first)
        layer.load_state_dict(APTLayer(64, num_prompts=10).state_dict())
        assert not torch.equal(layer.keys(), changed)
        torch.testing.assert_close(layer.keys(), apt_keys(layer.prompts, layer.down, layer.up))
    with torch.inference_mode():
        in_inference = layer.keys()
    layer.train()
    assert layer.keys() is not in_inference and layer.keys().requires_grad


def test_keys_follow_a_fused_optimizer_in_eval_mode():
    layer = APTLayer(8, num_prompts=4, rank=2).eval()
    optimizer = torch.optim.AdamW(layer.parameters(), 0.1, fused=True)  # changes weights, but not their versions
    x, y = torch.randn(2, 3, 8)
    with torch.no_grad():
        layer(x, y)
    layer(x, y).sum().backward()
    optimizer.step()
    with torch.no_grad():
        assert torch.equal(layer.keys(), apt_keys(layer.prompts, layer.down, layer.up))


def test_cached_keys_are_never_those_of_other_tensors():
    """A freed tensor's address comes back: neither it nor an id tells two tensors apart."""
    layer = APTLayer(64, num_prompts=10).eval()
    with torch.no_grad():
        for _ in range(50):
            layer.prompts = torch.nn.Parameter(torch.randn(10, 64))
            assert torch.equal(layer.keys(), apt_keys(layer.prompts, layer.down, layer.up))


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


def test_training_follows_the_reference(place, monkeypatch):
    """The same losses over 30 steps, with the fused op and with the reference."""

    def losses():
        torch.manual_seed(0)
        layer = APTLayer(32, num_prompts=16).to(place.device)
        x, y, target = torch.randn(3, 200, 32).to(place.device).unbind()
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
