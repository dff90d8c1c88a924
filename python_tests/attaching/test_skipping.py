"""Layers that are skipped, on every family: against smaller models that never had them; gradients; the report."""

import copy
import gc
import weakref

import pytest
import tiny_meter
import torch
from skipping_checks import SKIPS, Passing, attached, every_family, layer_indices, stacks, without_layers
from tiny_families import DIM, LAYERS, make_inputs, make_model, run
from tiny_vilt import randomize, snapshot
from transformers_names import enable_checkpointing

import petl_ext
from petl_ext import DASConfig
from petl_ext.counting import count_macs
from petl_ext.ops import adapter_reference


@pytest.mark.parametrize("skip", SKIPS, ids=str)
@every_family
def test_a_bypass_that_passes_leaves_the_smaller_model(family, skip):
    model = make_model(family)
    several = len(stacks(family)) > 1
    layers = [f"{stack}.{index}" for stack in stacks(family) for index in skip][several:]  # unequal in two stacks
    if family == "meter":  # its two stacks are of one length
        expected = copy.deepcopy(model)
        for name in layers:
            stack, _, index = name.rpartition(".")
            expected.get_submodule(stack)[int(index)] = Passing()
    else:
        expected = without_layers(model, family, layers)
    attachment = petl_ext.attach(model, DASConfig(bottleneck=0, zero_init=True))
    attachment.skip(layers)
    inputs = make_inputs(model)
    torch.testing.assert_close(run(model, inputs), run(expected, inputs))


@every_family
def test_all_layers_can_be_skipped(family):
    model = make_model(family)
    attachment = petl_ext.attach(model, DASConfig(bottleneck=0, zero_init=True))
    attachment.skip(attachment.layers)
    ends = {}
    for stack in stacks(family):
        first, *_, last = model.get_submodule(stack)
        first.register_forward_pre_hook(lambda _, arguments, stack=stack: ends.setdefault((stack, "in"), arguments[0]))
        last.register_forward_hook(lambda _, __, output, stack=stack: ends.setdefault((stack, "out"), output))
    run(model, make_inputs(model))
    for stack in stacks(family):
        output = ends[stack, "out"]
        assert torch.equal(output if torch.is_tensor(output) else output[0], ends[stack, "in"])


@every_family
def test_a_skipped_layer_is_its_bypass(family):
    model, attachment = attached(family)
    randomize(attachment)
    attachment.skip([0, len(attachment.layers) - 1])
    seen = []
    for index in attachment.skipped:
        layer = model.get_submodule(attachment.layers[index])
        layer.register_forward_hook(lambda layer, arguments, output: seen.append((layer, arguments[0], output)))
    run(model, make_inputs(model))
    assert len(seen) == 2
    for layer, x, output in seen:
        own_norm = {"t5": "layer.0.layer_norm", "llama": "input_layernorm"}.get(family)
        bypass = layer.bypass
        norm = {} if own_norm else {"norm_weight": bypass.norm_weight, "norm_bias": bypass.norm_bias}
        normed = layer.get_submodule(own_norm)(x) if own_norm else x
        expected = adapter_reference(
            normed, bypass.down, bypass.down_bias, bypass.up, bypass.up_bias, residual=x, **norm
        )
        assert (bypass.norm_weight is None) == bool(own_norm)
        torch.testing.assert_close(output if torch.is_tensor(output) else output[0], expected)
        assert not torch.allclose(expected, x, atol=0.1)


@every_family
def test_skipping_ends_where_it_began(family):
    model, attachment = attached(family)
    randomize(attachment)
    inputs = make_inputs(model)
    before, output = snapshot(model), run(model, inputs)
    attachment.skip([0, 1])
    assert attachment.skipped == (0, 1) and attachment.config.skip == (0, 1)
    assert not torch.equal(run(model, inputs), output)
    attachment.skip([1])
    attachment.skip([])
    assert snapshot(model) == before
    assert torch.equal(run(model, inputs), output)


@torch.no_grad()  # attention takes another path where a bias requires gradients
@every_family
def test_disable_and_detach_restore_the_backbone(family):
    model = make_model(family)
    inputs = make_inputs(model)
    before, output, indices = snapshot(model), run(model, inputs), layer_indices(model)
    attachment = petl_ext.attach(model, DASConfig(bottleneck=4))
    randomize(attachment)
    attachment.skip([0])
    skipped = run(model, inputs)
    with attachment.disable(), attachment.disable():
        assert torch.equal(run(model, inputs), output)
        assert layer_indices(model) == indices
    assert attachment.skipped == (0,)
    with pytest.raises(KeyError), attachment.disable():
        raise KeyError
    assert attachment.skipped == (0,)
    assert torch.equal(run(model, inputs), skipped)
    attachment.detach()
    assert torch.equal(run(model, inputs), output)
    assert snapshot(model) == before
    assert layer_indices(model) == indices
    assert not any("skipped" in vars(module) for module in model.modules())


