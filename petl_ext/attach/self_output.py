"""APT where an attention ends in a small module `dense -> dropout -> (LayerNorm)`: ViLT, BERT, RoBERTa, METER."""

import inspect

import torch
from torch import nn

from petl_ext.cost import apt_macs
from petl_ext.ops import cpu_path


class APTSelfOutput(nn.Module):
    """What an attention's output module becomes: its projection's result passes the child `apt` before the dropout.

    `forward(hidden_states, input_tensor)`: what the attention's heads say and what the attention was given, both
    [..., D]; returns [..., D]. Where there is a LayerNorm, it takes the sum with the residual, as in BERT.
    """

    child = "apt"
    looked_for = "attention output modules (dense, dropout, perhaps LayerNorm) beside a self-attention"

    @staticmethod
    def candidates(model):
        return {
            f"{name}.output".lstrip("."): module.output
            for name, module in model.named_modules()
            if _is_self_output(getattr(module, "output", None)) and any(map(_is_self_attention, module.children()))
        }

    @staticmethod
    def weight_of(site):
        return site.dense.weight

    @staticmethod
    def new_layer(config, model, name):
        weight = model.get_submodule(name).dense.weight
        return config.new_layer(weight.size(0), device=weight.device, dtype=weight.dtype)

    @staticmethod
    def macs(layer, tokens):
        num_prompts, dim = layer.prompts.shape
        return apt_macs(tokens, dim, num_prompts, layer.down.size(0))

    @staticmethod
    def kernel(layer):
        device = layer.prompts.device.type
        if layer.training and layer.dropout > 0:
            return "reference", f"dropout {layer.dropout} in training"
        if layer.prompts.dtype is torch.float64:
            return "reference", "float64"
        key = torch._C._dispatch_key_for_device(device)
        if not torch._C._dispatch_has_kernel_for_dispatch_key("petl_ext::apt_forward", key):
            return "none", f"this build holds no kernel for {device}"
        return f"apt ({device}, {cpu_path()})" if device == "cpu" else f"apt ({device})", ""

    def forward(self, hidden_states, input_tensor):
        hidden_states = self.dropout(self.apt(input_tensor, self.dense(hidden_states)))
        if hasattr(self, "LayerNorm"):
            hidden_states = self.LayerNorm(hidden_states + input_tensor)
        return hidden_states


def _is_self_output(module):
    """By structure: transformers has some seventy such classes. The MLP's output module looks the same, but it does
    not stand beside a self-attention."""
    if not isinstance(module, nn.Module) or not {"dense", "dropout"} <= dict(module.named_children()).keys():
        return False
    arguments = list(inspect.signature(type(module).forward).parameters)
    return arguments == ["self", "hidden_states", "input_tensor"]


def _is_self_attention(module):
    return all(hasattr(module, part) for part in ("query", "key", "value"))
