"""Where each method goes in each model family: one line per family and placement.

A family is a Hugging Face `config.model_type`, or the name of a class of models without one. Its entries are regular
expressions over the dotted names of the placement's candidate sites, matched from a dot or from the start to the end of
the name; several stand in the order in which their sites are numbered.
"""

from petl_ext.attaching.methods.adapter import (
    ParallelAdapterOutput,
    ParallelAdapterProjection,
    ParallelAdapterSelfOutput,
    SequentialAdapterOutput,
    SequentialAdapterProjection,
    SequentialAdapterSelfOutput,
    StreamAdapterBlock,
    StreamAdapterSelfOutput,
)
from petl_ext.attaching.methods.apt import APTAttention, APTSelfOutput
from petl_ext.attaching.methods.class_token import EmbeddedClassToken, TransformedClassToken
from petl_ext.attaching.methods.deep_prompts import DeepPromptSelfAttention
from petl_ext.attaching.skippable import (
    DeclaredTensorLayer,
    SkippableLayer,
    SkippableLlamaLayer,
    SkippableT5Block,
    SkippableViltLayer,
)

# What a site can become, by placement (Config.placement); a pattern may match candidates of several.
SITE_CLASSES = {
    "apt": (APTSelfOutput, APTAttention),
    "deep_prompts": (DeepPromptSelfAttention,),
    "class_token": (EmbeddedClassToken, TransformedClassToken),
    "sequential_adapter": (SequentialAdapterSelfOutput, SequentialAdapterOutput, SequentialAdapterProjection),
    "parallel_adapter": (ParallelAdapterSelfOutput, ParallelAdapterOutput, ParallelAdapterProjection),
    "bypass": (DeclaredTensorLayer,),
    "das_adapter": (StreamAdapterBlock, StreamAdapterSelfOutput, ParallelAdapterOutput),
}

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

FAMILIES = {
    "vilt": {
        "apt": rf"{_LAYER}\.attention\.output",
        "deep_prompts": rf"{_LAYER}\.attention\.attention",
        "sequential_adapter": rf"{_LAYER}\.(attention\.)?output",
        "parallel_adapter": rf"{_LAYER}\.attention\.output",
        "bypass": _LAYER,
        "das_adapter": rf"{_LAYER}(\.output)?",
        "class_token": r"embeddings\.text_embeddings",
    },
    "meter": {
        **{placement: pattern.replace(_LAYER, _FUSION) for placement, pattern in _BERT.items()},
        "bypass": (r"cross_modal_text_layers\.\d+", r"cross_modal_image_layers\.\d+"),
        "class_token": "cross_modal_text_transform",
    },
    "bert": _BERT,
    "roberta": _BERT,
    "clip": _CLIP,
    "clip_text_model": _CLIP,
    "clip_vision_model": _CLIP,
    "t5": {
        "apt": rf"{_T5_BLOCK}\.layer\.\d\.(SelfAttention|EncDecAttention)",
        "sequential_adapter": rf"{_T5_BLOCK}\.layer\.\d\.(SelfAttention|EncDecAttention|DenseReluDense)",
        "parallel_adapter": rf"{_T5_BLOCK}\.layer\.\d\.(SelfAttention|EncDecAttention)",
        "bypass": _T5_BLOCK,
    },
    "llama": {
        "apt": r"layers\.\d+\.self_attn",
        "sequential_adapter": r"layers\.\d+\.(self_attn|mlp)",
        "parallel_adapter": r"layers\.\d+\.self_attn",
        "bypass": r"layers\.\d+",
    },
    "UNet2DConditionModel": {
        "apt": rf"{_UNET_BLOCK}\.attn[12]",
        "sequential_adapter": rf"{_UNET_BLOCK}\.(attn[12]|ff)",
        "parallel_adapter": rf"{_UNET_BLOCK}\.attn[12]",
    },
}


# What the layers of each family become that can be skipped; some return more than a tensor or bring their own norm.
_OF_THEIR_OWN = {"vilt": SkippableViltLayer, "llama": SkippableLlamaLayer, "t5": SkippableT5Block}
SKIPPABLE = {
    family: (_OF_THEIR_OWN.get(family, SkippableLayer),) for family, sites in FAMILIES.items() if "bypass" in sites
}


def family_of(model):
    """The name of the one family that `model` or all outermost models inside it belong to, or None.

    A METER contains a RoBERTa, and is a METER. A Grounding DINO contains a BERT, but is of no family: layers would go
    into a part of it.
    """
    found = {}
    for name, module in model.named_modules():
        family, model_type = _own_family(module), _model_type(module)
        if (family or model_type) and not any(f"{name}.".startswith(outer) for outer in found):
            found[f"{name}." if name else ""] = family
    families = set(found.values())
    return families.pop() if len(families) == 1 else None


def _own_family(module):
    names = (_model_type(module), *(its_class.__name__ for its_class in type(module).__mro__))
    return next((name for name in names if name in FAMILIES), None)


def _model_type(module):
    return getattr(getattr(module, "config", None), "model_type", None)
