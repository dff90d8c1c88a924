"""Models of two modalities: contrastive pairs, fusion encoders, and language models that see."""

from petl_ext.attaching.families.record import WHOLE, Family
from petl_ext.attaching.families.skippable import (
    SkippableFusionLayer,
    SkippableMllamaLayer,
    SkippableViltLayer,
)
from petl_ext.attaching.families.text import BERT, BERT_SITES, LAYER, LLAMA_SITES
from petl_ext.attaching.families.vision import CLIP_SITES
from petl_ext.attaching.methods.das import SkippableLayer

_PAIR = {"text": "text_model", "vision": "vision_model"}
_CROSS = r"cross_modal_(text|image)_layers\.\d+"
_VILT = {
    "apt": rf"{LAYER}\.attention\.output",
    "deep_prompts": rf"{LAYER}\.attention\.attention",
    "sequential_adapter": rf"{LAYER}\.(attention\.)?output",
    "parallel_adapter": rf"{LAYER}\.attention\.output",
    "bypass": LAYER,
    "das_adapter": rf"{LAYER}(\.output)?",
    "class_token": r"embeddings\.text_embeddings",
}
_METER = {
    **{method: pattern.replace(LAYER, _CROSS) for method, pattern in BERT_SITES.items()},
    "bypass": (r"cross_modal_text_layers\.\d+", r"cross_modal_image_layers\.\d+"),
    "class_token": "cross_modal_text_transform",
}
_BRIDGETOWER = {
    **{method: pattern.replace(LAYER, rf"({LAYER}|{_CROSS})") for method, pattern in BERT_SITES.items()},
    "bypass": (LAYER, *_METER["bypass"]),
}
_QFORMER = {
    method: pattern.replace("output", "output(_query)?") if "adapter" in method else pattern
    for method, pattern in BERT_SITES.items()
}
# Text as in BERT, images as in CLIP.
_CHINESE_CLIP = {method: (BERT_SITES[method], pattern) for method, pattern in CLIP_SITES.items()}
_MLLAMA_TEXT = {
    "apt": r"layers\.\d+\.(self_attn|cross_attn)",
    "sequential_adapter": r"layers\.\d+\.(self_attn|cross_attn|mlp)",
    "parallel_adapter": r"layers\.\d+\.(self_attn|cross_attn)",
    "bypass": LLAMA_SITES["bypass"],
}
_MLLAMA_VISION = {method: pattern.removeprefix(r"encoder\.") for method, pattern in CLIP_SITES.items()}

# Towers whose models are of families of their own; what a language model that sees is made of varies by checkpoint.
_VISION_TOWER = {"vision": "vision_tower", "language": "language_model"}
_VISION_MODEL = {"vision": "vision_model", "language": "text_model"}
_VISUAL = {"vision": "visual", "language": "language_model"}

FAMILIES = (
    Family("vilt", _VILT, SkippableViltLayer, {"fusion": WHOLE}),
    Family("meter", _METER, SkippableLayer, {"fusion": _CROSS}),
    Family(
        "bridgetower",
        _BRIDGETOWER,
        (SkippableLayer, SkippableFusionLayer),
        {"vision": "vision_model", "text": "text_model", "fusion": _CROSS},
        {"vision": "its attentions are torch.nn.MultiheadAttention, whose input the layers do not see"},
    ),
    *(Family(name, CLIP_SITES, SkippableLayer, _PAIR) for name in ("clip", "siglip", "siglip2", "metaclip_2")),
    Family("chinese_clip", _CHINESE_CLIP, SkippableLayer, _PAIR),
    *(Family(name, **BERT) for name in ("chinese_clip_text_model", "bridgetower_text_model", "blip_text_model")),
    Family("blip_2_qformer", _QFORMER, SkippableLayer, {"fusion": WHOLE}),
    Family("mllama_text_model", _MLLAMA_TEXT, SkippableMllamaLayer, {"language": WHOLE}),
    Family("mllama_vision_model", _MLLAMA_VISION, SkippableMllamaLayer, {"vision": WHOLE}),
    *(
        Family(name, towers=_VISION_TOWER)
        for name in ("llava", "llava_next", "llava_onevision", "paligemma", "gemma3", "gemma4", "internvl")
    ),
    *(Family(name, towers=_VISION_MODEL) for name in ("idefics3", "smolvlm")),
    *(Family(name, towers=_VISUAL) for name in ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_5")),
    Family("llama4", towers={"vision": "vision_model", "language": "language_model"}),
    Family("timm_wrapper", towers={"vision": "timm_model"}),
    Family("mllama", towers={"vision": "vision_model", "language": "language_model"}),
    Family("blip", towers={"vision": "vision_model", "text": "text_decoder|text_encoder|text_model"}),
    Family("blip-2", towers={"vision": "vision_model", "fusion": "qformer", "language": "language_model"}),
)
