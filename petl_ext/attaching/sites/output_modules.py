"""Finds the small modules `dense -> dropout -> (LayerNorm)` in which attentions and MLPs end: ViLT, BERT, METER.

By structure: transformers has some seventy such classes. Both take (hidden_states, input_tensor): what the attention or
MLP says and, for an attention, what it was given, for an MLP the residual.
"""

import inspect

import torch
from torch import nn

from petl_ext.attaching.sites.site import Site


class AttentionOutputSite(Site):
    """The output module of an attention, which adds the residual only where it ends in a LayerNorm."""

    @staticmethod
    def candidates(model):
        return attention_outputs(model)

    @classmethod
    def check(cls, module):
        _check_steps(module, adds_input=hasattr(module, "LayerNorm"))


class MLPOutputSite(Site):
    """The output module of an MLP, which adds the residual."""

    @staticmethod
    def candidates(model):
        return mlp_outputs(model)

    @classmethod
    def check(cls, module):
        _check_steps(module, adds_input=True)


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


class _Counted:
    """Stands for an output module whose parts multiply by primes, so that a result tells of every step."""

    def __init__(self, module):
        self._module = module

    def __getattr__(self, name):
        return getattr(self._module, name)

    @staticmethod
    def dense(x):
        return 2 * x

    @staticmethod
    def dropout(x):
        return 3 * x

    @staticmethod
    def LayerNorm(x):
        return 5 * x


def _check_steps(module, adds_input):
    """Sites compute the module's steps anew, so its own forward must have these and no others: RoBERTa-PreLayerNorm,
    for one, adds the residual without a LayerNorm."""
    hidden_states, input_tensor = torch.tensor([1.0, 100.0], dtype=torch.float64, device="cpu")
    has_norm = hasattr(module, "LayerNorm")
    expected = (6 * hidden_states + adds_input * input_tensor) * (5 if has_norm else 1)
    try:
        as_expected = bool(type(module).forward(_Counted(module), hidden_states, input_tensor) == expected)
    except Exception:  # whatever a forward does that is none of these steps
        as_expected = False
    if not as_expected:
        steps = ["dense", "dropout", *["the sum with input_tensor"] * adds_input, *["LayerNorm"] * has_norm]
        raise ValueError(f"the forward of {type(module).__name__} must be {', '.join(steps)}, and nothing else")


def _output_modules(model):
    for name, module in model.named_modules():
        for child in ("output", "output_query"):  # a Q-Former's queries have their own
            output = module._modules.get(child)
            if _takes_output_and_input(output):
                yield f"{name}.{child}".lstrip("."), output, list(module.children())


def _takes_output_and_input(module):
    if not isinstance(module, nn.Module) or not {"dense", "dropout"} <= dict(module.named_children()).keys():
        return False
    arguments = list(inspect.signature(type(module).forward).parameters)
    return arguments == ["self", "hidden_states", "input_tensor"]


def _is_self_attention(module):
    return any(all(hasattr(module, f"{part}{end}") for part in ("query", "key", "value")) for end in ("", "_proj"))
