"""The methods on METER: APT at its 24 places, files, and what skipping saves at published size."""

import dataclasses

import pytest
import torch
from tiny_meter import DIM, LAYERS, MODELS, make_config, make_inputs, make_model, run
from tiny_vilt import randomize, snapshot

import petl_ext
from petl_ext import AdapterConfig, APTConfig, ClassTokenConfig, DASConfig
from petl_ext.counting import count_macs
from petl_ext.models import MeterConfig, MeterForImagesAndTextClassification, MeterModel
from petl_ext.ops import apt_reference

CONFIGS = [
    APTConfig(num_prompts=5, rank=2),
    AdapterConfig(bottleneck=6),
    AdapterConfig(kind="parallel", bottleneck=6),
    DASConfig(bottleneck=6, skip=[1, 5]),
    ClassTokenConfig(),
]
every_method = pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.row)
every_model = pytest.mark.parametrize("model_class", MODELS, ids=lambda model_class: model_class.__name__)


@every_model
@every_method
def test_attach_save_load_and_detach(config, model_class, tmp_path):
    model = make_model(model_class)
    inputs, before, output = make_inputs(model), snapshot(model), run(model, make_inputs(model))
    attachment = petl_ext.attach(model, config, keep=["cross_modal_text_pooler"])
    randomize(attachment)
    attachment.save(tmp_path / "saved")
    fresh = make_model(model_class)
    petl_ext.load(fresh, tmp_path / "saved")
    assert snapshot(fresh) == snapshot(model)
    assert torch.equal(run(fresh, inputs), run(model, inputs))
    assert not torch.allclose(run(model, inputs), output, atol=0.1)
    attachment.detach()
    model.load_state_dict(make_model(model_class).state_dict())  # the pooler has changed
    assert torch.equal(run(model, inputs), output)
    assert snapshot(model) == before


@every_method
def test_only_the_fusion_layers_get_layers_and_train(config):
    model = make_model()
    attachment = petl_ext.attach(model, config, keep=["classifier"])
    run(model, make_inputs(model)).square().sum().backward()
    graded = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    trained = {name for name, _ in attachment.named_parameters()}
    assert graded <= trained
    assert {name for name in trained if not name.startswith("meter.cross_modal_")} == {
        name for name in trained if name.startswith("classifier.")
    }
    if config.row != "bypass":
        assert graded == trained


@every_method
@torch.no_grad()
def test_given_embeddings_pass_the_new_layers(config):
    model = make_model()
    if config.row != "class_token":
        config = dataclasses.replace(config, class_token=True)
    randomize(petl_ext.attach(model, config))
    inputs = make_inputs(model)
    given = {
        "inputs_embeds": model.meter.text_transformer.embeddings.word_embeddings(inputs["input_ids"]),
        "image_embeds": model.meter.vit_model(inputs["pixel_values"]).last_hidden_state,
        "attention_mask": inputs["attention_mask"],
    }
    torch.testing.assert_close(run(model, given), run(model, inputs))


def test_apt_scores_the_prompts_with_its_own_stream():
    """In cross-attention too it reads the query's side, never the other stream."""
    model = make_model()
    attachment = petl_ext.attach(model, APTConfig(num_prompts=5, rank=2))
    randomize(attachment)
    fusion = model.meter.cross_modal_text_layers, model.meter.cross_modal_image_layers
    blocks = [block for layers in fusion for layer in layers for block in (layer.attention, layer.crossattention)]
    assert attachment.sites == tuple(
        f"meter.cross_modal_{stream}_layers.{index}.{block}.output"
        for stream in ("text", "image")
        for index in range(LAYERS)
        for block in ("attention", "crossattention")
    )
    seen = {}
    for block in blocks:
        block.register_forward_pre_hook(lambda block, arguments: seen.setdefault(block, arguments[0]))
        block.output.dense.register_forward_hook(lambda dense, _, output: seen.setdefault(dense, output))
        block.output.register_forward_hook(lambda site, _, output: seen.setdefault(site, output))
    run(model, make_inputs(model))
    for block in blocks:
        apt, x, y = block.output.apt, seen[block], seen[block.output.dense]
        expected = block.output.LayerNorm(apt_reference(x, y, apt.prompts, apt.keys(), apt.log_scale) + x)
        torch.testing.assert_close(seen[block.output], expected)


