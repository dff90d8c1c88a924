"""Checkpoints under the original authors' names: what fills a model, what is refused, and what the report says."""

import sys
import types

import original_checkpoints as originals
import pytest
import tiny_meter
import tiny_vilt
import torch
from checkpoint_checks import METER, METHODS, VILT, assert_equal, assert_refused, outcome_of
from safetensors.torch import save_file
from torch.nn.functional import interpolate
from transformers import (
    ViltForImageAndTextRetrieval,
    ViltForImagesAndTextClassification,
    ViltForMaskedLM,
    ViltForQuestionAnswering,
    ViltModel,
)

import petl_ext
from petl_ext import AdapterConfig, APTConfig, DASConfig, DeepPromptConfig
from petl_ext.models import (
    MeterForImageAndTextRetrieval,
    MeterForImagesAndTextClassification,
    MeterForQuestionAnswering,
    MeterForVisualEntailment,
    MeterModel,
)
from petl_ext.models.checkpoints import load_meter_checkpoint, load_vilt_checkpoint

HEADS = [
    (VILT, ViltModel, None),
    (VILT, ViltForQuestionAnswering, "vqa_classifier"),
    (VILT, ViltForQuestionAnswering, "gqa_classifier"),
    (VILT, ViltForQuestionAnswering, "snli_classifier"),
    (VILT, ViltForImagesAndTextClassification, "nlvr2_classifier"),
    (VILT, ViltForImageAndTextRetrieval, "rank_output"),
    (VILT, ViltForMaskedLM, "mlm_score"),
    (METER, MeterModel, None),
    (METER, MeterForQuestionAnswering, "vqa_classifier"),
    (METER, MeterForVisualEntailment, "snli_classifier"),
    (METER, MeterForImagesAndTextClassification, "nlvr2_classifier"),
    (METER, MeterForImageAndTextRetrieval, "rank_output"),
]
BUFFERS = ("position_ids", "token_type_ids")


@pytest.mark.parametrize("bare", [False, True], ids=["lightning", "bare"])
@pytest.mark.parametrize(("family", "model_class", "head"), HEADS)
def test_every_tensor_and_output_is_the_originals(save, family, model_class, head, bare):
    tiny, checkpoint, load = family
    trained = originals.with_original_norms(tiny.make_model(model_class, seed=1))
    state = checkpoint(trained, head)
    fresh = tiny.make_model(model_class, seed=0)
    report = load(fresh, save(state if bare else originals.lightning(state)))
    assert_equal(fresh, trained)
    inputs = tiny.make_inputs(trained)
    with torch.no_grad():
        assert torch.equal(tiny.run(fresh, inputs), tiny.run(trained, inputs))
    assert [outcome.key for outcome in report.keys] == list(state)
    assert all(name.endswith(BUFFERS) for name in report.unfilled)
    assert report.conversions == {}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", [VILT, METER], ids=["vilt", "meter"])
def test_attached_layers(save, family, method):
    tiny, checkpoint, load = family
    trained, fresh = originals.with_original_norms(tiny.make_model(seed=1)), tiny.make_model(seed=0)
    tiny_vilt.randomise(petl_ext.attach(trained, METHODS[method], keep=["classifier"]))
    petl_ext.attach(fresh, METHODS[method])
    state = checkpoint(trained, "vqa_classifier", method)
    report = load(fresh, save(state))
    assert_equal(fresh, trained)
    inputs = tiny.make_inputs(trained)
    with torch.no_grad():
        assert torch.equal(tiny.run(fresh, inputs), tiny.run(trained, inputs))
    added = trained.state_dict().keys() - tiny.make_model().state_dict().keys()
    assert added
    assert added <= {name for outcome in report.keys for name in outcome.names}


def test_the_text_of_a_report_has_each_key_and_each_unfilled_tensor_once(save):
    trained = tiny_vilt.make_model(ViltModel, seed=1)
    pretraining = originals.pretraining_heads(tiny_vilt.DIM, tiny_vilt.DIM)
    state = originals.vilt_checkpoint(trained) | pretraining | {"das_gate": torch.zeros(12), "skip_num": torch.ones(1)}
    fresh = tiny_vilt.make_model(ViltForQuestionAnswering)
    report = load_vilt_checkpoint(fresh, save(state), ignore=["pooler.dense.bias"])
    lines = [line.strip().partition(" ")[0].rstrip(":") for line in str(report).splitlines()[1:] if line[0] == " "]
    assert sorted(lines) == sorted([*state, *report.unfilled, *report.settings])
    filled = {name for outcome in report.keys for name in outcome.names}
    every = {name for name, _ in (*fresh.named_parameters(), *fresh.named_buffers())}
    assert filled | report.unfilled.keys() == every
    assert not filled & report.unfilled.keys()
    text = str(report)
    assert text.startswith(f"{report.source} -> ViltForQuestionAnswering\n")
    assert "mlm_score.bias: this model has no such head" in text
    assert "classifier.3.weight: stays as it is: the file holds no head for this model" in text
    assert "pooler.dense.bias: on request" in text
    assert "vilt.pooler.dense.bias: its key is ignored on request" in text
    assert "das_gate: DAS's search" in text
    assert outcome_of(report, "transformer.blocks.1.attn.qkv.bias").names == tuple(
        f"vilt.encoder.layer.1.attention.attention.{part}.bias" for part in ("query", "key", "value")
    )


