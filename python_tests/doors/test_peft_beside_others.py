"""APT as a method of PEFT in the models of other libraries, beside LoRA, and under their hooks."""

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_submodules
from diffusers import UNet2DConditionModel
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from peft_checks import LAYERS, SIZES, close, make, outputs, randomize, state
from refusals import needs_add_adapter
from tiny_families import make_inputs, make_model, run
from transformers.models.vilt.modeling_vilt import ViltSelfOutput

import petl_ext
from petl_ext.peft import APTConfig, APTTunerLayer, load_adapter, save_adapter


@needs_add_adapter
def test_transformers_own_methods(tmp_path):
    model = make_model("clip_vision_model", LAYERS)
    inputs = make_inputs(model)
    before = outputs(model, inputs)
    model.add_adapter(APTConfig(**SIZES))
    model.add_adapter(APTConfig(**SIZES), "second")
    randomize(model)
    second = outputs(model, inputs)
    model.disable_adapters()
    assert torch.equal(outputs(model, inputs), before)
    model.enable_adapters()
    model.set_adapter("default")
    assert not close(outputs(model, inputs), second)
    model.set_adapter("second")
    model.save_pretrained(tmp_path)
    loaded = make_model("clip_vision_model", LAYERS)
    loaded.load_adapter(tmp_path, "third")
    assert close(outputs(loaded, inputs), second)
    as_peft = PeftModel.from_pretrained(make_model("clip_vision_model", LAYERS), tmp_path)
    assert close(outputs(as_peft, inputs), second)
    model.set_adapter("default")
    model.delete_adapter("second")


def test_unet(tmp_path):
    unet = make_model("unet", 1)
    inputs = make_inputs(unet)
    before = outputs(unet, inputs)
    unet.add_adapter(APTConfig(**SIZES, target_modules=["attn1"]), "style")
    randomize(unet)
    after = outputs(unet, inputs)
    assert not close(after, before)
    unet.disable_adapters()
    assert torch.equal(outputs(unet, inputs), before)
    unet.enable_adapters()
    unet.set_attn_processor(unet.attn_processors)
    assert torch.equal(outputs(unet, inputs), after)
    save_adapter(unet, tmp_path, "style")
    loaded = make_model("unet", 1)
    load_adapter(loaded, tmp_path, "other")
    assert close(outputs(loaded, inputs), after)
    assert not any(p.requires_grad for name, p in loaded.named_parameters() if "petl_apt_" in name)
    loaded.disable_adapters()
    assert torch.equal(outputs(loaded, inputs), before)
    as_peft = PeftModel.from_pretrained(make_model("unet", 1), tmp_path)
    assert close(outputs(as_peft, inputs), after)
    assert isinstance(as_peft.unload(), UNet2DConditionModel)


def test_two_methods_on_one_site():
    attached = make_model("vilt", LAYERS)
    petl_ext.attach(attached, petl_ext.AdapterConfig(kind="parallel", bottleneck=4))
    before = state(attached)
    with pytest.raises(ValueError, match=r"attention.output already carries another method, ViltSelfOutput"):
        get_peft_model(attached, APTConfig(**SIZES))
    assert state(attached) == before
    for family in ("vilt", "llama"):
        tuned = make(family)
        with pytest.raises(ValueError, match=r"matches nothing|already has a child"):
            petl_ext.attach(tuned.base_model.model, petl_ext.APTConfig(**SIZES))
    patched = make_model("vilt", LAYERS)
    module = patched.vilt.encoder.layer[0].attention.output
    module.forward = module.forward
    with pytest.raises(ValueError, match="has a forward of its own"):
        get_peft_model(patched, APTConfig(**SIZES))


def test_lora_on_an_attached_model(tmp_path):
    """One way to have both: LoRA by PEFT on a model that carries APT by attach."""

    def both():
        model = make_model("vilt", LAYERS)
        petl_ext.attach(model, petl_ext.APTConfig(**SIZES))
        return model

    model = get_peft_model(both(), LoraConfig(target_modules=["query"], modules_to_save=["apt"]))
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert any("lora_A" in name for name in trained) and any(".apt.modules_to_save." in name for name in trained)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1
    inputs = make_inputs(model)
    expected = outputs(model, inputs)
    model.save_pretrained(tmp_path)
    assert close(outputs(PeftModel.from_pretrained(both(), tmp_path), inputs), expected)


@pytest.mark.parametrize(("family", "target"), [("vilt", "dense"), ("llama", "o_proj")])
def test_lora_in_the_same_model(family, target, tmp_path):
    """The other way: both injected, LoRA first, because PEFT looks for no targets inside of targets."""
    model = make_model(family, LAYERS)
    inject_adapter_in_model(LoraConfig(target_modules=[target]), model, "lora")
    inject_adapter_in_model(APTConfig(**SIZES), model, "prompts")
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    for layer in layers:
        layer.set_requires_grad(["lora", "prompts"])
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1
    inputs = make_inputs(model)
    expected = outputs(model, inputs)
    run(model, inputs).sum().backward()
    trained = [name for name, parameter in model.named_parameters() if parameter.grad is not None]
    assert len(trained) == sum(4 if isinstance(layer, APTTunerLayer) else 2 for layer in layers)
    for name in ("lora", "prompts"):
        save_adapter(model, tmp_path / name, name)
    loaded = make_model(family, LAYERS)
    for name in ("lora", "prompts"):
        load_adapter(loaded, tmp_path / name, name)
    assert close(outputs(loaded, inputs), expected)
    assert not any(parameter.requires_grad for parameter in loaded.parameters())


def test_hooks_of_accelerate_are_no_hindrance():
    model = make_model("vilt", LAYERS)
    inputs = make_inputs(model)
    before = outputs(model, inputs)
    for module in model.modules():
        if isinstance(module, torch.nn.Linear | ViltSelfOutput):
            add_hook_to_module(module, AlignDevicesHook("cpu"))
    tuned = get_peft_model(model, APTConfig(**SIZES))
    randomize(tuned)
    after = outputs(tuned, inputs)
    assert not close(after, before)
    remove_hook_from_submodules(tuned)
    assert torch.equal(outputs(tuned, inputs), after)
