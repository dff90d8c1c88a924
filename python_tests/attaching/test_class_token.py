"""The class token: which row it takes, where it starts, where it is refused; and APT whose scale does not train."""

import json

import pytest
import tiny_meter
import tiny_vilt
import torch
import torch.nn.functional as F
from tiny_families import FAMILIES
from tiny_vilt import CLASS_TOKEN, make_inputs, make_model, randomize, run, snapshot

import petl_ext
from petl_ext import (
    AdapterConfig,
    APTConfig,
    ClassifierOnlyConfig,
    ClassTokenConfig,
    DASConfig,
    DeepPromptConfig,
    FullTuningConfig,
)
from petl_ext.models import MeterForImageAndTextRetrieval, MeterModel

TOKENS = {
    "vilt": (tiny_vilt, "vilt.embeddings.text_embeddings"),
    "meter": (tiny_meter, "meter.cross_modal_text_transform"),
}
every_family = pytest.mark.parametrize("family", TOKENS)


@every_family
@torch.no_grad()
def test_it_is_row_0_of_the_text_and_nothing_else(family):
    tiny, site = TOKENS[family]
    model = tiny.make_model()
    attachment = petl_ext.attach(model, ClassTokenConfig())
    assert attachment.sites == (site,)
    randomize(attachment)
    (vector,) = attachment.parameters()
    seen = []
    model.get_submodule(site).register_forward_hook(lambda *hooked: seen.append(hooked[2]))
    inputs = tiny.make_inputs(model)
    output = tiny.run(model, inputs)
    with attachment.disable():
        tiny.run(model, inputs)
    replaced, backbone = seen
    assert torch.equal(replaced[:, 1:], backbone[:, 1:])
    assert torch.equal(replaced[:, 0], vector[0].expand(2, -1))
    changed = inputs | {"input_ids": inputs["input_ids"].clone()}
    changed["input_ids"][:, 0] = 7
    same = torch.allclose(tiny.run(model, changed), output, atol=1e-6)
    assert same == (family == "vilt")  # METER's other tokens have read the first one


@pytest.mark.parametrize("vocabulary", [50, 102])
def test_in_vilt_it_starts_as_the_embedding_of_cls(vocabulary):
    model = make_model(vocab_size=vocabulary).train()
    text = model.vilt.embeddings.text_embeddings
    torch.manual_seed(0)
    petl_ext.attach(model, APTConfig(num_prompts=5, class_token=True))
    vector = text.class_token.vector
    assert vector.shape == (1, 1, tiny_vilt.DIM) and vector.requires_grad
    if vocabulary == 50:  # no token 101
        assert 0.01 < vector.std() < 0.03
        return
    rows = (text.word_embeddings.weight[101], text.position_embeddings.weight[0], text.token_type_embeddings.weight[0])
    expected = F.layer_norm(sum(rows), (tiny_vilt.DIM,), text.LayerNorm.weight, text.LayerNorm.bias, 1e-12)
    torch.testing.assert_close(vector[0, 0], expected)


def test_in_meter_it_starts_as_the_embedding_of_the_start_of_text():
    narrow = tiny_meter.make_model()
    petl_ext.attach(narrow, ClassTokenConfig())
    assert 0.01 < narrow.meter.cross_modal_text_transform.class_token.vector.std() < 0.03  # RoBERTa is narrower
    model = tiny_meter.make_model(MeterModel, hidden_size=tiny_meter.TEXT_DIM)
    petl_ext.attach(model, ClassTokenConfig())
    with torch.no_grad():
        expected = model.text_transformer.embeddings(torch.tensor([[0]]))
    torch.testing.assert_close(model.cross_modal_text_transform.class_token.vector, expected)


@torch.no_grad()
def test_every_text_of_an_image_gets_it():
    model = tiny_meter.make_model(MeterForImageAndTextRetrieval)
    randomize(petl_ext.attach(model, ClassTokenConfig()))
    inputs = tiny_meter.make_inputs(model)
    texts = {name: torch.stack([inputs[name], inputs[name].flip(0)], 1) for name in ("input_ids", "attention_mask")}
    both = model(**texts, pixel_values=inputs["pixel_values"]).logits
    torch.testing.assert_close(both[:, :1], model(**inputs).logits)


METHODS = [
    APTConfig(num_prompts=5, rank=2, class_token=True),
    DeepPromptConfig(num_prompts=3, class_token=True),
    AdapterConfig(bottleneck=6, class_token=True),
    DASConfig(bottleneck=6, skip=[1], class_token=True),
    ClassTokenConfig(),
    ClassifierOnlyConfig(class_token=True),
    FullTuningConfig(class_token=True),
]
every_method = pytest.mark.parametrize("config", METHODS, ids=lambda config: config.method)


