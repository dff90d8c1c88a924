"""What the handle of an attachment tells, saves, loads and refuses."""

import json
import logging

import pytest
import safetensors.torch
import torch
from tiny_vilt import CONFIGS, LAYERS, TOKENS, make_inputs, make_model, randomise, run, snapshot
from transformers import BertConfig, BertModel, ViltModel

import petl_ext
from petl_ext import APTConfig, ClassifierOnlyConfig, DeepPromptConfig, FullTuningConfig, saving
from petl_ext.counting import count_macs
from petl_ext.ops import backend, cpu_path

KEPT = 2565


def attached(config=CONFIGS[0], keep=("classifier",)):
    model = make_model()
    return model, petl_ext.attach(model, config, keep)


def test_report_counts_every_site_and_kept_module():
    model, attachment = attached(APTConfig(num_prompts=5, rank=2))
    report = attachment.report(tokens=TOKENS)
    macs = 2 * TOKENS * 5 * 32 + 2 * 5 * 2 * 32
    assert [(row.layer, row.class_name, row.parameters, row.macs) for row in report.rows] == [
        ("vilt.encoder.layer.0.attention.output.apt", "APTLayer", 5 * 32 + 2 * 2 * 32 + 1, macs),
        ("vilt.encoder.layer.1.attention.output.apt", "APTLayer", 5 * 32 + 2 * 2 * 32 + 1, macs),
        ("classifier", "kept", KEPT, 0),
    ]
    assert report.macs == LAYERS * macs
    assert report.trained == sum(p.numel() for p in attachment.parameters()) == LAYERS * 289 + KEPT
    assert report.total == sum(p.numel() for p in model.parameters())
    assert attachment.report().macs is None


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.row or config.method)
def test_counted_macs_are_those_of_the_formulas(config):
    model, attachment = attached(config)
    inputs = make_inputs(model, batch=1)
    counted, computed = attachment.report(inputs=inputs), attachment.report(tokens=TOKENS)
    assert [row.macs for row in counted.rows] == [row.macs for row in computed.rows]
    assert counted.rows == computed.rows
    with attachment.disable():
        assert counted.backbone_macs == count_macs(model, inputs).total
        assert attachment.report(inputs=inputs).macs == 0
    assert f"{counted.macs:,} MACs in the new layers for these inputs, {counted.all_macs:,} in all, " in str(counted)
    assert f"{counted.all_macs / counted.backbone_macs:.2%} of the backbone's" in str(counted)
    if config.row != "bypass":
        assert counted.all_macs == counted.backbone_macs + counted.macs
    with pytest.raises(ValueError, match="give tokens or inputs, not both"):
        attachment.report(tokens=TOKENS, inputs=inputs)
    with pytest.raises(ValueError, match="tokens must be a positive integer, got -5"):
        attachment.report(tokens=-5)


def test_report_prints_a_table():
    text = str(attached()[1].report(tokens=TOKENS))
    head, columns, *rows, summary = text.splitlines()
    assert "APTConfig(num_prompts=5" in head and "ViltForQuestionAnswering" in head
    assert columns.split() == ["layer", "class", "parameters", "MACs", "kernel", "because"]
    assert len(rows) == LAYERS + 1 and rows[0].startswith("vilt.encoder.layer.0.attention.output.apt  APTLayer  289")
    assert f"3,143 of {28135:,} parameters train (11.17%)" in summary
    assert f"for a sequence of {TOKENS} tokens" in summary
    assert "report(tokens=...)" in str(attached()[1].report())


def kernels(attachment):
    return {(row.kernel, row.reason) for row in attachment.report().rows if row.class_name != "kept"}


def test_report_names_the_kernel_or_why_there_is_none():
    model, attachment = attached(APTConfig(num_prompts=5, dropout=0.1))
    apt = (f"apt (cpu, {cpu_path()})", "")
    assert kernels(attachment) == {apt}
    model.train()
    assert kernels(attachment) == {("reference", "dropout 0.1 in training")}
    model.eval().to(torch.float64)
    assert kernels(attachment) == {("reference", "float64")}
    model.to(torch.bfloat16)
    assert kernels(attachment) == {apt}
    with backend("reference"):
        assert kernels(attachment) == {("reference", "the backend reference was chosen")}
    with attachment.disable():
        assert kernels(attachment) == {("none", "disabled")}
    assert kernels(attached(DeepPromptConfig(3))[1]) == {("none", "deep prompts are plain PyTorch")}


