"""Vision transformers, alone and as towers of other models."""

from petl_ext.attaching.families.record import WHOLE, Family
from petl_ext.attaching.families.skippable import (
    SkippableLlama4VisionLayer,
    SkippableTimmBlock,
    SkippableTupleLayer,
)
from petl_ext.attaching.methods.das import SkippableLayer

_LAYERS = r"layers?\.\d+"
VIT_SITES = {
    "apt": rf"{_LAYERS}\.attention(\.output)?",
    "sequential_adapter": rf"{_LAYERS}\.(attention(\.output)?|mlp)",
    "parallel_adapter": rf"{_LAYERS}\.attention(\.output)?",
    "bypass": _LAYERS,
}
VIT = {"sites": VIT_SITES, "skippable": SkippableLayer, "towers": {"vision": WHOLE}}

CLIP_SITES = {
    "apt": r"encoder\.layers\.\d+\.self_attn",
    "sequential_adapter": r"encoder\.layers\.\d+\.(self_attn|mlp)",
    "parallel_adapter": r"encoder\.layers\.\d+\.self_attn",
    "bypass": r"encoder\.layers\.\d+",
}
CLIP_VISION = {"sites": CLIP_SITES, "skippable": SkippableLayer, "towers": {"vision": WHOLE}}
CLIP_TEXT = CLIP_VISION | {"towers": {"text": WHOLE}}

_SWIN = {method: pattern.replace(_LAYERS, r"blocks\.\d+") for method, pattern in VIT_SITES.items()}
_BLOCK_SITES = {
    "apt": r"blocks\.\d+\.attn",
    "sequential_adapter": r"blocks\.\d+\.(attn|mlp)",
    "parallel_adapter": r"blocks\.\d+\.attn",
    "bypass": r"blocks\.\d+",
}
BLOCKS = {"sites": _BLOCK_SITES, "skippable": SkippableLayer, "towers": {"vision": WHOLE}}
_LLAMA4_SITES = {method: pattern.replace("encoder", "model") for method, pattern in CLIP_SITES.items()}

FAMILIES = (
    *(
        Family(name, **VIT)
        for name in ("vit", "deit", "dinov2", "dinov2_with_registers", "dinov3_vit", "beit", "internvl_vision")
    ),
    Family("swin", _SWIN, SkippableTupleLayer, {"vision": WHOLE}),
    *(
        Family(f"{name}_vision_model", **CLIP_VISION)
        for name in ("clip", "siglip", "siglip2", "metaclip_2", "chinese_clip", "blip", "blip_2")
    ),
    *(Family(name, **CLIP_VISION) for name in ("idefics3_vision", "smolvlm_vision", "gemma4_vision")),
    Family("llama4_vision_model", _LLAMA4_SITES, SkippableLlama4VisionLayer, {"vision": WHOLE}),
    *(Family(f"{name}_vision", **BLOCKS) for name in ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_5")),
    *(Family(f"{name}_text_model", **CLIP_TEXT) for name in ("clip", "siglip", "siglip2", "metaclip_2")),
    *(
        Family(f"timm.{name}", **BLOCKS | {"skippable": SkippableTimmBlock})
        for name in ("VisionTransformer", "Eva", "Beit")
    ),
)