def test_what_a_meter_checkpoint_holds_besides(save):
    trained, fresh = tiny_meter.make_model(seed=1), tiny_meter.make_model()
    state = originals.meter_checkpoint(trained, "vqa_classifier")
    state |= originals.pretraining_heads(tiny_meter.DIM, 2 * tiny_meter.DIM) | {"vit_model.visual.proj": torch.ones(2)}
    report = load_meter_checkpoint(fresh, save(state))
    left_out = {outcome.key: outcome.note for outcome in report.keys if outcome.action == "left out"}
    assert left_out.keys() == {
        "vit_model.positional_embedding",
        "vit_model.token_embedding.weight",
        "vit_model.ln_final.weight",
        "vit_model.ln_final.bias",
        "vit_model.visual.proj",
        "text_transformer.embeddings.position_ids",
        "text_transformer.pooler.dense.weight",
        "text_transformer.pooler.dense.bias",
        *originals.pretraining_heads(1, 1),
    }
    assert left_out["vit_model.ln_final.bias"].startswith("CLIP's text tower")
    assert_equal(fresh, trained)


@pytest.mark.parametrize("family", [VILT, METER], ids=["vilt", "meter"])
def test_pretraining_starts_the_fresh_heads(save, family):
    """A classifier stays as it is; a retrieval head is row 1 of the image-text matching head."""
    tiny, checkpoint, load = family
    retrieval = {VILT: ViltForImageAndTextRetrieval, METER: MeterForImageAndTextRetrieval}[family]
    trained = tiny.make_model(seed=1)
    pooled = tiny.make_model(retrieval).rank_output.in_features
    state = checkpoint(trained) | originals.pretraining_heads(tiny.DIM, pooled)
    path = save(state)

    fresh = tiny.make_model()
    classifier = [parameter.clone() for parameter in fresh.classifier.parameters()]
    report = load(fresh, path)
    assert all(map(torch.equal, fresh.classifier.parameters(), classifier))
    assert {name for name in report.unfilled if name.startswith("classifier.")} == {
        f"classifier.{i}.{name}" for i in (0, 1, 3) for name in ("weight", "bias")
    }

    fresh = tiny.make_model(retrieval)
    report = load(fresh, path)
    assert torch.equal(fresh.rank_output.weight, state["itm_score.fc.weight"][1:])
    assert torch.equal(fresh.rank_output.bias, state["itm_score.fc.bias"][1:])
    assert outcome_of(report, "itm_score.fc.bias")[1:] == (
        "adapted",
        ("rank_output.bias",),
        "row 1 alone, as the original starts retrieval",
    )


def test_a_trained_retrieval_head_goes_before_matching(save):
    trained, fresh = (tiny_vilt.make_model(ViltForImageAndTextRetrieval, seed=seed) for seed in (1, 0))
    state = originals.vilt_checkpoint(trained, "rank_output")
    report = load_vilt_checkpoint(fresh, save(state | originals.pretraining_heads(32, 32)))
    assert_equal(fresh, trained)
    assert outcome_of(report, "itm_score.fc.weight").note == "rank_output is loaded instead"


def test_the_head_of_another_task_is_left_out(save):
    trained, fresh = tiny_vilt.make_model(ViltForImagesAndTextClassification, seed=1), tiny_vilt.make_model()
    state = originals.vilt_checkpoint(trained, "nlvr2_classifier")
    state["token_type_embeddings.weight"] = state["token_type_embeddings.weight"][:2]
    report = load_vilt_checkpoint(fresh, save(state))
    assert {outcome.key for outcome in report.keys if outcome.note == "this model has no such head"} == {
        key for key in state if key.startswith("nlvr2_classifier.")
    }
    assert torch.equal(fresh.vilt.pooler.dense.weight, trained.vilt.pooler.dense.weight)


def test_a_head_for_another_number_of_labels(save):
    trained = tiny_vilt.make_model(seed=1, num_labels=7)
    path, fresh = save(originals.vilt_checkpoint(trained, "vqa_classifier")), tiny_vilt.make_model()
    message = assert_refused(load_vilt_checkpoint, fresh, path, "num_labels, or name 'vqa_classifier' in ignore")
    assert "vqa_classifier.3.weight [7, 64] for classifier.3.weight [5, 64]" in message
    assert "lacks" not in message
    classifier = fresh.classifier[0].weight.clone()
    report = load_vilt_checkpoint(fresh, path, ["vqa_classifier."])
    assert torch.equal(fresh.classifier[0].weight, classifier)
    assert report.unfilled["classifier.3.bias"] == "its key is ignored on request"
    assert outcome_of(report, "vqa_classifier.3.bias").action == "ignored"