def test_report_names_a_device_without_kernels(monkeypatch):
    _, attachment = attached()
    monkeypatch.setattr("petl_ext.ops.kernels._HELD", {("native", "apt", "cuda")})
    assert kernels(attachment) == {("none", "this build holds no kernel for cpu")}


def test_the_dispatcher_knows_which_devices_have_kernels():
    """Report asks it; a fallback registered for every device does not count as a kernel."""
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    assert has_kernel("petl_ext::apt_forward", torch._C._dispatch_key_for_device("cpu"))
    assert not has_kernel("petl_ext::apt_forward", torch._C._dispatch_key_for_device("xpu"))


def test_report_of_methods_that_add_nothing():
    (kept,) = attached(ClassifierOnlyConfig())[1].report(tokens=TOKENS).rows
    assert (kept.layer, kept.parameters, kept.macs) == ("classifier", KEPT, 0)
    model, attachment = attached(FullTuningConfig(), keep=())
    (row,) = attachment.report().rows
    assert row.parameters == sum(p.numel() for p in model.parameters())


def test_disable_restores_after_an_exception_and_nests():
    model, attachment = attached()
    inputs = make_inputs(model)
    randomise(attachment)
    output = run(model, inputs)
    with pytest.raises(RuntimeError, match="user"), attachment.disable():
        raise RuntimeError("user")
    assert torch.equal(run(model, inputs), output)
    with attachment.disable():
        with attachment.disable():
            without = run(model, inputs)
        assert torch.equal(run(model, inputs), without)
    assert torch.equal(run(model, inputs), output)
    assert not torch.equal(without, output)


def test_disable_contexts_may_overlap():
    model, attachment = attached()
    inputs = make_inputs(model)
    randomise(attachment)
    output = run(model, inputs)
    first, second = attachment.disable(), attachment.disable()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert not torch.equal(run(model, inputs), output)
    second.__exit__(None, None, None)
    assert torch.equal(run(model, inputs), output)


def test_layers_attached_in_inference_mode_train():
    model = make_model()
    with torch.inference_mode():
        attachment = petl_ext.attach(model, CONFIGS[0])
    assert not any(parameter.is_inference() for parameter in attachment.parameters())


def test_detach_inside_disable_stays_detached():
    model = make_model()
    before = snapshot(model)
    attachment = petl_ext.attach(model, CONFIGS[0])
    with attachment.disable():
        attachment.detach()
    assert snapshot(model) == before


def test_a_detached_handle_refuses_work(tmp_path):
    model, attachment = attached()
    attachment.detach()
    second = petl_ext.attach(model, CONFIGS[1], ["classifier"])
    before = snapshot(model)
    for use in (
        attachment.detach,
        attachment.report,
        lambda: attachment.save(tmp_path),
        lambda: list(attachment.parameters()),
        attachment.disable().__enter__,
    ):
        with pytest.raises(RuntimeError, match=r"APTConfig\(num_prompts=5.* has been detached"):
            use()
    assert model.petl_attachment is second
    assert snapshot(model) == before


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
    randomise(attachment)

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
    randomise(attachment)
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
    randomise(attachment)
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
    "no config": (lambda saved: (saved / "petl_config.json").unlink(), "found no petl_config.json"),
    "no weights": (lambda saved: (saved / "petl_weights.safetensors").unlink(), "found no petl_weights.safetensors"),
    "broken config": (truncate("petl_config.json"), "petl_config.json: "),
    "broken weights": (truncate("petl_weights.safetensors"), "not a complete safetensors file"),
    "list as config": (lambda saved: (saved / "petl_config.json").write_text("[]"), "expected an object"),
    "later format": (edit_config(format=2), "format 2, but this petl_ext reads formats up to 1"),
    "no format": (edit_config(format=None), "expected an object with the key 'format'"),
    "unknown key": (edit_config(extra=1), "expected the keys .* found .*extra"),
    "bad keep": (edit_config(keep="classifier"), "keep must be a list of names, found 'classifier'"),
    "other keep": (edit_config(keep=["vilt.pooler"]), "vilt.pooler"),
    "other family": (edit_config(family="clip"), "of the family 'clip', but ViltForQuestionAnswering is of 'vilt'"),
    "unknown method": (edit_method(method="lora"), "unknown method 'lora'; this petl_ext knows adapter, apt, "),
    "other method": (edit_config(config=DeepPromptConfig(3).to_dict()), "."),
    "unknown field": (edit_method(heads=12), "expected the fields .*found .*heads"),
    "bad value": (edit_method(rank=0), "rank must be a positive integer, got 0"),
    "other size": (edit_method(num_prompts=6), "."),
    "missing tensor": (edit_weights(lambda tensors: tensors.pop(SCALE)), f"1 differences: {SCALE}: missing"),
    "unexpected tensor": (edit_weights(lambda t: t.update(x=torch.ones(1))), "1 differences: x: unexpected"),
    "other shape": (
        edit_weights(lambda tensors: tensors.update({SCALE: torch.ones(2)})),
        rf"{SCALE}: expected the shape \(1,\), found \(2,\)",
    ),
    "other kind": (
        edit_weights(lambda tensors: tensors.update({SCALE: torch.ones(1, dtype=torch.int64)})),
        f"{SCALE}: expected torch.float32, found torch.int64",
    ),
}


