"""What is known of model families: one record each, which says where every method goes in a model of that family."""

from dataclasses import dataclass

from torch import nn

from petl_ext.attaching.methods import CONFIGS
from petl_ext.attaching.methods.das import DeclaredTensorLayer, SkippableLayer
from petl_ext.attaching.patterns import check_patterns


@dataclass(frozen=True)
class Family:
    """A model family.

    Attributes:
        name: a Hugging Face `config.model_type`, or the name of a class of models without one; None for `NO_FAMILY`.
        sites: {method: where it goes}, the method being the `row` of its configuration. Regular expressions over the
            dotted names of the method's candidate sites, matched from a dot or from the start to the end of the name;
            several stand in a tuple in the order in which their sites are numbered. DAS has two rows: "bypass" for the
            layers that can be skipped, "das_adapter" for the adapters in them.
        skippable: what a layer becomes that can be skipped. The default takes those that are declared to return one
            tensor; `SkippableLayer` trusts that they do; where they return more, it is a subclass of that.
    """

    name: str | None
    sites: dict
    skippable: type = DeclaredTensorLayer

    def patterns(self, method):
        """The regular expressions of a method, none where the family has no sites for it."""
        found = self.sites.get(method, ())
        return (found,) if isinstance(found, str) else tuple(found)


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
    def rewire(stack, numbered, slot_types):
        SkippableLayer.rewire(stack, numbered, slot_types)
        owner, *others = (block.layer[0].SelfAttention for block in stack)
        for attention in others:
            attention.has_relative_attention_bias = False
            vars(attention).pop("relative_attention_bias", None)
        running = (block for block in stack if not getattr(block, "skipped", False))
        first = next(running, stack[0]).layer[0].SelfAttention
        if first is not owner:
            first.has_relative_attention_bias = True
            vars(first)["relative_attention_bias"] = owner.relative_attention_bias


_LAYER = r"encoder\.layer\.\d+"
_BERT = {
    "apt": rf"{_LAYER}\.(cross)?attention\.output",
    "sequential_adapter": rf"{_LAYER}\.((cross)?attention\.)?output",
    "parallel_adapter": rf"{_LAYER}\.(cross)?attention\.output",
    "bypass": _LAYER,
    "das_adapter": rf"{_LAYER}\.((cross)?attention\.)?output",
}
_FUSION = r"cross_modal_(text|image)_layers\.\d+"
_CLIP = {
    "apt": r"encoder\.layers\.\d+\.self_attn",
    "sequential_adapter": r"encoder\.layers\.\d+\.(self_attn|mlp)",
    "parallel_adapter": r"encoder\.layers\.\d+\.self_attn",
    "bypass": r"encoder\.layers\.\d+",
}
_T5_BLOCK = r"(encoder|decoder)\.block\.\d+"
_UNET_BLOCK = r"transformer_blocks\.\d+"

_KNOWN = (
    Family(
        "vilt",
        {
            "apt": rf"{_LAYER}\.attention\.output",
            "deep_prompts": rf"{_LAYER}\.attention\.attention",
            "sequential_adapter": rf"{_LAYER}\.(attention\.)?output",
            "parallel_adapter": rf"{_LAYER}\.attention\.output",
            "bypass": _LAYER,
            "das_adapter": rf"{_LAYER}(\.output)?",
            "class_token": r"embeddings\.text_embeddings",
        },
        skippable=SkippableViltLayer,
    ),
    Family(
        "meter",
        {
            **{method: pattern.replace(_LAYER, _FUSION) for method, pattern in _BERT.items()},
            "bypass": (r"cross_modal_text_layers\.\d+", r"cross_modal_image_layers\.\d+"),
            "class_token": "cross_modal_text_transform",
        },
        skippable=SkippableLayer,
    ),
    Family("bert", _BERT, SkippableLayer),
    Family("roberta", _BERT, SkippableLayer),
    Family("clip", _CLIP, SkippableLayer),
    Family("clip_text_model", _CLIP, SkippableLayer),
    Family("clip_vision_model", _CLIP, SkippableLayer),
    Family(
        "t5",
        {
            "apt": rf"{_T5_BLOCK}\.layer\.\d\.(SelfAttention|EncDecAttention)",
            "sequential_adapter": rf"{_T5_BLOCK}\.layer\.\d\.(SelfAttention|EncDecAttention|DenseReluDense)",
            "parallel_adapter": rf"{_T5_BLOCK}\.layer\.\d\.(SelfAttention|EncDecAttention)",
            "bypass": _T5_BLOCK,
        },
        skippable=SkippableT5Block,
    ),
    Family(
        "llama",
        {
            "apt": r"layers\.\d+\.self_attn",
            "sequential_adapter": r"layers\.\d+\.(self_attn|mlp)",
            "parallel_adapter": r"layers\.\d+\.self_attn",
            "bypass": r"layers\.\d+",
        },
        skippable=SkippableLlamaLayer,
    ),
    Family(
        "UNet2DConditionModel",
        {
            "apt": rf"{_UNET_BLOCK}\.attn[12]",
            "sequential_adapter": rf"{_UNET_BLOCK}\.(attn[12]|ff)",
            "parallel_adapter": rf"{_UNET_BLOCK}\.attn[12]",
        },
    ),
)

FAMILIES = {family.name: family for family in _KNOWN}
NO_FAMILY = Family(None, {})


def register_family(family):
    """Adds a `Family` to those that `attach` and petl_ext.peft know.

    Raises:
        TypeError: it is no `Family`.
        ValueError: one of this name is known, or its sites name no method or hold no regular expression.
    """
    if not isinstance(family, Family):
        raise TypeError(f"register_family: family must be a Family, got {type(family).__name__}")
    if not isinstance(family.name, str) or family.name in FAMILIES:
        raise ValueError(f"register_family: name must be one that no family has, got {family.name!r}")
    methods = [method for config in CONFIGS.values() for method in config.site_classes]
    for method in family.sites:
        if method not in methods:
            raise ValueError(f"register_family: sites must be for methods of {', '.join(methods)}, got {method!r}")
        check_patterns("register_family", family.patterns(method))
    FAMILIES[family.name] = family


def family_of(model):
    """The one `Family` that `model` or all outermost models inside it belong to, or `NO_FAMILY`.

    A METER contains a RoBERTa, and is a METER. A Grounding DINO contains a BERT, but is of no family: layers would go
    into a part of it.
    """
    found = {}
    for name, module in model.named_modules():
        family = _own_family(module)
        if (family or _model_type(module)) and not any(f"{name}.".startswith(outer) for outer in found):
            found[f"{name}." if name else ""] = family
    families = set(found.values())
    return FAMILIES.get(families.pop(), NO_FAMILY) if len(families) == 1 else NO_FAMILY


def _own_family(module):
    names = (_model_type(module), *(its_class.__name__ for its_class in type(module).__mro__))
    return next((name for name in names if name in FAMILIES), None)


def _model_type(module):
    return getattr(getattr(module, "config", None), "model_type", None)