def resized(weight, grid):
    """[1 + g * g, D] to [1 + grid * grid, D], one column of the table at a time."""
    old = round((len(weight) - 1) ** 0.5)
    images = [column.reshape(1, 1, old, old) for column in weight[1:].unbind(1)]
    columns = [interpolate(image, size=(grid, grid), mode="bicubic").flatten() for image in images]
    return torch.cat([weight[:1], torch.stack(columns, dim=1)])


@pytest.mark.parametrize("grid", [2, 6])
def test_position_embeddings_of_another_grid(save, grid):
    trained = tiny_vilt.make_model(seed=1)
    fresh = tiny_vilt.make_model(image_size=grid * tiny_vilt.PATCH)
    report = load_vilt_checkpoint(fresh, save(originals.vilt_checkpoint(trained, "vqa_classifier")))
    expected = resized(trained.vilt.embeddings.position_embeddings[0], grid)
    torch.testing.assert_close(fresh.vilt.embeddings.position_embeddings[0], expected)
    note = f"a grid of 4 x 4 positions resized bicubically to {grid} x {grid}"
    assert outcome_of(report, "transformer.pos_embed").note == note

    trained = tiny_meter.make_model(seed=1)
    fresh = tiny_meter.make_model()
    fresh.resize_images(grid * tiny_meter.PATCH)
    report = load_meter_checkpoint(fresh, save(originals.meter_checkpoint(trained, "vqa_classifier")))
    expected = resized(trained.meter.vit_model.embeddings.position_embedding.weight, grid)
    torch.testing.assert_close(fresh.meter.vit_model.embeddings.position_embedding.weight, expected)
    note = f"a grid of 3 x 3 positions resized bicubically to {grid} x {grid}"
    assert outcome_of(report, "vit_model.visual.positional_embedding").note == note
    inputs = tiny_meter.make_inputs(fresh)
    trained.resize_images(grid * tiny_meter.PATCH)
    with torch.no_grad():
        torch.testing.assert_close(tiny_meter.run(fresh, inputs), tiny_meter.run(trained, inputs))


@pytest.mark.parametrize("family", [VILT, METER], ids=["vilt", "meter"])
def test_nlvr2_gets_its_third_token_type(save, family):
    tiny, checkpoint, load = family
    nlvr2 = {VILT: ViltForImagesAndTextClassification, METER: MeterForImagesAndTextClassification}[family]
    state = checkpoint(tiny.make_model(seed=1))
    rows = state["token_type_embeddings.weight"] = torch.randn(2, tiny.DIM)
    fresh = tiny.make_model(nlvr2)
    report = load(fresh, save(state))
    outcome = outcome_of(report, "token_type_embeddings.weight")
    assert outcome.note == "row 2 is a copy of row 1, as the original starts NLVR2"
    (name,) = outcome.names
    assert torch.equal(fresh.get_parameter(name), torch.stack([rows[0], rows[1], rows[1]]))


def test_half_precision_is_converted_and_said(save):
    trained, fresh = tiny_vilt.make_model(seed=1), tiny_vilt.make_model()
    state = originals.vilt_checkpoint(trained, "vqa_classifier")
    halves = {key: tensor.half() if tensor.is_floating_point() else tensor for key, tensor in state.items()}
    report = load_vilt_checkpoint(fresh, save(halves))
    assert_equal(fresh, trained.half().float())
    assert report.conversions == {("float16", "float32"): len(state) - 1}
    assert f"{len(state) - 1} keys converted from float16 to float32" in str(report)

    fresh = tiny_vilt.make_model().bfloat16()
    report = load_vilt_checkpoint(fresh, save(halves))
    assert_equal(fresh, trained.bfloat16())
    assert report.conversions == {("float16", "bfloat16"): len(state) - 1}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", [VILT, METER], ids=["vilt", "meter"])
def test_layers_that_the_model_does_not_have(save, family, method):
    tiny, checkpoint, load = family
    trained = tiny.make_model(seed=1)
    petl_ext.attach(trained, METHODS[method])
    path = save(checkpoint(trained, "vqa_classifier", method))
    frozen = {VILT: "", METER: ", train_scale=False"}[family]
    hints = {
        "apt": [rf"attach APTConfig\(num_prompts=5, rank=2{frozen}\) first"],
        "sequential": [r"attach AdapterConfig\(bottleneck=3\) first"],
        "parallel": [r'attach AdapterConfig\(kind="parallel", bottleneck=3\) first'],
        "das": [r"attach DASConfig\(bottleneck=3\) first", r"attach DASConfig\(bypass_bottleneck=4\) first"],
    }
    for hint in hints[method]:
        assert_refused(load, tiny.make_model(), path, hint)