@pytest.mark.parametrize("attach_first", [False, True])
@pytest.mark.parametrize(("edit", "message"), REFUSALS.values(), ids=REFUSALS)
def test_a_folder_that_does_not_fit_is_refused_whole(tmp_path, edit, message, attach_first):
    _, attachment = attached()
    randomise(attachment)
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
        (APTConfig(num_prompts=4), ["classifier"], r"the config that is attached, APTConfig\(num_prompts=4.*found APT"),
        (CONFIGS[1], ["classifier"], "config that is attached, DeepPromptConfig.*found APTConfig"),
        (CONFIGS[0], [], r"keep that is attached, \(\), found \('classifier',\)"),
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
    with pytest.raises(ValueError, match=r"16 differences|expected the shape \(5, 64\), found \(5, 32\)"):
        petl_ext.load(make_model(hidden_size=64), tmp_path / "saved")
    bert = BertModel(BertConfig(vocab_size=9, hidden_size=32, num_hidden_layers=1, num_attention_heads=2))
    with pytest.raises(ValueError, match="family 'vilt', but BertModel is of 'bert'"):
        petl_ext.load(bert, tmp_path / "saved")
    with pytest.raises(FileNotFoundError, match="nowhere: expected the files"):
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
    randomise(attachment)
    attachment.save(tmp_path / "saved")
    expected = run(model, make_inputs(model))
    other, _ = attached()
    with torch.no_grad():
        run(other, make_inputs(other))
        petl_ext.load(other, tmp_path / "saved")
        torch.testing.assert_close(run(other, make_inputs(other)), expected)


def test_named_parameters_are_the_models_own():
    model, attachment = attached()
    assert [name for name, _ in attachment.named_parameters()] == [
        name for name, parameter in model.named_parameters() if parameter.requires_grad
    ]
    for name, parameter in attachment.named_parameters():
        assert model.get_parameter(name) is parameter
    assert "APTConfig" in repr(attachment) and "2 sites" in repr(attachment)


def test_freezing_makes_derived_weights_once_and_shows_in_the_report(tmp_path):
    model = make_model()
    attachment = petl_ext.attach(model, petl_ext.APTConfig(num_prompts=5, rank=2))
    with pytest.raises(RuntimeError, match="in training mode"):
        attachment.model.train()
        attachment.freeze()
    model.eval()
    attachment.freeze()
    assert all(row.kernel.endswith(", frozen") for row in attachment.report().rows)
    attachment.thaw()
    assert not any("frozen" in row.kernel for row in attachment.report().rows)
    attachment.save(tmp_path)
    for change in (model.train, lambda: petl_ext.load(model, tmp_path), lambda: model.double()):
        model.eval()
        attachment.freeze()
        change()
        assert not any("frozen" in row.kernel for row in attachment.report().rows)
    attached(petl_ext.AdapterConfig(bottleneck=2))[1].freeze()  # has nothing to derive
