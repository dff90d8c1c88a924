"""What the handle of an attachment saves and loads, and which folders and models are refused."""

import json
import logging

import pytest
import safetensors.torch
import torch
from tiny_vilt import CONFIGS, attached, make_inputs, make_model, randomize, run, snapshot
from transformers import BertConfig, BertModel, ViltModel

import petl_ext
from petl_ext import APTConfig, DeepPromptConfig, saving


def test_save_writes_new_layers_and_kept_modules_only(tmp_path):
    model, attachment = attached()
    attachment.save(tmp_path / "deep" / "saved")
    tensors = safetensors.torch.load_file(tmp_path / "deep" / "saved" / "petl_weights.safetensors")
    assert tensors.keys() == {name for name in model.state_dict() if ".apt." in name or name.startswith("classifier.")}
    description = json.loads((tmp_path / "deep" / "saved" / "petl_config.json").read_text())
    with safetensors.safe_open(tmp_path / "deep" / "saved" / "petl_weights.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt", "save": description.pop("save")}
    assert description == {
        "format": 1,
        "family": "vilt",
        "keep": ["classifier"],
        "config": {
            "method": "apt",
            "num_prompts": 5,
            "rank": 2,
            "activation": "relu",
            "dropout": 0.0,
            "sites": None,
            "train_scale": True,
            "class_token": False,
        },
    }
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["saved"]


def test_sites_survive_saving(tmp_path):
    _, attachment = attached(APTConfig(num_prompts=5, sites=[r"layer\.1\.attention\.output"]))
    attachment.save(tmp_path / "saved")
    assert petl_ext.load(make_model(), tmp_path / "saved").sites == ("vilt.encoder.layer.1.attention.output",)


@pytest.mark.parametrize("exists", [True, False])
@pytest.mark.parametrize("step", ["save_file", "write_text"])
def test_a_failed_save_leaves_the_folder_as_it_was(tmp_path, monkeypatch, exists, step):
    attachment = attached()[1]
    target = tmp_path / "saved"
    if exists:
        attachment.save(target)
        (target / "notes.txt").write_text("mine")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    randomize(attachment)

    def run_out_of_space(*arguments, **_):
        raise OSError("no space left on device")

    owner = safetensors.torch if step == "save_file" else saving.Path
    monkeypatch.setattr(owner, step, run_out_of_space)
    with pytest.raises(OSError, match="no space"):
        attachment.save(target)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    assert target.exists() == exists


def test_a_save_that_fails_between_its_two_files_puts_the_first_back(tmp_path, monkeypatch):
    attachment = attached()[1]
    attachment.save(tmp_path / "saved")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    randomize(attachment)
    replace = saving.os.replace

    def fail_at_the_configuration(source, target):
        if "complete" in str(source) and str(target).endswith(".json"):
            raise OSError("the file server is gone")
        replace(source, target)

    monkeypatch.setattr(saving.os, "replace", fail_at_the_configuration)
    with pytest.raises(OSError, match="file server"):
        attachment.save(tmp_path / "saved")
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_saving_over_a_folder_replaces_both_files_and_keeps_others(tmp_path):
    attached()[1].save(tmp_path / "saved")
    (tmp_path / "saved" / "notes.txt").write_text("mine")
    model, attachment = attached(CONFIGS[1], keep=())
    randomize(attachment)
    attachment.save(tmp_path / "saved")
    fresh = make_model()
    petl_ext.load(fresh, tmp_path / "saved")
    assert snapshot(fresh) == snapshot(model)
    assert (tmp_path / "saved" / "notes.txt").read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]


def edit_config(**changes):
    def edit(saved):
        path = saved / "petl_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return edit


def edit_method(**changes):
    def edit(saved):
        config = json.loads((saved / "petl_config.json").read_text())["config"]
        edit_config(config=config | changes)(saved)

    return edit


def edit_weights(change):
    def edit(saved):
        path = saved / "petl_weights.safetensors"
        tensors = safetensors.torch.load_file(path)
        change(tensors)
        safetensors.torch.save_file(tensors, path)

    return edit


def truncate(name):
    def edit(saved):
        path = saved / name
        path.write_bytes(path.read_bytes()[:40])

    return edit


