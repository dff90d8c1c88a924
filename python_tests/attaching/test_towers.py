"""Towers by name, models whose towers are of families of their own, and patterns that would take a model in part."""

from unittest import mock

import pytest
import tiny_vilt
import torch
from modern_models import TINY, lacking, make, make_inputs, run
from tiny_vilt import randomize, snapshot
from torch import nn
from transformers import (
    LlavaConfig,
    LlavaForConditionalGeneration,
    PixtralVisionConfig,
    SiglipVisionConfig,
    SiglipVisionModel,
    Trainer,
)
from vilt_training import Questions, make_arguments

import petl_ext
from petl_ext import AdapterConfig, APTConfig, DASConfig
from petl_ext.attaching import Family, register_family
from petl_ext.attaching.families import FAMILIES, family_of
from petl_ext.attaching.families.text import LLAMA
from petl_ext.attaching.families.vision import CLIP_VISION

APT = {"num_prompts": 5, "rank": 2}


def made(name):
    if lacking(name):
        pytest.skip(lacking(name))
    return make(name)


@pytest.mark.parametrize(
    ("name", "sites", "expected"),
    [
        ("llava", "vision", [f"model.vision_tower.encoder.layers.{index}.self_attn" for index in range(2)]),
        ("llava", ["language"], [f"model.language_model.layers.{index}.self_attn" for index in range(3)]),
        ("clip", "text", [f"text_model.encoder.layers.{index}.self_attn" for index in range(3)]),
        ("whisper", "encoder", [f"model.encoder.layers.{index}.self_attn" for index in range(3)]),
        ("chinese_clip", "text", [f"text_model.encoder.layer.{index}.attention.output" for index in range(3)]),
        ("blip-2", ["fusion", r"vision_model\.encoder\.layers\.0\.self_attn"], None),
    ],
)
def test_a_tower_by_its_name(name, sites, expected, tmp_path):
    model = made(name)
    attachment = petl_ext.attach(model, APTConfig(**APT, sites=sites))
    if expected is None:
        assert len(attachment.sites) == 4 and attachment.sites[-1] == "vision_model.encoder.layers.0.self_attn"
    else:
        assert list(attachment.sites) == expected
    assert attachment.sites == petl_ext.attach(make(name), AdapterConfig("parallel", 4, sites=sites)).sites
    randomize(attachment)
    attachment.save(tmp_path / "saved")
    again = make(name)
    assert petl_ext.load(again, tmp_path / "saved").config == attachment.config
    assert torch.equal(run(again, make_inputs(name)), run(model, make_inputs(name)))


def test_a_learning_rate_for_each_tower():
    model = made("llava")
    attachment = petl_ext.attach(model, APTConfig(**APT), keep=["multi_modal_projector"])
    groups = attachment.parameter_groups(vision=1e-4, language=5e-5, kept=1e-3)
    assert [(group["name"], group["lr"]) for group in groups] == [("vision", 1e-4), ("language", 5e-5), ("kept", 1e-3)]
    grouped = [parameter for group in groups for parameter in group["params"]]
    assert len(set(map(id, grouped))) == len(grouped) == len(list(attachment.parameters()))
    before = [parameter.clone() for parameter in grouped]
    optimizer = torch.optim.AdamW(groups)
    run(model, make_inputs("llava")).square().mean().backward()
    optimizer.step()
    assert not any(torch.equal(new, old) for new, old in zip(grouped, before, strict=True))
    for rates in ({"vision": 1e-4}, {"vision": 1e-4, "language": 1e-4, "kept": 1e-4, "text": 1e-4}):
        with pytest.raises(ValueError, match="must be those of vision, kept, language, which train, got vision"):
            attachment.parameter_groups(**rates)