def test_layers_of_another_size_or_at_other_places(save):
    trained = tiny_vilt.make_model(seed=1)
    petl_ext.attach(trained, METHODS["apt"])
    path = save(originals.vilt_checkpoint(trained, "vqa_classifier", "apt"))
    fresh = tiny_vilt.make_model()
    petl_ext.attach(fresh, APTConfig(num_prompts=6, rank=2))
    assert_refused(load_vilt_checkpoint, fresh, path, r"mm_tokens \[5, 32\] for .*\.apt\.prompts \[6, 32\]")
    fresh = tiny_vilt.make_model()
    petl_ext.attach(fresh, APTConfig(num_prompts=5, rank=2, sites=[r"layer\.0\.attention\.output"]))
    message = assert_refused(load_vilt_checkpoint, fresh, path, "layers that the model does not have there")
    assert "blocks.1.attn.APT.scale" in message
    assert "blocks.0.attn.APT.scale" not in message


def test_a_backbone_checkpoint_leaves_attached_layers_as_they_are(save):
    trained = tiny_vilt.make_model(seed=1)
    path = save(originals.vilt_checkpoint(trained, "vqa_classifier"))
    for config in (*METHODS.values(), DeepPromptConfig(num_prompts=3)):
        fresh = tiny_vilt.make_model()
        attachment = petl_ext.attach(fresh, config)
        before = {name: parameter.clone() for name, parameter in attachment.named_parameters()}
        report = load_vilt_checkpoint(fresh, path)
        for name, parameter in before.items():
            assert torch.equal(fresh.get_parameter(name), parameter)
            assert report.unfilled[name] == "stays as it is: the file holds no such layers"
        attachment.detach()
        assert_equal(fresh, trained)


def test_layers_that_the_file_holds_in_part(save):
    trained, fresh = tiny_vilt.make_model(seed=1), tiny_vilt.make_model()
    for model in (trained, fresh):
        petl_ext.attach(model, METHODS["apt"])
    state = originals.vilt_checkpoint(trained, "vqa_classifier", "apt")
    del state["transformer.blocks.1.attn.APT.mm_tokens"]
    lacks = r"file lacks \(1\): vilt\.encoder\.layer\.1\.attention\.output\.apt\.prompts$"
    assert_refused(load_vilt_checkpoint, fresh, save(state), lacks)


EVERY_OUTPUT = {
    "vilt": r"encoder\.layer\.\d+\.(attention\.)?output",
    "meter": r"cross_modal_(text|image)_layers\.\d+\.((cross)?attention\.)?output",
}
# The file's method, and what is attached though its tensors fit: no norm to lack, adapters at all sites.
OTHER_METHODS = [
    ("sequential", lambda sites: DASConfig(bottleneck=3, layer_norm=False)),
    ("sequential", lambda sites: AdapterConfig(kind="parallel", bottleneck=3, layer_norm=False, sites=[sites])),
    ("parallel", lambda sites: AdapterConfig(bottleneck=3, layer_norm=True)),
    ("parallel", lambda sites: DASConfig(bottleneck=3)),
    ("das", lambda sites: AdapterConfig(kind="parallel", bottleneck=3, sites=[sites])),
    ("das", lambda sites: AdapterConfig(bottleneck=3, layer_norm=True)),
    ("apt", lambda sites: AdapterConfig(bottleneck=3)),
    ("sequential", lambda sites: APTConfig(num_prompts=5, rank=2)),
]


@pytest.mark.parametrize(("method", "other"), OTHER_METHODS)
@pytest.mark.parametrize("family", [VILT, METER], ids=["vilt", "meter"])
def test_layers_of_another_method_are_refused(save, family, method, other):
    tiny, checkpoint, load = family
    trained, fresh = (tiny.make_model(seed=seed) for seed in (1, 0))
    petl_ext.attach(trained, METHODS[method])
    attachment = petl_ext.attach(fresh, other(EVERY_OUTPUT["vilt" if family is VILT else "meter"]))
    path = save(checkpoint(trained, "vqa_classifier", method))
    its_config = {"apt": "APT", "sequential": "Adapter", "parallel": 'Adapter.*kind="parallel"', "das": "DAS"}[method]
    message = assert_refused(
        load, fresh, path, f"of another method than is attached: the file's are those of {its_config}"
    )
    assert f", the model's of {attachment.config}" in message
    with attachment.disable():
        assert_refused(load, fresh, path, "of another method than is attached")


