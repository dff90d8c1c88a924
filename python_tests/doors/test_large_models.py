"""Attaching to models that are loaded as large ones are: with hooks that move tensors, or with quantized weights."""

import pytest
import tiny_vilt
import torch
import torch.nn.functional as F
from accelerate import dispatch_model
from peft import get_peft_model
from tiny_families import make_inputs, make_model, run
from torch import nn
from transformers import ViltForQuestionAnswering

import petl_ext.peft
from petl_ext import AdapterConfig, APTConfig, DASConfig

CONFIGS = [APTConfig(num_prompts=5, rank=2), AdapterConfig(bottleneck=6), DASConfig(bottleneck=6, skip=[1])]
configs = pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.row)


@configs
def test_layers_attached_after_from_pretrained_start_as_on_a_new_model(config, tmp_path):
    """transformers loads into uninitialized memory, and knows nothing of the layers."""
    new = tiny_vilt.make_model()
    new.save_pretrained(tmp_path)
    loaded = ViltForQuestionAnswering.from_pretrained(tmp_path)
    parameters = []
    for model in (new, loaded):
        torch.manual_seed(3)
        parameters.append(dict(petl_ext.attach(model, config).named_parameters()))
    assert parameters[0].keys() == parameters[1].keys()
    for name, parameter in parameters[0].items():
        assert torch.equal(parameter, parameters[1][name]), name


@configs
@pytest.mark.parametrize("family", ["bert", "llama"])
def test_hooks_of_a_device_map_stay_and_the_layers_run(family, config):
    expected, found = make_model(family), make_model(family)
    dispatch_model(found, {"": "cpu"}, force_hooks=True)
    inputs = make_inputs(expected)
    hooked = [name for name, module in found.named_modules() if hasattr(module, "_hf_hook")]
    attachments = []
    for model in (expected, found):
        torch.manual_seed(3)
        attachments.append(petl_ext.attach(model, config))
        tiny_vilt.randomize(attachments[-1])
    bare = make_model(family)
    with torch.no_grad():
        assert torch.equal(run(found, inputs), run(expected, inputs))
        assert not torch.equal(run(found, inputs), run(bare, inputs))
        with attachments[1].disable():
            assert torch.equal(run(found, inputs), run(bare, inputs))
        attachments[1].detach()
        assert torch.equal(run(found, inputs), run(bare, inputs))
    assert hooked == [name for name, module in found.named_modules() if hasattr(module, "_hf_hook")]


class PackedLinear(nn.Linear):
    """Keeps 8 bits per weight, packed two and two as bitsandbytes packs four bits: neither dtype nor shape tell."""

    def __init__(self, linear):
        super().__init__(linear.in_features, linear.out_features)
        self.scale = linear.weight.detach().abs().max() / 127
        packed = (linear.weight.detach() / self.scale).round().to(torch.int8).view(-1, 1)
        self.weight = nn.Parameter(packed.view(torch.uint8), requires_grad=False)
        self.bias = linear.bias

    def forward(self, x):
        weight = self.weight.view(torch.int8).view(self.out_features, self.in_features) * self.scale
        return F.linear(x, weight.to(x.dtype), self.bias)


class Float8Linear(nn.Linear):
    """Keeps its weights as 8-bit floats, which torch counts as floating-point numbers but cannot calculate with."""

    def __init__(self, linear):
        super().__init__(linear.in_features, linear.out_features)
        self.weight = nn.Parameter(linear.weight.detach().to(torch.float8_e4m3fn), requires_grad=False)
        self.bias = linear.bias

    def forward(self, x):
        return F.linear(x, self.weight.to(x.dtype), self.bias)


def quantize(model, linear=PackedLinear):
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child) is nn.Linear:
                setattr(module, name, linear(child))
    return model


@configs
@pytest.mark.parametrize("family", ["bert", "llama"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("linear", [PackedLinear, Float8Linear])
def test_quantized_layers_stay_and_what_is_attached_trains(linear, family, config, dtype):
    model = quantize(make_model(family).to(dtype), linear)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    attachment = petl_ext.attach(model, config)
    assert {parameter.dtype for parameter in attachment.parameters()} == {dtype}
    run(model, make_inputs(model)).square().mean().backward()
    gradients = [parameter.grad for parameter in attachment.parameters() if parameter.grad is not None]
    assert any(gradient.any() for gradient in gradients) and all(gradient.isfinite().all() for gradient in gradients)
    attachment.detach()
    after = model.state_dict()
    assert before.keys() == after.keys()
    for name, tensor in before.items():  # equal is not implemented for 8-bit floats
        assert torch.equal(after[name].to(torch.float32), tensor.to(torch.float32)), name


def test_peft_puts_apt_beside_quantized_layers():
    model = quantize(make_model("llama").bfloat16())
    inputs = make_inputs(model)
    with torch.no_grad():
        bare = run(model, inputs)
    model = get_peft_model(model, petl_ext.peft.APTConfig(num_prompts=5, rank=2))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    run(model, inputs).square().mean().backward()
    assert trained and all(parameter.grad.any() for parameter in trained)
    with torch.no_grad(), model.disable_adapter():
        assert torch.equal(run(model, inputs), bare)
