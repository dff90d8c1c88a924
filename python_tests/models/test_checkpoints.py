"""Checkpoints under the original authors' names: what fills a model, and what the report says."""

import original_checkpoints as originals
import pytest
import tiny_meter
import tiny_vilt
import torch
import torch.nn.functional as F
from checkpoint_checks import METER, METHODS, VILT, assert_equal, assert_refused, outcome_of
from transformers import (
    ViltForImageAndTextRetrieval,
    ViltForImagesAndTextClassification,
    ViltForMaskedLM,
    ViltForQuestionAnswering,
    ViltModel,
)

import petl_ext
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
    columns = [F.interpolate(image, size=(grid, grid), mode="bicubic").flatten() for image in images]
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