def test_two_images_share_the_layers():
    model = make_model(MeterForImagesAndTextClassification)
    attachment = petl_ext.attach(model, DASConfig(bottleneck=4))
    calls = []
    attachment.skip([0])
    model.meter.cross_modal_text_layers[0].bypass.register_forward_hook(lambda *_: calls.append(1))
    run(model, make_inputs(model))
    assert len(calls) == 2


def test_a_family_inside_another_is_the_outer_one():
    model = make_model()
    assert len(petl_ext.attach(model, DASConfig(bottleneck=4)).layers) == 2 * LAYERS
    model.petl_attachment.detach()
    encoder = model.meter.text_transformer
    assert len(petl_ext.attach(encoder, DASConfig(bottleneck=4)).layers) == 2


def test_skipping_two_and_two_layers_at_published_size():
    """MACs fall by 11 to 12.5 %, the adapters in all other layers counted. The encoders are counted on the meta
    device; the fusion layers, between encoders of no size, where they can carry adapters."""
    with torch.device("meta"):
        published = MeterModel(MeterConfig()).eval()
        inputs = {
            "input_ids": torch.ones(1, 40, dtype=torch.long),
            "pixel_values": torch.zeros(1, 3, 384, 384),
        }
        bare = count_macs(published, inputs)
    shared = {"num_hidden_layers": 1, "hidden_size": 16, "num_attention_heads": 1, "intermediate_size": 16}
    text = {**shared, "vocab_size": 50, "max_position_embeddings": 64}
    vision = {**shared, "image_size": 384, "patch_size": 16}
    model = MeterModel(make_config(text_config=text, vision_config=vision, **fusion_sizes())).eval()
    attachment = petl_ext.attach(model, DASConfig())
    inputs = {"input_ids": torch.ones(1, 40, dtype=torch.long), "pixel_values": torch.zeros(1, 3, 384, 384)}
    attachment.skip([2, 4, 6, 11])
    counted = count_macs(model, inputs)
    with attachment.disable():
        alone = count_macs(model, inputs)
    for name in ("cross_modal_text_layers.3", "cross_modal_image_layers.3"):
        assert alone.of(name) == bare.of(name)
    saved = 1 - (counted.total - alone.total + bare.total) / bare.total
    assert 0.11 < saved < 0.125
    text_layer, image_layer = (bare.of(f"cross_modal_{stream}_layers.0") for stream in ("text", "image"))
    assert 4.5 < image_layer / text_layer < 5.2


def fusion_sizes():
    sizes = MeterConfig()
    names = ("hidden_size", "num_fusion_layers", "num_attention_heads", "intermediate_size")
    return {name: getattr(sizes, name) for name in names}


def test_dim_is_the_fusion_layers_own():
    attachment = petl_ext.attach(make_model(), DASConfig(bottleneck=4))
    assert {layer.down.size(1) for layer in map(bypass_of(attachment), attachment.layers)} == {DIM}


def bypass_of(attachment):
    return lambda name: attachment.model.get_submodule(name).bypass


@every_method
def test_exported_with_a_batch_and_a_length_that_change(config):
    model = make_model()
    petl_ext.attach(model, config, keep=["classifier"])
    inputs, larger = make_inputs(model), make_inputs(model, batch=4)
    for name in ("input_ids", "attention_mask"):
        larger[name] = torch.cat([larger[name], larger[name][:, :2]], dim=1)

    class Logits(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model.eval()

        def forward(self, input_ids, attention_mask, pixel_values):
            return self.model(input_ids=input_ids, attention_mask=attention_mask, pixel_values=pixel_values).logits

    batch, length = torch.export.Dim("batch", min=2, max=64), torch.export.Dim("length", min=2, max=9)
    texts, images = {0: batch, 1: length}, {0: batch}
    shapes = {"input_ids": texts, "attention_mask": texts, "pixel_values": images}
    program = torch.export.export(Logits(), (), inputs, dynamic_shapes=shapes, strict=False).module()
    torch.testing.assert_close(program(**larger), Logits()(**larger))