def test_layers_whose_method_is_not_known_here_are_refused(save):
    trained, fresh = tiny_vilt.make_model(seed=1), tiny_vilt.make_model()
    petl_ext.attach(trained, METHODS["sequential"])
    petl_ext.attach(fresh.vilt, METHODS["sequential"])
    path = save(originals.vilt_checkpoint(trained, "vqa_classifier", "sequential"))
    load_vilt_checkpoint(fresh, path)
    assert_equal(fresh, trained)
    inner = tiny_vilt.make_model()
    petl_ext.attach(inner, METHODS["sequential"])
    message = "the model that petl_ext.attach was given"
    assert_refused(load_vilt_checkpoint, inner.vilt, path, message)


def test_two_keys_for_one_tensor(save):
    trained, fresh = (tiny_vilt.make_model(ViltForMaskedLM, seed=seed) for seed in (1, 0))
    state = originals.vilt_checkpoint(trained, "mlm_score")
    state["mlm_score.decoder.bias"] = state["mlm_score.bias"]
    twice = r"filled by another key too \(1\): mlm_score.decoder.bias by mlm_score.decoder.bias$"
    assert_refused(load_vilt_checkpoint, fresh, save(state), twice)


def test_values_that_are_not_finite_are_loaded_and_said(save):
    trained, fresh = tiny_vilt.make_model(seed=1), tiny_vilt.make_model()
    state = originals.vilt_checkpoint(trained, "vqa_classifier")
    nan, infinite = "transformer.blocks.1.mlp.fc1.weight", "transformer.blocks.0.attn.qkv.bias"
    state[nan][3, 2] = torch.nan
    state[infinite][[0, -1]] = torch.tensor([torch.inf, -torch.inf])
    report = load_vilt_checkpoint(fresh, save(state))
    weight = fresh.vilt.encoder.layer[1].intermediate.dense.weight
    assert weight.isnan().nonzero().tolist() == [[3, 2]]
    assert fresh.vilt.encoder.layer[0].attention.attention.query.bias[0] == torch.inf
    assert report.not_finite == (infinite, nan)
    assert f"NaN or infinity in 2 keys of the file: {infinite}, {nan}\n" in str(report)

    fresh = tiny_vilt.make_model().half()
    assert load_vilt_checkpoint(fresh, save(state)).not_finite == (infinite, nan)
    state["transformer.norm.bias"][0] = 7e4
    message = r"values beyond the range of float16 \(1\): transformer.norm.bias for vilt.layernorm.bias$"
    assert_refused(load_vilt_checkpoint, fresh, save(state), message)
    fresh = tiny_vilt.make_model().bfloat16()
    load_vilt_checkpoint(fresh, save(state))
    assert fresh.vilt.layernorm.bias[0] == 70144


def test_nan_in_a_tensor_that_the_model_shares(save):
    trained, tied = (tiny_vilt.make_model(ViltForMaskedLM, seed=seed) for seed in (1, 0))
    trained.mlm_score.decoder.weight.data[3, 2] = torch.nan
    state = originals.vilt_checkpoint(trained, "mlm_score")
    report = load_vilt_checkpoint(tied, save(state))
    assert report.not_finite == ("text_embeddings.word_embeddings.weight", "mlm_score.decoder.weight")
    state["mlm_score.decoder.weight"][0, 0] += 1
    assert_refused(load_vilt_checkpoint, tied, save(state), "two tensors in the file, one in the model")


STORED_OTHERWISE = {
    "sparse_coo": lambda tensor: tensor.to_sparse(),
    "sparse_csr": lambda tensor: tensor.to_sparse_csr(),
    "meta": lambda tensor: tensor.to("meta"),
    "nested": lambda tensor: torch.nested.nested_tensor([tensor]),
}


@pytest.mark.filterwarnings(
    "ignore:.*nested tensors.*:UserWarning",
    "ignore:.*CSR tensor.*:UserWarning",
    "ignore:Validating sparse tensor invariants:UserWarning",
)
@pytest.mark.parametrize("kind", STORED_OTHERWISE)
def test_tensors_that_are_not_dense_are_refused_by_name(save, kind):
    model = tiny_vilt.make_model()
    state = originals.vilt_checkpoint(tiny_vilt.make_model(seed=1), "vqa_classifier")
    state["vqa_classifier.0.weight"] = STORED_OTHERWISE[kind](state["vqa_classifier.0.weight"])
    path = save(state)
    message = assert_refused(load_vilt_checkpoint, model, path, rf"no dense.* \(1\): vqa_classifier.0.weight {kind}$")
    assert "lacks" not in message
    load_vilt_checkpoint(model, path, ["vqa_classifier"])


