"""METER's configurations, files, initial weights and published sizes."""

import pytest
import torch
from meter_checks import assert_same_weights, every_model
from tiny_meter import DIM, make_config, make_inputs, make_model, run
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPConfig, CLIPVisionConfig, RobertaConfig

from petl_ext.models import (
    MeterConfig,
    MeterForImageAndTextRetrieval,
    MeterForImagesAndTextClassification,
    MeterForQuestionAnswering,
    MeterForVisualEntailment,
    MeterModel,
)


@every_model
@torch.no_grad()
def test_save_pretrained_and_from_pretrained_are_exact(model_class, tmp_path):
    model = make_model(model_class)
    model.save_pretrained(tmp_path)
    again = model_class.from_pretrained(tmp_path)
    assert_same_weights(again, model)
    torch.testing.assert_close(run(again, make_inputs(model)), run(model, make_inputs(model)))


@torch.no_grad()
def test_a_head_starts_from_a_saved_backbone(tmp_path):
    backbone = make_model(MeterModel, seed=7)
    backbone.save_pretrained(tmp_path)
    model = MeterForQuestionAnswering.from_pretrained(tmp_path, num_labels=9)
    for name, parameter in model.meter.named_parameters():
        assert torch.equal(parameter, backbone.get_parameter(name)), name
    first, norm, _, last = model.classifier
    assert last.weight.shape == (9, 2 * DIM)
    assert 0.15 < first.weight.std() < 0.25  # initializer_range of the tiny config
    assert not first.bias.any() and not last.bias.any() and not norm.bias.any()
    assert (norm.weight == 1).all()


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"text_config": {"max_position_embeddings": 512, "layer_norm_eps": 1e-12}},
        {"vision_config": {"image_size": 288}, "num_labels": 3129, "hidden_dropout_prob": 0.0},
        {"text_config": RobertaConfig(), "vision_config": CLIPVisionConfig()},
    ],
)
def test_a_config_survives_its_file(changes, tmp_path):
    config = MeterConfig(**changes)
    config.save_pretrained(tmp_path)
    again = MeterConfig.from_pretrained(tmp_path)
    for part in ("text_config", "vision_config"):
        assert type(getattr(again, part)) is type(getattr(config, part))
    assert again.to_dict() | {"_name_or_path": ""} == config.to_dict() | {"_name_or_path": ""}


def test_dicts_name_what_differs_from_the_published_size():
    config = MeterConfig(text_config={"num_hidden_layers": 3}, vision_config={"image_size": 288})
    vision, text = config.vision_config, config.text_config
    assert (vision.image_size, vision.patch_size, vision.num_hidden_layers) == (288, 16, 11)
    assert (text.num_hidden_layers, text.max_position_embeddings, text.layer_norm_eps) == (3, 514, 1e-5)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"num_fusion_layers": -1}, ValueError, "num_fusion_layers must be at least 1, got -1"),
        ({"num_fusion_layers": 0}, ValueError, "num_fusion_layers must be at least 1, got 0"),
        ({"modality_type_vocab_size": 1}, ValueError, "modality_type_vocab_size must be at least 2, got 1"),
        ({"vision_config": RobertaConfig()}, TypeError, "vision_config must be a CLIPVisionConfig .*got RobertaConfig"),
        ({"vision_config": CLIPConfig()}, TypeError, "vision_config must be a CLIPVisionConfig .*got CLIPConfig"),
        ({"text_config": CLIPVisionConfig()}, TypeError, "text_config must be a RobertaConfig .*got CLIPVisionConfig"),
    ],
)
def test_a_config_of_no_meter_is_refused(changes, error, message):
    with pytest.raises(error, match=f"^MeterConfig: {message}"):
        MeterConfig(**changes)


def count(module):
    return sum(parameter.numel() for parameter in module.parameters())


def test_published_parameters_and_macs():
    with torch.device("meta"):
        model = MeterForQuestionAnswering(MeterConfig(num_labels=3129)).eval()
        inputs = {"input_ids": torch.ones(1, 40, dtype=torch.long), "pixel_values": torch.zeros(1, 3, 384, 384)}
    attention = 4 * (768 * 768 + 768) + 2 * 768
    fusion = 2 * attention + (768 * 3072 + 3072) + (3072 * 768 + 768) + 2 * 768
    vision_layer = attention + (768 * 3072 + 3072) + (3072 * 768 + 768) + 2 * 768
    assert {name: count(part) for name, part in model.meter.named_children()} == {
        "text_transformer": 124_055_040,  # roberta-base, 124,645,632, without its pooler
        "vit_model": 577 * 768 + 768 + 768 * 16 * 16 * 3 + 11 * vision_layer + 4 * 768,
        "cross_modal_text_transform": 590_592,
        "cross_modal_image_transform": 590_592,
        "token_type_embeddings": 2 * 768,
        "cross_modal_text_layers": 6 * fusion,
        "cross_modal_image_layers": 6 * fusion,
        "cross_modal_text_pooler": 590_592,
        "cross_modal_image_pooler": 590_592,
    }
    assert count(model.classifier) == 7_173_177
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(**inputs)
    assert counter.get_total_flops() == 2 * published_macs(text=40, image=577)


def published_macs(text, image):
    """Products of linear layers, of the patches' projection and of attention, of one question about one image."""

    def attention(queries, keys):
        return 2 * (queries + keys) * 768**2 + 2 * queries * keys * 768

    def feed_forward(tokens):
        return 2 * tokens * 768 * 3072

    def fusion(tokens, others):
        return attention(tokens, tokens) + attention(tokens, others) + feed_forward(tokens)

    roberta = 12 * (attention(text, text) + feed_forward(text))
    vision = (image - 1) * 768 * 3 * 16 * 16 + 11 * (attention(image, image) + feed_forward(image))
    transforms = (text + image) * 768**2
    poolers_and_head = 2 * 768**2 + 1536 * 1536 + 1536 * 3129
    return roberta + vision + transforms + 6 * (fusion(text, image) + fusion(image, text)) + poolers_and_head


@pytest.mark.parametrize(
    ("model_class", "head", "changes", "parameters"),
    [
        (MeterForVisualEntailment, "classifier", {"num_labels": 3}, 1536 * 1536 + 1536 + 2 * 1536 + 1536 * 3 + 3),
        (MeterForImagesAndTextClassification, "classifier", {"modality_type_vocab_size": 3}, 4_726_274),
        (MeterForImageAndTextRetrieval, "rank_output", {}, 1_537),
    ],
)
def test_published_heads(model_class, head, changes, parameters):
    with torch.device("meta"):
        model = model_class(MeterConfig(**changes))
    assert count(model.get_submodule(head)) == parameters


def test_initial_weights():
    model = MeterModel(make_config(initializer_range=0.02))
    weights = dict(model.named_parameters())
    for name in (
        "cross_modal_text_transform",
        "cross_modal_image_pooler.dense",
        "cross_modal_text_layers.0.output.dense",
    ):
        assert 0.015 < weights[f"{name}.weight"].std() < 0.025
        assert not weights[f"{name}.bias"].any()
    assert 0.01 < weights["token_type_embeddings.weight"].std() < 0.03
    assert (weights["cross_modal_image_layers.1.crossattention.output.LayerNorm.weight"] == 1).all()
