"""APT and adapters on every model family, by one body."""

import copy

import pytest
import torch
from tiny_families import ALL_FAMILIES, make_inputs, make_model, run
from tiny_vilt import randomise, snapshot

import petl_ext
from petl_ext import AdapterConfig, APTConfig

LAYERS = 1
CONFIGS = [APTConfig(num_prompts=5, rank=2), AdapterConfig(bottleneck=6), AdapterConfig(kind="parallel", bottleneck=6)]
every_family = pytest.mark.parametrize("family", ALL_FAMILIES)
every_method = pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.placement)

# Where layers go in a model of one layer per stack.
_TEXT, _VISION = "text_model.encoder.layers.0", "vision_model.encoder.layers.0"
_T5 = [
    "encoder.block.0.layer.0.SelfAttention",
    "encoder.block.0.layer.1.DenseReluDense",
    "decoder.block.0.layer.0.SelfAttention",
    "decoder.block.0.layer.1.EncDecAttention",
    "decoder.block.0.layer.2.DenseReluDense",
]
_UP = ("up_blocks.1.attentions.0", "up_blocks.1.attentions.1")
_UNET = [
    f"{block}.transformer_blocks.0.{part}"
    for block in ("down_blocks.0.attentions.0", *_UP, "mid_block.attentions.0")
    for part in ("attn1", "attn2", "ff")
]
SITES = {
    "clip": [f"{layer}.{part}" for layer in (_TEXT, _VISION) for part in ("self_attn", "mlp")],
    "clip_text_model": ["encoder.layers.0.self_attn", "encoder.layers.0.mlp"],
    "clip_vision_model": ["encoder.layers.0.self_attn", "encoder.layers.0.mlp"],
    "t5": _T5,
    "llama": ["model.layers.0.self_attn", "model.layers.0.mlp"],
    "unet": _UNET,
}
MLPS = ("mlp", "DenseReluDense", "ff")


def sites_of(family, config):
    behind_all = config.placement == "sequential_adapter"
    return tuple(name for name in SITES[family] if behind_all or not name.endswith(MLPS))


def frozen(family):
    return make_model(family, LAYERS).requires_grad_(False)


@every_method
@pytest.mark.parametrize("family", SITES)
def test_where_layers_go(family, config):
    attachment = petl_ext.attach(make_model(family, LAYERS), config)
    assert attachment.sites == sites_of(family, config)


@every_method
@every_family
def test_the_life_of_an_attachment(family, config, tmp_path):
    model = frozen(family)
    inputs, before, output = make_inputs(model), snapshot(model), run(model, make_inputs(model))
    attachment = petl_ext.attach(model, config)
    randomise(attachment)
    changed = run(model, inputs)
    assert not torch.allclose(changed, output, rtol=0.01, atol=0.01 * output.abs().max().item())
    changed.square().mean().backward()
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == (parameter.grad is not None) == (name not in before[0]), name
    model.zero_grad()
    with attachment.disable():
        assert torch.equal(run(model, inputs), output)
    attachment.save(tmp_path / "saved")
    torch.save(model, tmp_path / "model.pt")
    others = [copy.deepcopy(model), torch.load(tmp_path / "model.pt", weights_only=False), frozen(family)]
    petl_ext.load(others[-1], tmp_path / "saved")
    attachment.detach()
    assert torch.equal(run(model, inputs), output)
    assert snapshot(model) == before
    for other in others:
        assert torch.equal(run(other, inputs), changed)
        other.petl_attachment.detach()
        assert torch.equal(run(other, inputs), output)
