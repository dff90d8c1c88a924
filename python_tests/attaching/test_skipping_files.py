"""Skipped layers removed, saved, loaded and copied."""

import copy

import pytest
import torch
from safetensors.torch import load_file, save_file
from skipping_checks import attached, every_family, layer_indices
from tiny_families import make_inputs, make_model, run
from tiny_vilt import randomize, snapshot

import petl_ext
from petl_ext import DASConfig


@every_family
def test_removing_the_skipped_layers(family, tmp_path):
    model, attachment = attached(family)
    randomize(attachment)
    layers = [0, len(attachment.layers) - 1]
    attachment.skip(layers)
    inputs = make_inputs(model)
    expected, keys = run(model, inputs), set(model.state_dict())
    gone = [attachment.layers[index] for index in layers]
    size = sum(p.numel() for name, p in model.named_parameters() if not remains(name, gone))
    total = sum(p.numel() for p in model.parameters())
    attachment.remove_skipped()
    assert torch.equal(run(model, inputs), expected)
    assert set(model.state_dict()) == {name for name in keys if remains(name, gone)}
    assert sum(p.numel() for p in model.parameters()) == total - size
    assert attachment.config.permanent and attachment.skipped == tuple(layers)
    assert all(name in dict(model.named_parameters()) for name, _ in attachment.named_parameters())
    check_it_reloads(family, model, attachment, expected, tmp_path)
    for act in (
        lambda: attachment.skip([]),
        attachment.detach,
        attachment.remove_skipped,
        attachment.disable().__enter__,
    ):
        with pytest.raises(RuntimeError, match=r"the layers \[0, \d\] have been removed for good"):
            act()
    assert torch.equal(run(model, inputs), expected)


def remains(name, gone):
    """Whether a tensor stays: bypasses of the layers that are gone, norms and tables that they still need, the rest."""
    layer = next((layer for layer in gone if name.startswith(f"{layer}.")), None)
    if layer is None:
        return ".bypass." not in name
    rest = name.removeprefix(f"{layer}.")
    return rest.startswith(("bypass.", "input_layernorm", "layer.0.layer_norm")) or "relative_attention_bias" in rest


def check_it_reloads(family, model, attachment, expected, folder):
    inputs = make_inputs(model)
    attachment.save(folder / "saved")
    fresh = make_model(family)
    loaded = petl_ext.load(fresh, folder / "saved")
    assert torch.equal(run(fresh, inputs), expected)
    assert loaded.config == attachment.config
    assert snapshot(fresh)[0] == snapshot(model)[0]
    torch.save(model, folder / "whole.pt")
    assert torch.equal(run(torch.load(folder / "whole.pt", weights_only=False), inputs), expected)
    assert torch.equal(run(copy.deepcopy(model), inputs), expected)
    other = make_model(family)
    petl_ext.attach(other, attachment.config)
    other.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(run(other, inputs), expected)


@pytest.mark.parametrize("family", ["bert", "t5", "llama"])
def test_a_folder_without_layers_that_does_not_fit_changes_nothing(family, tmp_path):
    attached(family, skip=[0], permanent=True)[1].save(tmp_path / "saved")
    weights = tmp_path / "saved" / "petl_weights.safetensors"
    tensors = load_file(weights)
    tensors.pop(next(iter(tensors)))
    save_file(tensors, weights)
    model = make_model(family)
    before, indices = snapshot(model), layer_indices(model)
    with pytest.raises(ValueError, match=r"does not fit the model, 1 differences: .*bypass.*: missing"):
        petl_ext.load(model, tmp_path / "saved")
    assert (snapshot(model), layer_indices(model)) == (before, indices)
    assert not any("skipped" in vars(module) for module in model.modules())
    assert petl_ext.attach(model, DASConfig(bottleneck=4)).skipped == ()


