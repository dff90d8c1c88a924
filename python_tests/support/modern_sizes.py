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
    "llama4_text": decoder(
        "Llama4",
        config="Llama4TextConfig",
        num_local_experts=2,
        num_experts_per_tok=1,
        intermediate_size_mlp=48,
        layer_types=[CHUNKED, FULL, CHUNKED, FULL],
        num_hidden_layers=4,
        **HEAD,
    ),
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

VISION = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 16,
    "patch_size": 8,
}
PIXELS = {"pixel_values": (2, 3, 16, 16)}
DINO = {key: value for key, value in VISION.items() if key != "intermediate_size"} | {"mlp_ratio": 2}
READING = {key: value for key, value in sizes(max_position_embeddings=16).items() if key != "num_key_value_heads"}


def classifier(name, **own):
    return f"{name}Config", f"{name}ForImageClassification", own or VISION, PIXELS


def pair(name, text=None, vision=None, **own):
    """An entry of a text encoder beside an image encoder."""
    parts = {"text_config": READING | (text or {}), "vision_config": VISION | (vision or {})}
    return f"{name}Config", f"{name}Model", parts | own, {"input_ids": TOKENS, **PIXELS}


PATCHES = {"pixel_values": (2, 4, 192), "pixel_attention_mask": [[1] * 4] * 2, "spatial_shapes": [[2, 2]] * 2}

IMAGES = {
    "vit": classifier("ViT"),
    "deit": classifier("DeiT"),
    "dinov2": classifier("Dinov2", **DINO),
    "dinov2_with_registers": classifier("Dinov2WithRegisters", **DINO),
    "dinov3_vit": ("DINOv3ViTConfig", "DINOv3ViTModel", VISION | {"hidden_size": DIM}, PIXELS),
    "beit": classifier("Beit"),
    "swin": (
        "SwinConfig",
        "SwinForImageClassification",
        {"image_size": 32, "patch_size": 4, "embed_dim": 16, "depths": [1, 2], "num_heads": [2, 4], "window_size": 4},
        {"pixel_values": (2, 3, 32, 32)},
    ),
    "clip": pair("CLIP", projection_dim=16),
    "clip_text_model": ("CLIPTextConfig", "CLIPTextModel", READING, {"input_ids": TOKENS}),
    "clip_vision_model": ("CLIPVisionConfig", "CLIPVisionModel", VISION, PIXELS),
    "siglip": pair("Siglip", text={"projection_size": 24}),
    "siglip_vision_model": ("SiglipVisionConfig", "SiglipVisionModel", VISION, PIXELS),
    "siglip2": (
        *pair("Siglip2", text={"projection_size": 24}, vision={"num_patches": 16})[:3],
        {"input_ids": TOKENS, **PATCHES},
    ),
    "metaclip_2": pair("MetaClip2", projection_dim=16),
    "chinese_clip": pair("ChineseCLIP", projection_dim=16),
}

