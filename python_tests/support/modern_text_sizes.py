"""Sizes and inputs of the tiny models of `modern_models`: {name: (class of configuration, of model, sizes, inputs)}."""

WORDS, DIM = 64, 32
IMAGE = WORDS - 4  # the token in whose places an image's features stand
TOKENS = ("words", 2, 6, 0)


def sizes(**changes):
    """Of a language model."""
    shared = {
        "hidden_size": DIM,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": WORDS,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return shared | changes


SLIDING, FULL, LINEAR, CHUNKED = (f"{name}_attention" for name in ("sliding", "full", "linear", "chunked"))
MIXED = {"sliding_window": 6, "layer_types": [SLIDING, FULL, SLIDING, FULL], "num_hidden_layers": 4}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
HEAD = {"head_dim": 8}
GEMMA4 = {"vocab_size_per_layer_input": WORDS, "hidden_size_per_layer_input": 8}
LLAMA4 = {
    "num_local_experts": 2,
    "num_experts_per_tok": 1,
    "intermediate_size_mlp": 48,
    "interleave_moe_layer_step": 2,
    "layer_types": [CHUNKED, FULL, CHUNKED, FULL],
    "num_hidden_layers": 4,
    **HEAD,
}
LINEAR_HEADS = {
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}


def decoder(name, **changes):
    """An entry of a causal language model, `name` being what its classes begin with."""
    config = changes.pop("config", f"{name}Config")
    return config, f"{name}ForCausalLM", sizes(**changes), {"input_ids": TOKENS}


def encoder(name, **changes):
    """An entry of a text classifier as BERT."""
    own = {
        key: value
        for key, value in sizes().items()
        if key not in ("num_key_value_heads", "bos_token_id", "eos_token_id")
    }
    return f"{name}Config", f"{name}ForSequenceClassification", own | changes, {"input_ids": TOKENS}


def encoder_decoder(name, **changes):
    widths = {"d_model": DIM, "vocab_size": WORDS, "pad_token_id": 0, "decoder_start_token_id": 0}
    inputs = {"input_ids": TOKENS, "decoder_input_ids": TOKENS}
    return f"{name}Config", f"{name}ForConditionalGeneration", widths | changes, inputs


T5 = {"d_kv": 8, "d_ff": 48, "num_layers": 3, "num_decoder_layers": 3, "num_heads": 4}
BART = {
    f"{half}_{key}": value
    for half in ("encoder", "decoder")
    for key, value in {"layers": 3, "attention_heads": 4, "ffn_dim": 48}.items()
}
AUDIO = {"max_source_positions": 16, "max_target_positions": 32, "num_mel_bins": 8, "suppress_tokens": None}

TEXT = {
    "llama": decoder("Llama"),
    "mistral": decoder("Mistral", sliding_window=6),
    "ministral": decoder("Ministral", **HEAD, **MIXED),
    "ministral3": decoder("Ministral3", **HEAD),
    "qwen2": decoder("Qwen2", use_sliding_window=True, max_window_layers=2, **MIXED),
    "qwen3": decoder("Qwen3", **HEAD),
    "qwen3_moe": decoder("Qwen3Moe", num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24, **HEAD),
    "qwen3_5": decoder(
        "Qwen3_5",
        config="Qwen3_5TextConfig",
        num_hidden_layers=4,
        layer_types=[LINEAR, FULL, LINEAR, FULL],
        **LINEAR_HEADS,
        **HEAD,
    ),
    "qwen3_next": decoder(
        "Qwen3Next",
        num_hidden_layers=4,
        layer_types=[LINEAR, FULL, LINEAR, FULL],
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=24,
        shared_expert_intermediate_size=24,
        **LINEAR_HEADS,
        **HEAD,
    ),
    "mixtral": decoder("Mixtral", **EXPERTS),
    "smollm3": decoder("SmolLM3", no_rope_layer_interval=2),
    "granite": decoder("Granite"),
    "glm": decoder("Glm", **HEAD),
    "glm4": decoder("Glm4", **HEAD),
    "gemma": decoder("Gemma", **HEAD),
    "gemma2": decoder("Gemma2", **HEAD, **MIXED),
    "gemma3_text": decoder("Gemma3", config="Gemma3TextConfig", **HEAD, **MIXED),
    "gemma4_text": decoder("Gemma4", config="Gemma4TextConfig", **HEAD, **MIXED, **GEMMA4),
    "cohere": decoder("Cohere"),
    "cohere2": decoder("Cohere2", **MIXED),
    "olmo2": decoder("Olmo2"),
    "olmo3": decoder("Olmo3", **MIXED),
    "llama4_text": decoder("Llama4", config="Llama4TextConfig", **LLAMA4),
    "gpt_oss": decoder("GptOss", **EXPERTS, **HEAD, **MIXED),
    "phi3": decoder("Phi3"),
    "opt": (
        "OPTConfig",
        "OPTForCausalLM",
        sizes(ffn_dim=48, word_embed_proj_dim=DIM),
        {"input_ids": TOKENS},
    ),
    "gpt2": (
        "GPT2Config",
        "GPT2LMHeadModel",
        {"n_embd": DIM, "n_layer": 3, "n_head": 4, "vocab_size": WORDS, "n_positions": 64},
        {"input_ids": TOKENS},
    ),
    "bert": encoder("Bert"),
    "roberta": encoder("Roberta"),
    "camembert": encoder("Camembert"),
    "xlm-roberta": encoder("XLMRoberta"),
    "electra": encoder("Electra", embedding_size=DIM),
    "modernbert": encoder("ModernBert", cls_token_id=3, sep_token_id=4, bos_token_id=1, eos_token_id=2),
    "deberta-v2": encoder("DebertaV2", relative_attention=True, pos_att_type=["p2c", "c2p"]),
    "distilbert": (
        "DistilBertConfig",
        "DistilBertForSequenceClassification",
        {"dim": DIM, "hidden_dim": 48, "n_layers": 3, "n_heads": 4, "vocab_size": WORDS},
        {"input_ids": TOKENS},
    ),
    "t5": encoder_decoder("T5", **T5),
    "mt5": encoder_decoder("MT5", **T5),
    "umt5": encoder_decoder("UMT5", **T5),
    "bart": encoder_decoder("Bart", **BART),
    "mbart": encoder_decoder("MBart", **BART),
    "whisper": (
        *encoder_decoder("Whisper", **BART, **AUDIO, begin_suppress_tokens=None, bos_token_id=1, eos_token_id=2)[:3],
        {"input_features": (2, 8, 32), "decoder_input_ids": TOKENS},
    ),
}