def test_the_trainer_takes_the_groups(tmp_path):
    model = tiny_vilt.make_model()
    attachment = petl_ext.attach(model, APTConfig(**APT), keep=["classifier"])
    optimizer = torch.optim.AdamW(attachment.parameter_groups(fusion=1e-2, kept=1e-3))
    before = [parameter.clone() for parameter in attachment.parameters()]
    arguments = make_arguments(tmp_path, max_steps=2, lr_scheduler_type="constant")
    Trainer(model, arguments, train_dataset=Questions(model), optimizers=(optimizer, None)).train()
    assert [group["lr"] for group in optimizer.param_groups] == [1e-2, 1e-3]
    assert not any(torch.equal(new, old) for new, old in zip(attachment.parameters(), before, strict=True))


def test_the_report_counts_by_tower():
    model = made("llava")
    report = petl_ext.attach(model, APTConfig(**APT)).report(inputs=make_inputs("llava"))
    assert {tower: len(rows) for tower, rows in report.towers.items()} == {"vision": 2, "language": 3}
    lines = [line.split() for line in str(report).split("\n")]
    for tower, rows in report.towers.items():
        macs = sum(row.macs for row in rows)
        assert [tower, str(len(rows)), f"{sum(row.parameters for row in rows):,}", f"{macs:,}"] in lines
    assert "vision: not in model.vision_tower.encoder.layers.2, behind the layer" in str(report)


@pytest.mark.parametrize(
    ("name", "config", "message"),
    [
        (
            "llama",
            APTConfig(sites="vision"),
            r"LlamaForCausalLM has no tower 'vision'; those of its family: 'language'",
        ),
        (
            "bridgetower",
            APTConfig(sites="vision"),
            r"nothing in .* in the tower 'vision': its attentions are torch\.nn",
        ),
        ("gpt2", APTConfig(), "takes no APTConfig: its projections are Conv1D"),
        ("FluxTransformer2DModel", DASConfig(), "takes no DASConfig: its blocks take the timestep"),
    ],
)
def test_what_a_family_cannot_take_is_refused_with_the_reason(name, config, message):
    model = made(name)
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        petl_ext.attach(model, config)
    assert snapshot(model) == before


def test_each_of_several_towers_must_take_something():
    model = made("bridgetower")
    with pytest.raises(ValueError, match=r"in the tower 'vision': its attentions are torch\.nn"):
        petl_ext.attach(model, APTConfig(**APT, sites=["text", "vision"]))
    assert len(petl_ext.attach(model, APTConfig(**APT, sites=["text"])).sites) == 3


def test_a_method_that_a_known_family_lacks_is_refused_with_the_line_to_copy():
    model = made("bert")
    with pytest.raises(ValueError, match="none of the families with sites for class_token") as error:
        petl_ext.attach(model, petl_ext.ClassTokenConfig())
    line = str(error.value).partition("To name them: ")[2]
    assert petl_ext.attach(model, eval(line, vars(petl_ext).copy())).sites[0] == "bert.embeddings"


def test_a_tower_of_no_known_family_is_refused():
    text = {
        "model_type": "llama",
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "vocab_size": 64,
    }
    vision = PixtralVisionConfig(
        hidden_size=24, num_hidden_layers=1, num_attention_heads=2, image_size=16, patch_size=8
    )
    model = LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=text))
    before = snapshot(model)
    with pytest.raises(
        ValueError, match=r"vision_tower is a PixtralVisionModel of no known family.* sites=\['language'\]"
    ):
        petl_ext.attach(model, APTConfig(**APT))
    assert snapshot(model) == before
    assert petl_ext.attach(model, APTConfig(**APT, sites=["language"])).sites == (
        "model.language_model.layers.0.self_attn",
    )


def test_a_pattern_that_would_take_some_layers_only_is_refused():
    model = made("qwen3_5")
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"layer 0 of model\.layers has no self_attn, .*linear_attn") as error:
        petl_ext.attach(model, APTConfig(**APT, sites=["self_attn"]))
    assert snapshot(model) == before
    advised = str(error.value).partition('sites=[r"')[2].partition('"')[0]
    assert len(petl_ext.attach(model, APTConfig(**APT, sites=[advised])).sites) == 4
    model.petl_attachment.detach()
    chosen = petl_ext.attach(model, APTConfig(**APT, sites=[r"layers\.[13]\.self_attn"]))
    assert chosen.sites == ("model.layers.1.self_attn", "model.layers.3.self_attn")


