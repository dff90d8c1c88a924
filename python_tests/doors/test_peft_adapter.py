"""Bottleneck adapters as a method of PEFT, beside what test_peft.py says of APT."""

import copy

import modern_models
import pytest
import torch
from peft import PeftModel, get_peft_model, inject_adapter_in_model
from peft_checks import LAYERS, close, outputs, state
from tiny_families import make_inputs, make_model, run
from transformers import Trainer
from vilt_training import Questions, make_arguments

import petl_ext
from petl_ext.peft import AdapterConfig, AdapterTunerLayer, APTConfig, load_adapter, save_adapter
from petl_ext.peft.layer import TunerLayer

KINDS = ("sequential", "parallel")
OPTIONS = {"bottleneck": 6, "activation": "gelu"}
every_kind = pytest.mark.parametrize("kind", KINDS)


def make(family="vilt", **changes):
    return get_peft_model(make_model(family, LAYERS), AdapterConfig(**OPTIONS | changes))


def randomize(model):
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "petl_adapter_" in name:
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator)


@every_kind
@pytest.mark.parametrize("family", ["vilt", "bert", "clip", "t5", "llama", "unet"])
def test_every_form_of_target(family, kind, tmp_path):
    model = make_model(family, 1)
    inputs, keys, before = make_inputs(model), list(model.state_dict()), outputs(model, make_inputs(model))
    tuned = get_peft_model(model, AdapterConfig(kind=kind, **OPTIONS))
    randomize(tuned)
    after = outputs(tuned, inputs)
    assert not close(after, before)
    run(tuned.train(), inputs).square().sum().backward()
    assert all((p.grad is not None) == p.requires_grad for p in tuned.parameters())
    assert all("petl_adapter_" in name for name, p in tuned.named_parameters() if p.requires_grad)
    tuned.zero_grad()
    with tuned.disable_adapter():
        assert torch.equal(outputs(tuned, inputs), before)
    assert torch.equal(outputs(copy.deepcopy(tuned), inputs), after)
    tuned.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make_model(family, 1), tmp_path, adapter_name="other")
    assert close(outputs(loaded, inputs), after)
    assert "KeyError: 'PETL_ADAPTER'" in (tmp_path / "README.md").read_text(encoding="utf-8")
    backbone = tuned.unload()
    assert list(backbone.state_dict()) == keys
    assert torch.equal(outputs(backbone, inputs), before)


@every_kind
@pytest.mark.parametrize("family", ["vilt", "bert", "clip", "llama"])
def test_same_as_attached(family, kind):
    """`petl_ext.attach` puts the same layers into the same places."""
    attached, tuned = make_model(family, LAYERS), make(family, kind=kind, trainable_scale=True)
    inputs = make_inputs(attached)
    attachment = petl_ext.attach(attached, petl_ext.AdapterConfig(kind, **OPTIONS, trainable_scale=True))
    randomize(tuned)
    with torch.no_grad():
        for name in attachment.sites:
            layer = tuned.base_model.model.get_submodule(name)
            for part, parameter in attached.get_submodule(f"{name}.adapter").named_parameters():
                parameter.copy_(layer.petl_tensor(part, "default"))
    assert close(outputs(tuned, inputs), outputs(attached, inputs))


@every_kind
def test_several_adapters_that_are_active_at_once_add_one_after_the_other(kind):
    model = make(kind=kind)
    inputs = make_inputs(model)
    model.add_adapter("second", AdapterConfig(kind=kind, bottleneck=3, layer_norm=True, trainable_scale=True))
    randomize(model)
    first = outputs(model, inputs)
    model.set_adapter("second")
    assert all(".second" in name for name, p in model.named_parameters() if p.requires_grad)
    second = outputs(model, inputs)
    assert not close(first, second)
    model.base_model.set_adapter(["default", "second"])
    layer = next(module for module in model.modules() if isinstance(module, AdapterTunerLayer))
    x = torch.randn(2, 3, 32)
    given = {"residual": torch.randn(2, 3, 32)} if kind == "parallel" else {}
    both = layer.adapter(x, **given)
    model.set_adapter("default")
    one = layer.adapter(x, **given)
    model.set_adapter("second")
    torch.testing.assert_close(layer.adapter(x, residual=one) if given else layer.adapter(one), both)
    assert torch.equal(outputs(model, inputs), second)
    model.set_adapter("default")
    model.delete_adapter("second")
    assert torch.equal(outputs(model, inputs), first)


