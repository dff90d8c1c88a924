"""What the handle of an attachment tells, disables, detaches and freezes."""

import pytest
import torch
from tiny_vilt import CONFIGS, LAYERS, TOKENS, attached, make_inputs, make_model, randomize, run, snapshot

import petl_ext
from petl_ext import APTConfig, ClassifierOnlyConfig, DeepPromptConfig, FullTuningConfig
from petl_ext.counting import count_macs
from petl_ext.ops import backend, cpu_path

KEPT = 2565


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
    assert kernels(attachment) == {apt}
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
    randomize(attachment)
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
    randomize(attachment)
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
