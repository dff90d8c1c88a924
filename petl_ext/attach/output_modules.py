"""Finds the small modules `dense -> dropout -> (LayerNorm)` in which attentions and MLPs end: ViLT, BERT, METER.

By structure: transformers has some seventy such classes. Both take (hidden_states, input_tensor): what the attention or
MLP says and, for an attention, what it was given, for an MLP the residual.
"""

import inspect

from torch import nn


def attention_outputs(model):
    """{dotted name: module} of the output modules of attentions, which stand beside query, key and value."""
    return {
        name: module
        for name, module, siblings in _output_modules(model)
        if any(_is_self_attention(sibling) for sibling in siblings)
    }


def mlp_outputs(model):
    """{dotted name: module} of the output modules of MLPs, which stand beside `intermediate`."""
    return {
        name: module
        for name, module, siblings in _output_modules(model)
        if any(hasattr(sibling, "intermediate_act_fn") for sibling in siblings)
    }


def _output_modules(model):
    for name, module in model.named_modules():
        output = getattr(module, "output", None)
        if _takes_output_and_input(output):
            yield f"{name}.output".lstrip("."), output, list(module.children())


def _takes_output_and_input(module):
    if not isinstance(module, nn.Module) or not {"dense", "dropout"} <= dict(module.named_children()).keys():
        return False
    arguments = list(inspect.signature(type(module).forward).parameters)
    return arguments == ["self", "hidden_states", "input_tensor"]


def _is_self_attention(module):
    return all(hasattr(module, part) for part in ("query", "key", "value"))