def test_saving_and_loading_while_disabled(tmp_path):
    model, attachment = attached("vilt")
    attachment.skip([1])
    with attachment.disable():
        attachment.save(tmp_path / "saved")
        assert attachment.skipped == (1,)
    fresh, other = attached("vilt")
    randomize(other)
    before = snapshot(fresh)
    with other.disable(), pytest.raises(RuntimeError, match="load: the attachment is disabled"):
        petl_ext.load(fresh, tmp_path / "saved")
    assert snapshot(fresh) == before
    assert petl_ext.load(fresh, tmp_path / "saved").skipped == (1,)
    assert torch.equal(run(fresh, make_inputs(fresh)), run(model, make_inputs(model)))


def test_loading_skips_that_there_are_not_changes_nothing(tmp_path):
    attached("vilt")[1].save(tmp_path / "saved")
    path = tmp_path / "saved" / "petl_config.json"
    path.write_text(path.read_text().replace('"skip": []', '"skip": [99]'))
    model, attachment = attached("vilt")
    randomize(attachment)
    before = snapshot(model)
    with pytest.raises(ValueError, match="must be indices below 3"):
        petl_ext.load(model, tmp_path / "saved")
    assert snapshot(model) == before


def test_a_detached_handle_says_so():
    model, attachment = attached("t5")
    attachment.skip([0])
    before = snapshot(make_model("t5"))
    with attachment.disable():
        attachment.detach()
    assert snapshot(model) == before
    assert not any("skipped" in vars(module) for module in model.modules())
    assert "skip=(0,)" in repr(attachment)
    for act in (lambda: attachment.skip([0]), attachment.report, attachment.remove_skipped):
        with pytest.raises(RuntimeError, match="has been detached from T5"):
            act()


def test_t5_lends_its_table_and_takes_it_back():
    model, attachment = attached("t5")
    attentions = [block.layer[0].SelfAttention for block in model.decoder.block]

    def owners():
        return [a.has_relative_attention_bias and hasattr(a, "relative_attention_bias") for a in attentions]

    for skip, expected in (([3], [True, True, False]), ([3, 4], [True, False, True]), ([], [True, False, False])):
        attachment.skip(skip)
        assert owners() == expected
        assert ["relative_attention_bias" in vars(a) for a in attentions] == [False, *expected[1:]]
        assert sum("relative_attention_bias" in name for name in model.state_dict()) == 2


@pytest.mark.parametrize("family", ["vilt", "t5"])
def test_what_is_skipped_is_saved_and_loaded(family, tmp_path):
    model, attachment = attached(family)
    randomize(attachment)
    attachment.skip([0, 2])
    attachment.save(tmp_path / "saved")
    fresh = make_model(family)
    assert petl_ext.load(fresh, tmp_path / "saved").skipped == (0, 2)
    inputs = make_inputs(model)
    assert torch.equal(run(fresh, inputs), run(model, inputs))
    again, other = attached(family)
    other.skip([1])
    assert petl_ext.load(again, tmp_path / "saved") is other and other.skipped == (0, 2)
    assert torch.equal(run(again, inputs), run(model, inputs))
    narrow, _ = attached(family, bottleneck=3)
    before = snapshot(narrow)
    with pytest.raises(ValueError, match="must hold the config that is attached"):
        petl_ext.load(narrow, tmp_path / "saved")
    assert snapshot(narrow) == before


@pytest.mark.parametrize("family", ["vilt", "meter", "t5", "llama"])
def test_copies_and_pickles_skip_on_their_own(family, tmp_path):
    model, attachment = attached(family)
    randomize(attachment)
    inputs, whole = make_inputs(model), run(model, make_inputs(model))
    attachment.skip([0])
    skipped = run(model, inputs)
    torch.save(model, tmp_path / "model.pt")
    for twin in (copy.deepcopy(model), torch.load(tmp_path / "model.pt", weights_only=False)):
        assert torch.equal(run(twin, inputs), skipped)
        twin.petl_attachment.skip([])
        assert torch.equal(run(twin, inputs), whole)
        assert torch.equal(run(model, inputs), skipped)