SCALE = "vilt.encoder.layer.0.attention.output.apt.log_scale"
REFUSALS = {
    "no config": (lambda saved: (saved / "petl_config.json").unlink(), "got no petl_config.json"),
    "no weights": (lambda saved: (saved / "petl_weights.safetensors").unlink(), "got no petl_weights.safetensors"),
    "broken config": (truncate("petl_config.json"), "petl_config.json: "),
    "broken weights": (truncate("petl_weights.safetensors"), "not a complete safetensors file"),
    "list as config": (lambda saved: (saved / "petl_config.json").write_text("[]"), "it must be an object"),
    "later format": (edit_config(format=2), "format 2, but this petl_ext reads formats up to 1"),
    "no format": (edit_config(format=None), "it must be an object with the key 'format'"),
    "unknown key": (edit_config(extra=1), "the keys must be .* got .*extra"),
    "bad keep": (edit_config(keep="classifier"), "keep must be a list of names, got 'classifier'"),
    "other keep": (edit_config(keep=["vilt.pooler"]), "vilt.pooler"),
    "other family": (edit_config(family="clip"), "of the family 'clip', but ViltForQuestionAnswering is of 'vilt'"),
    "unknown method": (edit_method(method="lora"), "method must be one of adapter, apt, .*, got 'lora'"),
    "other method": (edit_config(config=DeepPromptConfig(3).to_dict()), "."),
    "unknown field": (edit_method(heads=12), "must have the fields .*got .*heads"),
    "bad value": (edit_method(rank=0), "rank must be a positive integer, got 0"),
    "other size": (edit_method(num_prompts=6), "."),
    "missing tensor": (edit_weights(lambda tensors: tensors.pop(SCALE)), f"1 differences: {SCALE}: missing"),
    "unexpected tensor": (edit_weights(lambda t: t.update(x=torch.ones(1))), "1 differences: x: unexpected"),
    "other shape": (
        edit_weights(lambda tensors: tensors.update({SCALE: torch.ones(2)})),
        rf"{SCALE} must have the shape \(1,\), got \(2,\)",
    ),
    "other kind": (
        edit_weights(lambda tensors: tensors.update({SCALE: torch.ones(1, dtype=torch.int64)})),
        f"{SCALE} must be torch.float32, got torch.int64",
    ),
}


@pytest.mark.parametrize("attach_first", [False, True])
@pytest.mark.parametrize(("edit", "message"), REFUSALS.values(), ids=REFUSALS)
def test_a_folder_that_does_not_fit_is_refused_whole(tmp_path, edit, message, attach_first):
    _, attachment = attached()
    randomize(attachment)
    attachment.save(tmp_path / "saved")
    edit(tmp_path / "saved")
    model = make_model()
    if attach_first:
        petl_ext.attach(model, CONFIGS[0], ["classifier"])
    before = snapshot(model)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        petl_ext.load(model, tmp_path / "saved")
    assert snapshot(model) == before


@pytest.mark.parametrize(
    ("config", "keep", "message"),
    [
        (APTConfig(num_prompts=4), ["classifier"], r"the config that is attached, APTConfig\(num_prompts=4.*got APT"),
        (CONFIGS[1], ["classifier"], "config that is attached, DeepPromptConfig.*got APTConfig"),
        (CONFIGS[0], [], r"keep that is attached, \(\), got \('classifier',\)"),
    ],
)
def test_loading_over_another_attachment_is_refused(tmp_path, config, keep, message):
    attached()[1].save(tmp_path / "saved")
    model = make_model()
    petl_ext.attach(model, config, keep)
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        petl_ext.load(model, tmp_path / "saved")
    assert snapshot(model) == before


def test_models_that_do_not_fit_are_refused(tmp_path):
    _, attachment = attached(keep=())
    attachment.save(tmp_path / "saved")
    with pytest.raises(ValueError, match=r"16 differences: encoder.layer.0.attention.output.apt.down: missing"):
        petl_ext.load(make_model(ViltModel), tmp_path / "saved")
    with pytest.raises(ValueError, match=r"16 differences|must have the shape \(5, 64\), got \(5, 32\)"):
        petl_ext.load(make_model(hidden_size=64), tmp_path / "saved")
    bert = BertModel(BertConfig(vocab_size=9, hidden_size=32, num_hidden_layers=1, num_attention_heads=2))
    with pytest.raises(ValueError, match="family 'vilt', but BertModel is of 'bert'"):
        petl_ext.load(bert, tmp_path / "saved")
    with pytest.raises(FileNotFoundError, match="nowhere must hold the files"):
        petl_ext.load(make_model(), tmp_path / "nowhere")


def test_another_precision_is_converted_and_logged(tmp_path, caplog):
    _, attachment = attached()
    attachment.save(tmp_path / "saved")
    model = make_model().to(torch.bfloat16)
    with caplog.at_level(logging.WARNING, logger="petl_ext"):
        loaded = petl_ext.load(model, tmp_path / "saved")
    assert "converted from torch.float32 to torch.bfloat16" in caplog.text
    for ours, saved in zip(loaded.parameters(), attachment.parameters(), strict=True):
        assert torch.equal(ours, saved.to(torch.bfloat16))


def test_loading_refreshes_what_a_layer_has_cached(tmp_path):
    model, attachment = attached()
    randomize(attachment)
    attachment.save(tmp_path / "saved")
    expected = run(model, make_inputs(model))
    other, _ = attached()
    with torch.no_grad():
        run(other, make_inputs(other))
        petl_ext.load(other, tmp_path / "saved")
        torch.testing.assert_close(run(other, make_inputs(other)), expected)