def test_the_older_name_of_the_scale_is_refused_until_ignored(save):
    trained, fresh = tiny_vilt.make_model(seed=1), tiny_vilt.make_model()
    for model in (trained, fresh):
        petl_ext.attach(model, METHODS["apt"])
    state = originals.vilt_checkpoint(trained, "vqa_classifier", "apt")
    old = [key for key in state if key.endswith("APT.scale")]
    state = {key.replace("APT.scale", "APT.weight"): tensor for key, tensor in state.items()}
    path = save(state)
    assert_refused(load_vilt_checkpoint, fresh, path, r"an older name, .* \(2\): .*0\.attn\.APT\.weight, ")
    report = load_vilt_checkpoint(fresh, path, [key.replace("scale", "weight") for key in old])
    name = "vilt.encoder.layer.0.attention.output.apt.log_scale"
    assert report.unfilled[name] == "its key is ignored on request"
    assert fresh.get_parameter(name).item() == 0


DAMAGE = [
    (lambda s: s.update({"transformer.extra": torch.ones(1)}), r"unknown keys \(1\): transformer.extra$"),
    (lambda s: s.update({"vqa_classifier.7.bias": torch.ones(1)}), r"unknown keys \(1\): vqa_classifier.7.bias$"),
    (
        lambda s: s.update({f"transformer.blocks.{i}.norm1.weight": torch.ones(32) for i in range(2, 16)}),
        r"unknown keys \(14\): transformer.blocks.2.norm1.weight, .*blocks.13.norm1.weight and 2 more$",
    ),
    (
        lambda s: s.update({f"transformer.blocks.{i}.norm1.weight": torch.ones(32) for i in range(2, 10)}),
        r"unknown keys \(8\): transformer.blocks.2.norm1.weight, .*blocks.9.norm1.weight$",
    ),
    (lambda s: s.update({"skip_number": torch.ones(1)}), r"unknown keys \(1\): skip_number$"),
    (
        lambda s: s.pop("transformer.blocks.1.attn.qkv.bias"),
        r"file lacks \(3\): .*attention.query.bias, .*attention.key.bias, .*attention.value.bias$",
    ),
    (lambda s: s.pop("vqa_classifier.1.bias"), r"file lacks \(1\): classifier.1.bias$"),
    (
        lambda s: s.update({"transformer.norm.bias": torch.ones(31)}),
        r"shapes that do not fit \(1\): transformer.norm.bias \[31\] for vilt.layernorm.bias \[32\]",
    ),
    (
        lambda s: s.update({"transformer.blocks.0.attn.qkv.bias": torch.ones(97)}),
        r"shapes that do not fit \(1\): transformer.blocks.0.attn.qkv.bias \[97\] for vilt.*query.bias \[32\], ",
    ),
    (lambda s: s.update({"transformer.blocks.0.attn.qkv.bias": torch.ones(())}), r"attn.qkv.bias \[\] for vilt"),
    (lambda s: s.update({"transformer.pos_embed": torch.ones(1, 16, 32)}), r"pos_embed \[1, 16, 32\] for vilt"),
    (lambda s: s.update({"transformer.pos_embed": torch.ones(1, 26, 31)}), r"pos_embed \[1, 26, 31\] for vilt"),
    (lambda s: s.update({"transformer.pos_embed": torch.ones(1, 1, 32)}), r"pos_embed \[1, 1, 32\] for vilt"),
    (lambda s: s.update({"transformer.pos_embed": torch.ones(2, 26, 32)}), r"pos_embed \[2, 26, 32\] for vilt"),
    (
        lambda s: s.update({"token_type_embeddings.weight": torch.ones(())}),
        r"token_type_embeddings.weight \[\] for vilt",
    ),
    (
        lambda s: s.update({"token_type_embeddings.weight": torch.ones(3, 32)}),
        r"token_type_embeddings.weight \[3, 32\] for vilt",
    ),
    (
        lambda s: s.update({"transformer.blocks.0.attn.APT.mm_tokens": torch.ones(())}),
        r"attach APTConfig\(num_prompts=\?, rank=\?\) first \(1\): transformer.blocks.0.attn.APT.mm_tokens$",
    ),
    (
        lambda s: s.update({"transformer.norm.bias": torch.ones(32, dtype=torch.long)}),
        r"not floating-point \(1\): transformer.norm.bias torch.int64 for vilt.layernorm.bias torch.float32",
    ),
]


@pytest.mark.parametrize(("damage", "message"), DAMAGE)
def test_a_file_that_does_not_fit_is_refused_whole(save, damage, message):
    state = originals.vilt_checkpoint(tiny_vilt.make_model(seed=1), "vqa_classifier")
    damage(state)
    model = tiny_vilt.make_model()
    text = assert_refused(load_vilt_checkpoint, model, save(state), f"(?m){message}")
    assert "does not fit ViltForQuestionAnswering, which has not changed:" in text


