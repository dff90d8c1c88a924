"""Layers of the models that people use under torch.compile, one for each kind of site."""

import modern_models
import pytest
import torch
from model_table import config_of
from tiny_vilt import randomize

import petl_ext

# What is special at the site: (model, method, the layer that is compiled, more inputs, what DAS skips).
CACHELESS = {"use_cache": False}
FORMS = {
    "fused qkv": ("phi3", "APT", "model.layers.1", CACHELESS),
    "Wqkv and dropout": ("modernbert", "sequential adapter", "model.layers.1", {}),
    "sinks": ("gpt_oss", "parallel adapter", "model.layers.1", CACHELESS),
    "linear attention": ("qwen3_5", "APT", "model.layers.0", CACHELESS),
    "mixture": ("mixtral", "sequential adapter", "model.layers.1", CACHELESS),
    "mixture and tuple": ("gpt_oss", "sequential adapter", "model.layers.1", CACHELESS),
    "clipped projections": ("gemma4", "sequential adapter", "model.vision_tower.encoder.layers.1", {}),
    "joint attention": ("SD3Transformer2DModel", "APT", "transformer_blocks.0", {}),
    "output module": ("blip-2", "parallel adapter", "qformer.encoder.layer.0", {}),
    "skipped": ("qwen3", "DAS", "model.layers.1", CACHELESS),
    "skipped, with a tuple": ("swin", "DAS", "swin.encoder.layers.1.blocks.1", {}),
}


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # torch 2.10
@pytest.mark.parametrize("form", FORMS)
def test_a_compiled_layer_gives_what_it_gives(form):
    name, method, layer_name, more = FORMS[form]
    if modern_models.lacking(name):
        pytest.skip(modern_models.lacking(name))
    model = modern_models.make(name)
    attachment = petl_ext.attach(model, config_of(method))
    randomize(attachment)
    if method == "DAS":
        attachment.skip([layer_name])
    layer = model.get_submodule(layer_name)
    arguments, named = inputs_of(layer, model, modern_models.make_inputs(name) | more)
    weights = [parameter for parameter in layer.parameters() if parameter.requires_grad]
    found = []
    for forward in (layer, torch.compile(layer, backend="aot_eager")):
        output = forward(*arguments, **named)
        tensors = [part for part in (output if isinstance(output, tuple) else (output,)) if part is not None]
        loss = sum(part.square().sum() for part in tensors)
        found.append([*tensors, *torch.autograd.grad(loss, weights, allow_unused=True)])
    assert sum(part is not None for part in found[0]) > len(tensors)
    torch.testing.assert_close(found[1], found[0])


def inputs_of(layer, model, inputs):
    """(arguments, keyword arguments) with which the model calls the layer."""
    calls = []
    with layer.register_forward_pre_hook(lambda _, *call: calls.append(call), with_kwargs=True), torch.no_grad():
        modern_models.run(model, inputs)
    return calls[0]