ROPE = {"rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}}
LLAMA = sizes(model_type="llama")
QWEN = sizes(model_type="qwen2")
SIGLIP = VISION | {"model_type": "siglip_vision_model"}
CLIP = VISION | {"model_type": "clip_vision_model"}
QWEN_IDS = {"image_token_id": IMAGE, "video_token_id": 61, "vision_start_token_id": 62, "vision_end_token_id": 63}
QWEN_VISION = {"depth": 3, "hidden_size": DIM, "num_heads": 4, "patch_size": 4}
QWEN_IMAGES = {"pixel_values": (32, 96), "image_grid_thw": [[1, 4, 4]] * 2}


def seeing(name, vision, text, inputs, image_tokens, **own):
    """An entry of a language model that sees, whose prompts hold the places of one image."""
    parts = {"vision_config": vision, "text_config": text}
    words = {"input_ids": ("words", 2, 10, image_tokens)}
    return f"{name}Config", f"{name}ForConditionalGeneration", parts | own, words | inputs


def image_types(image_tokens):
    return [[0] + [1] * image_tokens + [0] * (9 - image_tokens)] * 2


SEEING = {
    "llava": seeing("Llava", CLIP, LLAMA, PIXELS, 4, image_token_index=IMAGE),
    "llava_onevision": seeing(
        "LlavaOnevision",
        SIGLIP,
        QWEN,
        {"pixel_values": (2, 2, 3, 16, 16), "image_sizes": [[16, 16]] * 2, "input_ids": ("words", 2, 13, 10)},
        10,
        image_token_index=IMAGE,
        image_grid_pinpoints=[[16, 16]],
        vision_aspect_ratio="anyres_max_1",
    ),
    "idefics3": seeing(
        "Idefics3", VISION, LLAMA, {"pixel_values": (2, 1, 3, 16, 16)}, 1, image_token_id=IMAGE, scale_factor=2
    ),
    "smolvlm": seeing(
        "SmolVLM", VISION, LLAMA, {"pixel_values": (2, 1, 3, 16, 16)}, 1, image_token_id=IMAGE, scale_factor=2
    ),
    "paligemma": seeing(
        "PaliGemma",
        SIGLIP | {"projection_dim": DIM},
        sizes(model_type="gemma", **HEAD),
        {**PIXELS, "token_type_ids": [[0] * 10] * 2},
        4,
        image_token_index=IMAGE,
        projection_dim=DIM,
    ),
    "gemma3": seeing(
        "Gemma3",
        SIGLIP,
        sizes(**HEAD, **MIXED),
        {**PIXELS, "token_type_ids": image_types(4)},
        4,
        image_token_index=IMAGE,
        mm_tokens_per_image=4,
    ),
    "internvl": seeing(
        "InternVL",
        VISION | {"image_size": [16, 16], "patch_size": [8, 8]},
        QWEN,
        PIXELS,
        1,
        image_token_id=IMAGE,
        downsample_ratio=0.5,
    ),
    "qwen2_vl": seeing(
        "Qwen2VL",
        QWEN_VISION | {"embed_dim": DIM, "mlp_ratio": 2},
        sizes(**ROPE),
        {**QWEN_IMAGES, "mm_token_type_ids": image_types(4)},
        4,
        **QWEN_IDS,
    ),
    "qwen2_5_vl": seeing(
        "Qwen2_5_VL",
        QWEN_VISION | {"out_hidden_size": DIM, "intermediate_size": 48, "fullatt_block_indexes": [1]},
        sizes(**ROPE),
        {**QWEN_IMAGES, "mm_token_type_ids": image_types(4)},
        4,
        **QWEN_IDS,
    ),
    "qwen3_vl": seeing(
        "Qwen3VL",
        QWEN_VISION
        | {
            "out_hidden_size": DIM,
            "intermediate_size": 48,
            "deepstack_visual_indexes": [0, 1],
            "num_position_embeddings": 16,
        },
        sizes(**HEAD, **ROPE),
        {**QWEN_IMAGES, "mm_token_type_ids": image_types(4)},
        4,
        **QWEN_IDS,
    ),
    "mllama": seeing(
        "Mllama",
        {
            "hidden_size": 24,
            "intermediate_size": 40,
            "num_hidden_layers": 2,
            "num_global_layers": 1,
            "attention_heads": 4,
            "image_size": 16,
            "patch_size": 8,
            "intermediate_layers_indices": [0],
            "max_num_tiles": 1,
            "supported_aspect_ratios": [[1, 1]],
            "vision_output_dim": 48,
        },
        sizes(
            cross_attention_layers=[1],
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
            num_hidden_layers=4,
        ),
        {
            "pixel_values": (2, 1, 1, 3, 16, 16),
            "aspect_ratio_ids": [[1]] * 2,
            "aspect_ratio_mask": [[[1]]] * 2,
            "cross_attention_mask": [[[[1]]] * 10] * 2,
        },
        0,
        image_token_index=IMAGE,
    ),
    "blip": (
        "BlipConfig",
        "BlipForConditionalGeneration",
        {
            "text_config": READING | {"encoder_hidden_size": 24, "projection_dim": 16, "sep_token_id": 2},
            "vision_config": VISION,
            "projection_dim": 16,
        },
        {"input_ids": TOKENS, **PIXELS},
    ),
    "blip-2": seeing(
        "Blip2",
        VISION,
        sizes(model_type="opt", ffn_dim=48, word_embed_proj_dim=DIM),
        PIXELS,
        4,
        qformer_config={
            "hidden_size": DIM,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "encoder_hidden_size": 24,
            "vocab_size": WORDS,
        },
        num_query_tokens=4,
        image_token_index=IMAGE,
    ),
    "bridgetower": (
        "BridgeTowerConfig",
        "BridgeTowerModel",
        {
            "hidden_size": 64,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "text_config": READING | {"hidden_size": 64, "max_position_embeddings": 64, "pad_token_id": 1},
            "vision_config": {"hidden_size": 64, "num_hidden_layers": 3, "image_size": 16, "patch_size": 8},
        },
        {"input_ids": TOKENS, **PIXELS},
    ),
    "vilt": (
        "ViltConfig",
        "ViltModel",
        READING | VISION | {"hidden_size": DIM},
        {"input_ids": TOKENS, "pixel_values": (2, 3, 16, 16)},
    ),
}

JOINT = {
    "patch_size": 2,
    "in_channels": 4,
    "attention_head_dim": 8,
    "num_attention_heads": 4,
    "joint_attention_dim": DIM,
    "pooled_projection_dim": 16,
}

DIFFUSION = {
    "SD3Transformer2DModel": (
        "SD3Transformer2DModel",
        JOINT | {"sample_size": 8, "num_layers": 3, "caption_projection_dim": DIM, "out_channels": 4},
        {
            "hidden_states": (2, 4, 8, 8),
            "encoder_hidden_states": (2, 5, DIM),
            "pooled_projections": (2, 16),
            "timestep": [3, 4],
        },
    ),
    "FluxTransformer2DModel": (
        "FluxTransformer2DModel",
        JOINT
        | {
            "patch_size": 1,
            "num_layers": 2,
            "num_single_layers": 2,
            "attention_head_dim": 16,
            "num_attention_heads": 2,
            "axes_dims_rope": [4, 4, 8],
        },
        {
            "hidden_states": (2, 9, 4),
            "encoder_hidden_states": (2, 5, DIM),
            "pooled_projections": (2, 16),
            "timestep": [0.3, 0.4],
            "img_ids": [[0.0] * 3] * 9,
            "txt_ids": [[0.0] * 3] * 5,
        },
    ),
    "PixArtTransformer2DModel": (
        "PixArtTransformer2DModel",
        {
            "sample_size": 8,
            "num_layers": 2,
            "patch_size": 2,
            "attention_head_dim": 8,
            "num_attention_heads": 4,
            "caption_channels": DIM,
            "in_channels": 4,
            "cross_attention_dim": DIM,
            "out_channels": 8,
            "norm_num_groups": 8,
            "use_additional_conditions": False,
        },
        {"hidden_states": (2, 4, 8, 8), "timestep": [3, 4], "encoder_hidden_states": (2, 5, DIM)},
    ),
    "UNet2DConditionModel": (
        "UNet2DConditionModel",
        {
            "sample_size": 8,
            "block_out_channels": (32, 64),
            "layers_per_block": 1,
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
            "attention_head_dim": (2, 4),
            "transformer_layers_per_block": (1, 2),
            "cross_attention_dim": DIM,
            "norm_num_groups": 8,
        },
        {"sample": (2, 4, 8, 8), "timestep": [3, 4], "encoder_hidden_states": (2, 5, DIM)},
    ),
}