def test_a_meter_with_another_number_of_layers_is_refused(save):
    state = originals.meter_checkpoint(tiny_meter.make_model(seed=1), "vqa_classifier")
    model = tiny_meter.make_model(num_fusion_layers=2)
    assert_refused(load_meter_checkpoint, model, save(state), r"unknown keys \(52\): cross_modal_image_layers.2.att")
    model = tiny_meter.make_model(num_fusion_layers=4)
    assert_refused(
        load_meter_checkpoint, model, save(state), r"lacks \(52\): meter.cross_modal_text_layers.3.att.*and 40"
    )


def test_a_tensor_that_the_model_shares_must_be_shared_in_the_file(save):
    """HF's ViltForMaskedLM ties its decoder to the word embeddings, the original does not."""
    trained, tied, untied = (tiny_vilt.make_model(ViltForMaskedLM, seed=seed) for seed in (1, 0, 0))
    for model in (trained, untied):
        model.mlm_score.decoder.weight = torch.nn.Parameter(torch.randn(50, tiny_vilt.DIM))
    state = originals.vilt_checkpoint(trained, "mlm_score")
    message = assert_refused(load_vilt_checkpoint, tied, save(state), "config.tie_word_embeddings = False")
    words, decoder = "vilt.embeddings.text_embeddings.word_embeddings.weight", "mlm_score.decoder.weight"
    assert f"(1): {words} and {decoder}" in message
    load_vilt_checkpoint(untied, save(state))
    assert_equal(untied, trained)

    del state["mlm_score.decoder.weight"]
    report = load_vilt_checkpoint(tied, save(state))
    assert report.unfilled[decoder] == f"one tensor with {words}"


def test_untying_as_the_error_says():
    config = tiny_vilt.make_model().config
    config.tie_word_embeddings = False
    model = ViltForMaskedLM(config)
    assert model.mlm_score.decoder.weight is not model.vilt.embeddings.text_embeddings.word_embeddings.weight


def vilt_state():
    return originals.vilt_checkpoint(tiny_vilt.make_model(), "vqa_classifier")


def meter_state():
    return originals.meter_checkpoint(tiny_meter.make_model(), "vqa_classifier")


ANYTHING = "is not an original .* checkpoint; its keys are "
TO_BOTH = [
    (lambda: tiny_vilt.make_model().state_dict(), "a Hugging Face ViLT, not .*from_pretrained"),
    (lambda: tiny_vilt.make_model().vilt.state_dict(), "a Hugging Face ViltModel, not .*load_state_dict"),
    (lambda: tiny_meter.make_model().state_dict(), "a METER of petl_ext, not .*from_pretrained"),
    (lambda: tiny_meter.make_model().meter.state_dict(), "the MeterModel of petl_ext, not .*from_pretrained"),
    (lambda: {"vit_model.layers.0.blocks.0.norm1.bias": torch.ones(1)}, "a METER with a Swin image encoder"),
    (lambda: {f"module.{key}": t for key, t in vilt_state().items()}, 'in DataParallel.*take the leading "module."'),
    (lambda: torch.nn.Linear(2, 2).state_dict(), f"{ANYTHING}weight, bias"),
    (dict, f"{ANYTHING}none"),
]
OTHERS = [
    (load_vilt_checkpoint, tiny_vilt, meter_state, "an original METER checkpoint.*use load_meter_checkpoint"),
    (load_meter_checkpoint, tiny_meter, vilt_state, "an original ViLT checkpoint.*use load_vilt_checkpoint"),
    *((load_vilt_checkpoint, tiny_vilt, *other) for other in TO_BOTH),
    *((load_meter_checkpoint, tiny_meter, *other) for other in TO_BOTH),
]


@pytest.mark.parametrize(("load", "tiny", "state", "message"), OTHERS)
def test_a_file_of_another_architecture(save, load, tiny, state, message):
    assert_refused(load, tiny.make_model(), save(state()), message)


class Custom:
    """What a file could bring along to run code while it is read."""


def test_a_file_that_could_run_code_is_refused(save):
    state = originals.vilt_checkpoint(tiny_vilt.make_model(), "vqa_classifier")
    path = save({"state_dict": state, "callback": Custom()})
    model = tiny_vilt.make_model(seed=1)
    message = assert_refused(load_vilt_checkpoint, model, path, "is refused: it holds test_checkpoints.Custom, ")
    assert str(path) in message
    assert "keep only the weights: torch.save(" in message
    with pytest.raises(ValueError, match="refused") as caught:
        load_vilt_checkpoint(model, path)
    assert type(caught.value.__cause__).__name__ == "UnpicklingError"


