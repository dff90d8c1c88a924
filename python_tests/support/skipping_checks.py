"""Small models with skippable layers, and the same models without some of them."""

import pytest
import torch
from tiny_families import FAMILIES, LAYERS, make_model
from transformers_names import CACHE

import petl_ext
from petl_ext import DASConfig

every_family = pytest.mark.parametrize("family", FAMILIES)
SKIPS = ([0], [1], [0, 1], [LAYERS - 1])


def stacks(family):
    return FAMILIES[family].stacks or ("encoder.layers",)


def attached(family, **options):
    model = make_model(family)
    return model, petl_ext.attach(model, DASConfig(**{"bottleneck": 4} | options))


def without_layers(model, family, skipped):
    """The model made anew with fewer layers, and given the weights of those that remain."""
    kept = {stack: [i for i in range(LAYERS) if f"{stack}.{i}" not in skipped] for stack in stacks(family)}
    small = FAMILIES[family].make(*map(len, kept.values()))
    weights = model.state_dict()
    for stack, indices in kept.items():
        layers = {name: weights.pop(name) for name in list(weights) if name.startswith(f"{stack}.")}
        for new, old in enumerate(indices):
            for name in [name for name in layers if name.startswith(f"{stack}.{old}.")]:
                weights[name.replace(f"{stack}.{old}.", f"{stack}.{new}.")] = layers[name]
        table = f"{stack}.0.layer.0.SelfAttention.relative_attention_bias.weight"
        weights.update({name: layers[name] for name in layers if name == table})
    small.load_state_dict(
        {
            name: tensor
            for name, tensor in weights.items()
            if "relative_attention_bias" not in name or ".0.layer.0." in name
        }
    )
    return small


class Passing(torch.nn.Module):
    def forward(self, hidden_states, *arguments, **named):
        return hidden_states


def layer_indices(model):
    return {name: module.layer_idx for name, module in model.named_modules() if "layer_idx" in vars(module)}


def cache_error(model, given, decoded, words):
    """By how much the logits with a cache differ from those without, in units of the largest."""
    expected, cache, steps = model(**given, **{decoded: words}, use_cache=False).logits, None, []
    for step in (slice(0, 4), *(slice(index, index + 1) for index in range(4, words.size(1)))):
        output = model(**given, **{decoded: words[:, step], CACHE: cache}, use_cache=True)
        cache = output[CACHE]
        steps.append(output.logits)
    return (torch.cat(steps, 1) - expected).abs().max() / expected.abs().max()