@every_method
@torch.no_grad()
def test_vilt_reads_embeddings_of_text_and_image(config):
    """The class token takes the place of row 0 of the text there too."""
    model = make_model()
    attachment = petl_ext.attach(model, config)
    randomize(attachment)
    inputs = make_inputs(model)
    expected = run(model, inputs)
    words = model.vilt.embeddings.text_embeddings.word_embeddings(inputs["input_ids"])
    pixels = inputs["pixel_values"]
    torch.manual_seed(2)  # ViLT shuffles patches with it
    seen, mask, _ = model.vilt.embeddings.visual_embed(pixels, torch.ones(2, *pixels.shape[2:]), max_image_length=-1)
    given = {"inputs_embeds": words, "image_embeds": seen, "pixel_mask": mask}
    output = model(attention_mask=inputs["attention_mask"], **given).logits
    torch.testing.assert_close(output, expected)
    given["inputs_embeds"] = torch.cat([words[:, :1] + 1, words[:, 1:]], 1)
    torch.testing.assert_close(model(attention_mask=inputs["attention_mask"], **given).logits, expected)
    given["inputs_embeds"] = torch.cat([words[:, :1], words[:, 1:] + torch.randn(tiny_vilt.DIM)], 1)
    assert not torch.allclose(model(attention_mask=inputs["attention_mask"], **given).logits, expected, rtol=1e-3)


@every_method
def test_the_report_has_a_row_for_it(config):
    model = make_model()
    attachment = petl_ext.attach(model, config)
    name = CLASS_TOKEN.removesuffix(".vector")
    if config.trains_all:
        assert attachment.report().trained == sum(parameter.numel() for parameter in model.parameters())
        return
    for arguments in ({"tokens": 9}, {"inputs": make_inputs(model)}):
        (row,) = (row for row in attachment.report(**arguments).rows if row.layer.endswith(name))
        assert (row.class_name, row.parameters, row.macs, row.kernel) == ("ClassToken", tiny_vilt.DIM, 0, "none")


def test_other_text_embeddings_by_sites():
    bert = FAMILIES["bert"].make(2)
    with pytest.raises(ValueError, match=r"BertModel .*none .* for class_token, .*: embeddings, enc"):
        petl_ext.attach(bert, ClassTokenConfig())
    with pytest.raises(ValueError, match="belongs to none of the families with sites for class_token"):
        petl_ext.attach(bert, APTConfig(class_token=True))
    assert not hasattr(bert, "petl_attachment")
    attachment = petl_ext.attach(bert, ClassTokenConfig(sites=["embeddings"]))
    ids = torch.tensor([[3, 4, 5]])
    torch.testing.assert_close(bert.embeddings(ids)[0, 0], next(attachment.parameters())[0, 0])


@pytest.mark.parametrize("config", [APTConfig, AdapterConfig, DASConfig, DeepPromptConfig, FullTuningConfig])
def test_a_class_token_is_there_or_not(config):
    with pytest.raises(ValueError, match=f"{config.__name__}: class_token must be True or False, got 101"):
        config(class_token=101)


def test_layers_removed_for_good_leave_it():
    model = make_model()
    attachment = petl_ext.attach(model, DASConfig(bottleneck=6, skip=[0], permanent=True, class_token=True))
    assert [name for name, _ in attachment.named_parameters() if name.endswith(CLASS_TOKEN)]
    assert run(model, make_inputs(model)).isfinite().all()


def test_a_scale_that_does_not_train(tmp_path):
    with pytest.raises(ValueError, match="APTLayer: train_scale must be True or False, got 0"):
        APTConfig(train_scale=0)
    model = tiny_meter.make_model()
    attachment = petl_ext.attach(model, APTConfig(num_prompts=5, rank=2, train_scale=False))
    names = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert names == {name for name, _ in attachment.named_parameters()}
    assert not any(name.endswith("log_scale") for name in names)
    assert {row.parameters for row in attachment.report().rows} == {5 * 32 + 2 * 2 * 32}
    tiny_meter.run(model, tiny_meter.make_inputs(model)).sum().backward()
    assert all((p.grad is None) == (n not in names) for n, p in model.named_parameters())
    scale = model.meter.cross_modal_text_layers[0].attention.output.apt.log_scale
    with torch.no_grad():
        scale.fill_(0.25)
    attachment.save(tmp_path / "saved")
    fresh = tiny_meter.make_model()
    assert petl_ext.load(fresh, tmp_path / "saved").config == attachment.config
    assert snapshot(fresh) == snapshot(model)
    trained = tiny_meter.make_model()
    petl_ext.attach(trained, APTConfig(num_prompts=5, rank=2))
    with pytest.raises(ValueError, match=r"must hold the config that is attached, .*train_scale=True"):
        petl_ext.load(trained, tmp_path / "saved")


def test_a_folder_of_before_has_neither(tmp_path):
    attachment = petl_ext.attach(make_model(), APTConfig(num_prompts=5, rank=2))
    attachment.save(tmp_path / "saved")
    path = tmp_path / "saved" / "petl_config.json"
    description = json.loads(path.read_text())
    for field in ("train_scale", "class_token"):
        del description["config"][field]
    path.write_text(json.dumps(description))
    loaded = petl_ext.load(make_model(), tmp_path / "saved")
    assert loaded.config == APTConfig(num_prompts=5, rank=2, train_scale=True, class_token=False)
    del description["config"]["rank"]
    path.write_text(json.dumps(description))
    with pytest.raises(ValueError, match=r"must have the fields .*'rank'"):
        petl_ext.load(make_model(), tmp_path / "saved")