def test_the_class_that_lightning_writes_is_read_as_nothing(save, monkeypatch):
    module = types.ModuleType("pytorch_lightning.callbacks.model_checkpoint")
    callback = type("ModelCheckpoint", (), {"__module__": module.__name__})
    module.ModelCheckpoint = callback
    trained, fresh = tiny_vilt.make_model(seed=1), tiny_vilt.make_model()
    content = originals.lightning(originals.vilt_checkpoint(trained, "vqa_classifier"))
    with monkeypatch.context() as patch:
        for name in ("pytorch_lightning", "pytorch_lightning.callbacks", module.__name__):
            patch.setitem(sys.modules, name, module)
        path = save(content | {"callbacks": {callback: {"best_model_path": "x", "best_model_score": torch.ones(1)}}})
    allowed = set(torch.serialization.get_safe_globals())
    load_vilt_checkpoint(fresh, path)
    assert_equal(fresh, trained)
    assert set(torch.serialization.get_safe_globals()) == allowed
    assert "pytorch_lightning" not in sys.modules


def test_files_that_are_no_whole_checkpoints(save, tmp_path):
    model = tiny_vilt.make_model()
    path = save(originals.vilt_checkpoint(model, "vqa_classifier"))
    whole = path.read_bytes()
    for size in (10, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        assert_refused(
            load_vilt_checkpoint, model, path, r"model.ckpt is no checkpoint, or not a whole one \(\w+Error: ."
        )
    path.write_bytes(b"\x80\x02but no more of a pickle")
    assert_refused(load_vilt_checkpoint, model, path, "model.ckpt is no checkpoint, ")
    for text in (b"hello", b"epoch,loss\n1,2\n", b"neither a zip nor a pickle", b"<!DOCTYPE html>"):
        path.write_bytes(text)
        assert_refused(
            load_vilt_checkpoint,
            model,
            path,
            r"model.ckpt is neither of torch.save nor of safetensors: it begins with b['\"]",
        )
    path.write_bytes(b"")
    assert_refused(load_vilt_checkpoint, model, path, "model.ckpt is an empty file$")
    save_file(model.state_dict(), path)
    assert_refused(
        load_vilt_checkpoint, model, path, "seems to be a state dict of a Hugging Face ViLT, .*from_pretrain"
    )
    path.write_bytes(path.read_bytes()[:-1])
    assert_refused(load_vilt_checkpoint, model, path, "model.ckpt: not a complete safetensors file: ")
    assert_refused(load_vilt_checkpoint, model, save([1]), "expected a state dict, .*got list")
    assert_refused(load_vilt_checkpoint, model, save({"state_dict": 3}), "expected a state dict, .*got int")
    assert_refused(load_vilt_checkpoint, model, save({"epoch": 3}), "'epoch' holds int")
    for missing in (tmp_path / "missing.ckpt", tmp_path):
        assert_refused(load_vilt_checkpoint, model, missing, "no such file", error=FileNotFoundError)


def test_arguments_of_the_wrong_kind(save):
    path = save(originals.vilt_checkpoint(tiny_vilt.make_model(), "vqa_classifier"))
    model = tiny_vilt.make_model()
    refused = {
        "vqa_classifier": "ignore must be a list of names, got 'vqa_classifier'",
        (3,): r"ignore must be a list of names, got \(3,\)",
    }
    for ignore, message in refused.items():
        assert_refused(load_vilt_checkpoint, model, path, message, ignore, TypeError)
    for entry in ("vqa", "", "."):
        assert_refused(load_vilt_checkpoint, model, path, "matches no key of .*; it has text_embeddings", [entry])
    assert_refused(load_vilt_checkpoint, tiny_meter.make_model(), path, "is no ViLT model", error=TypeError)
    assert_refused(load_meter_checkpoint, model, path, "is no METER model", error=TypeError)
    with pytest.raises(TypeError, match="expected a ViLT model, got str"):
        load_vilt_checkpoint("vilt", path)
    assert_refused(load_vilt_checkpoint, model.to("meta"), path, "is on the meta device")


def test_a_derived_class_keeps_its_head(save):
    class Derived(ViltForQuestionAnswering):
        pass

    trained = tiny_vilt.make_model(seed=1)
    fresh = tiny_vilt.make_model(Derived)
    load_vilt_checkpoint(fresh, save(originals.vilt_checkpoint(trained, "vqa_classifier")))
    assert_equal(fresh, trained)


def test_training_modes_and_gradients_stay(save):
    trained, fresh = tiny_vilt.make_model(seed=1), tiny_vilt.make_model().train()
    petl_ext.attach(trained, METHODS["apt"])
    petl_ext.attach(fresh, METHODS["apt"], keep=["classifier"])
    requires = {name: parameter.requires_grad for name, parameter in fresh.named_parameters()}
    load_vilt_checkpoint(fresh, save(originals.vilt_checkpoint(trained, "vqa_classifier", "apt")))
    assert {name: parameter.requires_grad for name, parameter in fresh.named_parameters()} == requires
    assert all(module.training for module in fresh.modules())
    assert all(parameter.grad_fn is None for parameter in fresh.parameters())