def test_a_part_that_can_carry_no_layer_in_some_layers_is_refused():
    model = made("llama")
    model.model.layers[1].mlp = nn.Identity()
    with pytest.raises(
        ValueError, match=r"model\.layers\.1\.mlp can carry no layer of AdapterConfig, but other layers"
    ):
        petl_ext.attach(model, AdapterConfig(sites=["mlp"]))
    assert petl_ext.attach(model, AdapterConfig(sites=[r"layers\.[02]\.mlp"])).sites[0] == "model.layers.0.mlp"


def test_both_streams_of_a_joint_attention_get_layers():
    model = made("SD3Transformer2DModel")
    attachment = petl_ext.attach(model, APTConfig(**APT))
    layers = [row.layer for row in attachment.report().rows]
    # The last block's text stream has no output.
    assert [name for name in layers if name.endswith("second")] == [
        f"transformer_blocks.{index}.attn.apt_second" for index in range(2)
    ]
    assert len(layers) == 5
    attention = model.transformer_blocks[0].attn
    images, texts = torch.randn(2, 4, 32), torch.randn(2, 3, 32)
    changed = attention(images, encoder_hidden_states=texts)
    with attachment.disable():
        plain = attention(images, encoder_hidden_states=texts)
    torch.testing.assert_close(changed[0], attention.apt(images, plain[0]))
    torch.testing.assert_close(changed[1], attention.apt_second(texts, plain[1]))


def test_two_families_of_known_forms_in_a_line_each():
    language, vision = made("llama"), SiglipVisionModel(SiglipVisionConfig(**TINY["siglip_vision_model"].sizes))
    language.config.model_type, vision.config.model_type = "my_llama", "my_vision"
    with mock.patch.dict(FAMILIES):
        register_family(Family("my_llama", **LLAMA))
        register_family(Family("my_vision", **CLIP_VISION))
        for model, tower in ((language, "language"), (vision, "vision")):
            for config in (APTConfig(**APT), AdapterConfig(bottleneck=4), DASConfig(bottleneck=4, skip=[1])):
                attachment = petl_ext.attach(model, config)
                assert {row.tower for row in attachment.report().rows} == {tower}
                attachment.detach()
        with pytest.raises(ValueError, match=r"towers must be of vision, .*, got 'eye'"):
            register_family(Family("other", towers={"eye": ".*"}))
    assert family_of(language).name is None


class FusedAttention(nn.Module):
    """As timm writes it."""

    def __init__(self, dim, proj_drop=0.0):
        super().__init__()
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.attn_drop, self.proj_drop = nn.Dropout(0.1), nn.Dropout(proj_drop)

    def forward(self, x, attn_mask=None):
        query, key, value = self.qkv(x).chunk(3, -1)
        return self.proj_drop(self.proj(self.attn_drop((query @ key.mT).softmax(-1)) @ value))


def test_fused_projections_by_sites():
    model = nn.Sequential(FusedAttention(8), FusedAttention(8)).eval()
    x = torch.randn(2, 3, 8)
    before = model(x)
    attachment = petl_ext.attach(model, APTConfig(**APT, sites=[r"\d"]))
    assert attachment.sites == ("0", "1")
    randomize(attachment)
    plain = nn.Module.__call__(model[1], x)
    assert plain.shape == x.shape and not torch.equal(model(x), before)
    with pytest.raises(ValueError, match="proj must be its last step, but the dropout proj_drop may come behind"):
        petl_ext.attach(nn.Sequential(FusedAttention(8, 0.1)), APTConfig(**APT, sites=["0"]))