def test_layers_that_replace_others_are_numbered_too():
    model, attachment = attached("llama")
    attachment.skip([0])
    model.model.layers[2] = copy.deepcopy(model.model.layers[2])
    for skip, number in (([0], 1), ([], 2), ([0, 1], 0)):
        attachment.skip(skip)
        assert model.model.layers[2].self_attn.layer_idx == number


def test_nothing_holds_what_has_been_removed():
    model, attachment = attached("llama", skip=[1])
    removed, kept = (weakref.ref(model.model.layers[i].self_attn) for i in (1, 2))
    attachment.remove_skipped()
    gc.collect()
    assert removed() is None and kept() is not None


@every_family
def test_gradients_reach_what_runs_and_nothing_else(family):
    model, attachment = attached(family)
    attachment.skip([1])
    run(model, make_inputs(model)).square().sum().backward()
    layer = attachment.layers[1]
    graded = {name for name, p in model.named_parameters() if p.grad is not None}
    running = {
        name for name, _ in attachment.named_parameters() if (".bypass." in name) == name.startswith(f"{layer}.")
    }
    assert graded == running
    assert any(".bypass." in name for name in graded)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("family", ["vilt", "meter", "bert", "t5", "llama"])
def test_gradient_checkpointing_gives_the_same_gradients(family, reentrant):
    model, attachment = attached(family)
    attachment.skip([0])
    model.train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    calls, gradients = [], []
    model.get_submodule(attachment.layers[1]).register_forward_hook(lambda *_: calls.append(1))
    inner = next(m for m in model.get_submodule(attachment.layers[1]).modules() if isinstance(m, torch.nn.Linear))
    inner.register_forward_hook(lambda *_: calls.append("inner"))
    for checkpointing in (False, True):
        if checkpointing:
            enable_checkpointing(model, use_reentrant=reentrant)
        model.zero_grad()
        run(model, make_inputs(model)).square().sum().backward()
        gradients.append([p.grad.clone() for p in attachment.parameters() if p.grad is not None])
    assert calls.count("inner") == 3  # once without checkpointing, twice with it
    assert len(gradients[0]) == len(gradients[1]) >= 4
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(checkpointed, plain, rtol=1e-4, atol=1e-4)


def test_a_compiled_model_follows_the_skips():
    torch._dynamo.reset()
    model, attachment = attached("bert")
    randomize(attachment)
    inputs = make_inputs(model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for skip in ([], [1], [0, 2]):
        attachment.skip(skip)
        torch.testing.assert_close(compiled(**inputs).last_hidden_state, run(model, inputs))


def test_output_attentions_of_a_skipped_vilt_layer():
    model, attachment = attached("vilt")
    attachment.skip([1])
    output = model(**make_inputs(model), output_attentions=True, output_hidden_states=True)
    assert [attentions is None for attentions in output.attentions] == [False, True, False]
    assert len(output.hidden_states) == LAYERS + 1


def test_the_report_tells_which_layers_run():
    _, attachment = attached("vilt")
    attachment.skip([1])
    rows = {row.layer: row for row in attachment.report(tokens=10).rows}
    assert rows["vilt.encoder.layer.0.bypass"].reason == "its layer is not skipped"
    assert rows["vilt.encoder.layer.1.adapter"].reason == "its layer is skipped"
    assert rows["vilt.encoder.layer.1.bypass"].macs == 2 * 10 * DIM * 8
    assert rows["vilt.encoder.layer.1.output.adapter"].macs == 0
    assert attachment.report(tokens=10).macs == 3 * 2 * 10 * DIM * 8


def test_what_each_layer_costs_and_its_bypass_saves():
    model, attachment = attached("meter")
    inputs = make_inputs(model, batch=1)
    attachment.skip([4])
    report = attachment.report(inputs=inputs)
    costs = report.layer_costs
    assert report.all_macs == round(costs.ratio([4]) * costs.backbone)
    assert attachment.skipped == (4,) and costs == attachment.layer_costs(inputs)
    assert tuple(costs.layers) == attachment.layers
    with attachment.disable():
        assert costs.backbone == count_macs(model, inputs).total
    for skipped in ([], [1], [0, 3, 5], range(6)):
        attachment.skip(skipped)
        assert count_macs(model, inputs).total == round(costs.ratio(skipped) * costs.backbone)
    text, image = (costs.layers[name][1] for name in (attachment.layers[0], attachment.layers[3]))
    assert (text, image) == (2 * 6 * DIM * 12, 2 * tiny_meter.IMAGE_TOKENS * DIM * 12)
    total = report.all_macs
    assert f"{total:,} in all, {total / costs.backbone:.2%} of the backbone's" in str(report)
    assert "layer that can be skipped" in str(report) and f"{costs.savings[0]:,}" in str(report)
    attachment.remove_skipped()
    removed = attachment.report(inputs=inputs)
    assert removed.layer_costs is None and removed.backbone_macs is None and removed.macs > 0
    with pytest.raises(RuntimeError, match="removed for good"):
        attachment.layer_costs(inputs)
