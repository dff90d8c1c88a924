"""Files that are no whole checkpoint of the model's architecture are refused, and change nothing."""

import sys
import types

import original_checkpoints as originals
import pytest
import tiny_meter
import tiny_vilt
import torch
from checkpoint_checks import assert_equal, assert_refused
from safetensors.torch import save_file
from transformers import ViltForMaskedLM

from petl_ext.models.checkpoints import load_meter_checkpoint, load_vilt_checkpoint


def test_two_keys_for_one_tensor(save):
    trained, fresh = (tiny_vilt.make_model(ViltForMaskedLM, seed=seed) for seed in (1, 0))
    state = originals.vilt_checkpoint(trained, "mlm_score")
    state["mlm_score.decoder.bias"] = state["mlm_score.bias"]
    twice = r"filled by another key too \(1\): mlm_score.decoder.bias by mlm_score.decoder.bias$"
    assert_refused(load_vilt_checkpoint, fresh, save(state), twice)


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
@pytest.mark.parametrize("storage", STORED_OTHERWISE)
def test_tensors_that_are_not_dense_are_refused_by_name(save, storage):
    model = tiny_vilt.make_model()
    state = originals.vilt_checkpoint(tiny_vilt.make_model(seed=1), "vqa_classifier")
    state["vqa_classifier.0.weight"] = STORED_OTHERWISE[storage](state["vqa_classifier.0.weight"])
    path = save(state)
    message = assert_refused(
        load_vilt_checkpoint, model, path, rf"no dense.* \(1\): vqa_classifier.0.weight {storage}$"
    )
    assert "lacks" not in message
    load_vilt_checkpoint(model, path, ["vqa_classifier"])


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
    message = assert_refused(
        load_vilt_checkpoint, model, path, "is refused: it holds test_checkpoint_refusals.Custom, "
    )
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
    assert_refused(load_vilt_checkpoint, model, save([1]), "must be a state dict, .*got list")
    assert_refused(load_vilt_checkpoint, model, save({"state_dict": 3}), "must be a state dict, .*got int")
    assert_refused(load_vilt_checkpoint, model, save({"epoch": 3}), "got int under 'epoch'")
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
    with pytest.raises(TypeError, match="model must be a ViLT model, got str"):
        load_vilt_checkpoint("vilt", path)
    assert_refused(load_vilt_checkpoint, model.to("meta"), path, "is on the meta device")
