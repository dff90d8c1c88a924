"""Layers that can be skipped: a bypass adapter takes the place of the whole layer (DAS, arXiv 2309.01479).

Whether a layer is skipped is a plain attribute, so it can change from step to step. A skipped layer must still return
what its model expects, and what other layers take from it must reach them: `SkippableLayer.rewire` sees to that.
"""

import inspect
from collections import Counter

import torch
from torch import nn

from petl_ext.attaching.methods.adapter import AdapterSite
from petl_ext.attaching.sites.site import location_beside, width_of


class SkippableLayer(AdapterSite):
    """A layer that takes hidden states [..., D] first and returns a tensor of that shape.

    Attributes:
        skipped: whether the child `bypass` takes the layer's place.
        own_norm: dotted name, inside the layer, of the norm before the bypass; None where the bypass has its own.
        survivors: dotted names of modules that a skipped layer still needs.
    """

    child = "bypass"
    looked_for = "layers (modules of a ModuleList whose forward takes hidden_states first)"
    skipped = False
    own_norm = None
    survivors = ()

    @classmethod
    def candidates(cls, model):
        return {
            f"{name}.{index}".lstrip("."): layer
            for name, layers in model.named_modules()
            if isinstance(layers, nn.ModuleList)
            for index, layer in layers.named_children()
            if cls.fits(layer)
        }

    @staticmethod
    def fits(layer):
        return _arguments(layer)[:1] == ["hidden_states"]

    @staticmethod
    def neighbour(module):
        """The norm whose width most of the layer's matrices have: norms of single heads are narrower."""
        norms = [inner for inner in module.modules() if _is_norm(inner)]
        widths = Counter(size for p in module.parameters() if p.dim() == 2 for size in p.shape)
        # The shapes of quantised weights may be others.
        linear = [inner for inner in module.modules() if hasattr(inner, "out_features")]
        widths.update(size for inner in linear for size in (inner.in_features, inner.out_features))
        if not norms:
            raise ValueError(f"{type(module).__name__} holds no norm that would tell how wide its bypass must be")
        return max(norms, key=lambda norm: widths[width_of(norm)])

    @classmethod
    def new_layer(cls, config, model, place):
        neighbour = cls.neighbour(model.get_submodule(place.name))
        size = {"dim": width_of(neighbour), "lost": place.lost}
        location = location_beside(neighbour, model)
        return config.new_bypass(**size, own_norm=cls.own_norm is not None, **location)

    def forward(self, hidden_states, *arguments, **named):
        if not self.skipped:
            return super().forward(hidden_states, *arguments, **named)
        normed = hidden_states if self.own_norm is None else self.get_submodule(self.own_norm)(hidden_states)
        return self.returned(self.bypass(normed, residual=hidden_states), *arguments, **named)

    def returned(self, hidden_states, *arguments, **named):
        """What the model expects of the layer: `hidden_states`, and perhaps more, from the layer's other arguments."""
        return hidden_states

    @staticmethod
    def rewire(stack, numbered, kinds):
        """Called with all layers of one stack, the `numbered_modules` of each and its `layer_kinds`, after the set of
        skipped ones has changed.

        A key-value cache takes its length from layer 0, so a decoder whose first layer is skipped would believe the
        cache to be empty and give every token the position 0: the layers that run are numbered anew, each with the next
        slot of its own kind.
        """
        slots = {kind: iter([slot for slot, its in enumerate(kinds) if its == kind]) for kind in kinds}
        for layer, modules, kind in zip(stack, numbered, kinds, strict=True):
            if getattr(layer, "skipped", False):
                continue
            slot = next(slots[kind])
            for module in modules:
                module.layer_idx = slot


class DeclaredTensorLayer(SkippableLayer):
    """A layer of a model that is in no table, which must say what it returns: where a model expects a tuple, a tensor
    in its place can be taken apart sample by sample, without an error."""

    looked_for = (
        "layers (modules of a ModuleList whose forward takes hidden_states first and is declared -> torch.Tensor)"
    )

    @staticmethod
    def fits(layer):
        returned = inspect.signature(type(layer).forward).return_annotation
        return SkippableLayer.fits(layer) and returned in (torch.Tensor, "torch.Tensor", "Tensor")


class SkippableViltLayer(SkippableLayer):
    """ViLT's layer returns a tuple; a skipped one has no attentions."""

    def returned(self, hidden_states, attention_mask=None, output_attentions=False):
        return (hidden_states, None) if output_attentions else (hidden_states,)


class SkippableLlamaLayer(SkippableLayer):
    """A pre-RMSNorm layer, whose bypass keeps the layer's first norm, as the authors' code for LLaMA does."""

    own_norm = "input_layernorm"
    survivors = ("input_layernorm",)


class SkippableT5Block(SkippableLayer):
    """T5's block returns its position biases too, which block 0 computes for all.

    Where block 0 is skipped, the first block that runs is lent the table of block 0: without one it would make the
    biases zero. The table stays block 0's in the state dict.
    """

    own_norm = "layer.0.layer_norm"
    survivors = ("layer.0.layer_norm", "layer.0.SelfAttention.relative_attention_bias")

    @staticmethod
    def fits(layer):
        return isinstance(getattr(layer, "layer", None), nn.ModuleList) and hasattr(layer.layer[0], "SelfAttention")

    def returned(
        self,
        hidden_states,
        attention_mask=None,
        position_bias=None,
        encoder_hidden_states=None,
        encoder_attention_mask=None,
        encoder_decoder_position_bias=None,
        **named,
    ):
        return hidden_states, position_bias, encoder_decoder_position_bias

    @staticmethod
    def rewire(stack, numbered, kinds):
        SkippableLayer.rewire(stack, numbered, kinds)
        owner, *others = (block.layer[0].SelfAttention for block in stack)
        for attention in others:
            attention.has_relative_attention_bias = False
            vars(attention).pop("relative_attention_bias", None)
        running = (block for block in stack if not getattr(block, "skipped", False))
        first = next(running, stack[0]).layer[0].SelfAttention
        if first is not owner:
            first.has_relative_attention_bias = True
            vars(first)["relative_attention_bias"] = owner.relative_attention_bias


def numbered_modules(layer):
    """The modules of a layer that know its number in the stack."""
    return [module for module in layer.modules() if vars(module).get("layer_idx") is not None]


def layer_kinds(stack):
    """For each layer of a stack the kind of slot that it has in the model's cache, such as "sliding_attention"; None
    for all where the configuration names no kinds."""
    configs = (vars(module).get("config") for layer in stack for module in layer.modules())
    named = (getattr(config, "layer_types", None) for config in configs)
    kinds = next(filter(None, named), ())
    return tuple(kinds) if len(kinds) == len(stack) else (None,) * len(stack)


def strip(layer):
    """Deletes from a skipped layer all but the bypass and what a skipped layer still needs."""
    _keep_only(layer, (layer.child, *layer.survivors))


def _keep_only(module, names):
    """Deletes all children but those with one of the dotted `names` and what leads there."""
    for child in list(module._modules):
        below = [rest for head, _, rest in (name.partition(".") for name in names) if head == child]
        if not below:
            del module._modules[child]
        elif "" not in below:
            _keep_only(module._modules[child], below)


def _is_norm(module):
    weight = getattr(module, "weight", None)
    return isinstance(weight, torch.Tensor) and weight.dim() == 1


def _arguments(layer):
    _, *arguments = inspect.signature(type(layer).forward).parameters
    return arguments
