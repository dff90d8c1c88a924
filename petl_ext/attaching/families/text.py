"""Language models and text encoders."""

from petl_ext.attaching.families.record import WHOLE, Family
from petl_ext.attaching.families.skippable import (
    SkippableGemma4Layer,
    SkippableLlamaLayer,
    SkippableT5Block,
    SkippableTupleLayer,
    SkippableUMT5Block,
)
from petl_ext.attaching.methods.das import SkippableLayer

LAYER = r"encoder\.layer\.\d+"
BERT_SITES = {
    "apt": rf"{LAYER}\.(cross)?attention\.output",
    "sequential_adapter": rf"{LAYER}\.((cross)?attention\.)?output",
    "parallel_adapter": rf"{LAYER}\.(cross)?attention\.output",
    "bypass": LAYER,
    "das_adapter": rf"{LAYER}\.((cross)?attention\.)?output",
}
BERT = {"sites": BERT_SITES, "skippable": SkippableLayer, "towers": {"text": WHOLE}}

LLAMA_SITES = {
    "apt": r"layers\.\d+\.self_attn",
    "sequential_adapter": r"layers\.\d+\.(self_attn|mlp)",
    "parallel_adapter": r"layers\.\d+\.self_attn",
    "bypass": r"layers\.\d+",
}
LLAMA = {"sites": LLAMA_SITES, "skippable": SkippableLlamaLayer, "towers": {"language": WHOLE}}
_LLAMA4_SITES = LLAMA_SITES | {"sequential_adapter": r"layers\.\d+\.(self_attn|feed_forward)"}
_GEMMA4_SITES = LLAMA_SITES | {"sequential_adapter": r"layers\.\d+\.(self_attn|mlp|experts)"}

# Mixers of both kinds, attention and linear attention, in one list of layers.
HYBRID_SITES = LLAMA_SITES | {
    "apt": r"layers\.\d+\.(self_attn|linear_attn)",
    "sequential_adapter": r"layers\.\d+\.(self_attn|linear_attn|mlp)",
    "parallel_adapter": r"layers\.\d+\.(self_attn|linear_attn)",
}
HYBRID = LLAMA | {"sites": HYBRID_SITES}

_BLOCK = r"(encoder|decoder)\.block\.\d+"
T5_SITES = {
    "apt": rf"{_BLOCK}\.layer\.\d\.(SelfAttention|EncDecAttention)",
    "sequential_adapter": rf"{_BLOCK}\.layer\.\d\.(SelfAttention|EncDecAttention|DenseReluDense)",
    "parallel_adapter": rf"{_BLOCK}\.layer\.\d\.(SelfAttention|EncDecAttention)",
    "bypass": _BLOCK,
}
ENCODER_DECODER = {"encoder": "encoder", "decoder": "decoder"}
T5 = {"sites": T5_SITES, "skippable": SkippableT5Block, "towers": ENCODER_DECODER}

# An MLP's two projections stand in the layer itself, with its norms: behind them there is no place to name.
BART_SITES = {
    "apt": r"layers\.\d+\.(self_attn|encoder_attn)",
    "sequential_adapter": r"layers\.\d+\.(self_attn|encoder_attn)",
    "parallel_adapter": r"layers\.\d+\.(self_attn|encoder_attn)",
    "bypass": r"layers\.\d+",
}
BART = {
    "sites": BART_SITES,
    "skippable": SkippableLayer,
    "towers": ENCODER_DECODER,
    "limits": {"sequential_adapter": "behind attentions only: the MLPs are no modules of their own"},
}

_MODERNBERT = {
    "apt": r"layers\.\d+\.attn",
    "sequential_adapter": r"layers\.\d+\.(attn|mlp)",
    "parallel_adapter": r"layers\.\d+\.attn",
    "bypass": r"layers\.\d+",
}
_DISTILBERT = {
    "apt": r"layer\.\d+\.attention",
    "sequential_adapter": r"layer\.\d+\.(attention|ffn)",
    "parallel_adapter": r"layer\.\d+\.attention",
    "bypass": r"transformer\.layer\.\d+",
}

_CONV1D = dict.fromkeys(
    ("apt", "sequential_adapter", "parallel_adapter"),
    "its projections are Conv1D, whose weights lie the other way round, with dropout behind them",
)

FAMILIES = (
    *(Family(name, **BERT) for name in ("bert", "roberta", "xlm-roberta", "electra", "camembert")),
    Family("deberta-v2", BERT_SITES, SkippableTupleLayer, {"text": WHOLE}),
    Family("modernbert", _MODERNBERT, SkippableLayer, {"text": WHOLE}),
    Family("distilbert", _DISTILBERT, SkippableLayer, {"text": WHOLE}),
    *(
        Family(name, **LLAMA)
        for name in (
            *(
                "llama",
                "mistral",
                "ministral",
                "ministral3",
                "qwen2",
                "qwen3",
                "smollm3",
                "granite",
                "phi3",
                "glm",
                "glm4",
            ),
            *("gemma", "gemma2", "gemma3_text", "cohere", "cohere2"),
            *("mixtral", "qwen3_moe", "gpt_oss"),
            *("qwen2_vl_text", "qwen2_5_vl_text", "qwen3_vl_text"),
        )
    ),
    *(Family(name, LLAMA_SITES, SkippableLayer, {"language": WHOLE}) for name in ("olmo2", "olmo3")),
    Family("gemma4_text", _GEMMA4_SITES, SkippableGemma4Layer, {"language": WHOLE}),
    Family("llama4_text", _LLAMA4_SITES, SkippableLlamaLayer, {"language": WHOLE}),
    *(Family(name, **HYBRID) for name in ("qwen3_5_text", "qwen3_next")),
    Family("gpt2", {"bypass": r"h\.\d+"}, SkippableLayer, {"language": WHOLE}, _CONV1D),
    Family("opt", **BART | {"towers": {"language": WHOLE}}),
    *(Family(name, **T5) for name in ("t5", "mt5")),
    Family("umt5", T5_SITES, SkippableUMT5Block, ENCODER_DECODER),
    *(Family(name, **BART) for name in ("bart", "mbart", "whisper")),
)