def test_a_target_has_adapters_of_one_kind():
    model = make()
    before = state(model)
    with pytest.raises(ValueError, match=r"attention\.output carries adapters of another kind than 'parallel_adapter'"):
        model.add_adapter("second", AdapterConfig(kind="parallel", **OPTIONS))
    assert state(model) == before
    with pytest.raises(ValueError, match="already carries another method, APTTunerLayer"):
        inject_adapter_in_model(AdapterConfig(), inject_adapter_in_model(APTConfig(), make_model("vilt", LAYERS)), "b")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "beside"}, 'kind must be "sequential" or "parallel", got \'beside\''),
        ({"bottleneck": 0}, "bottleneck must be a positive integer, got 0"),
        ({"layers_pattern": "layer"}, "AdapterConfig: layers_pattern has no meaning without layers_to_transform"),
    ],
)
def test_a_wrong_configuration(changes, message):
    with pytest.raises(ValueError, match=message):
        AdapterConfig(**changes)


@pytest.mark.parametrize(
    "name",
    [
        *("llava", "qwen3_5", "qwen2_vl", "siglip", "modernbert", "phi3", "mixtral", "gpt_oss", "llama4", "gemma4"),
        *("whisper", "deberta-v2", "swin", "blip-2", "mllama", "timm.Eva"),
    ],
)
def test_default_targets_are_those_of_attach(name):
    if modern_models.lacking(name):
        pytest.skip(modern_models.lacking(name))
    for ours, theirs in ((AdapterConfig(bottleneck=4), petl_ext.AdapterConfig()), (APTConfig(), petl_ext.APTConfig())):
        tuned = get_peft_model(modern_models.make(name), ours).base_model.model
        carrying = [target for target, module in tuned.named_modules() if isinstance(module, TunerLayer)]
        assert sorted(carrying) == sorted(petl_ext.attach(modern_models.make(name), theirs).sites)


def test_what_peft_would_take_in_part_is_refused():
    for config in (AdapterConfig(), APTConfig()):
        with pytest.raises(ValueError, match="GPT2LMHeadModel takes none: its projections are Conv1D"):
            inject_adapter_in_model(config, modern_models.make("gpt2"))
    with pytest.raises(ValueError, match=r"a tower without targets; give target_modules\. vision: its attentions are"):
        get_peft_model(modern_models.make("bridgetower"), AdapterConfig())
    with pytest.raises(ValueError, match="attn is a joint attention of two streams"):
        inject_adapter_in_model(APTConfig(), modern_models.make("SD3Transformer2DModel"))


def test_merging_is_refused():
    model = make()
    for merge in (model.merge_and_unload, model.merge_adapter):
        with pytest.raises(NotImplementedError, match=r"Adapters cannot be merged .* activation lies between"):
            merge()


def test_models_that_are_no_peft_model(tmp_path):
    unet, again = make_model("unet", 1), make_model("unet", 1)
    inputs = make_inputs(unet)
    unet.add_adapter(AdapterConfig(**OPTIONS, target_modules=["ff"]), "style")
    randomize(unet)
    save_adapter(unet, tmp_path / "style", "style")
    load_adapter(again, tmp_path / "style", "style")
    assert close(outputs(again, inputs), outputs(unet, inputs))
    again.disable_adapters()
    assert not close(outputs(again, inputs), outputs(unet, inputs))


def test_trainer_saves_and_resumes(tmp_path):
    def trained(folder, **resumed):
        torch.manual_seed(0)
        model = make(modules_to_save=["classifier"])
        arguments = make_arguments(folder, max_steps=4, save_strategy="steps", save_steps=2)
        Trainer(model, arguments, train_dataset=Questions(model)).train(**resumed)
        return model

    whole = trained(tmp_path / "whole")
    checkpoint = tmp_path / "whole" / "checkpoint-2"
    assert (checkpoint / "adapter_model.safetensors").exists() and not (checkpoint / "model.safetensors").exists()
    again = trained(tmp_path / "again", resume_from_checkpoint=str(checkpoint))
    assert close(outputs(again, make_inputs(again)), outputs(whole, make_inputs(whole)))
