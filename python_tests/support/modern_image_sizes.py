"""Sizes and inputs of tiny models that see or denoise, as those of modern_text_sizes."""

from modern_text_sizes import DIM, FULL, GEMMA4, HEAD, IMAGE, LINEAR, LINEAR_HEADS, LLAMA4, MIXED, TOKENS, WORDS, sizes

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
    "llava_next": seeing(
        "LlavaNext",
        CLIP,
        LLAMA,
        {"pixel_values": (2, 2, 3, 16, 16), "image_sizes": [[16, 16]] * 2, "input_ids": ("words", 2, 13, 10)},
        10,
        image_token_index=IMAGE,
        image_grid_pinpoints=[[16, 16]],
    ),
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
    "gemma4": seeing(
        "Gemma4",
        {
            "hidden_size": DIM,
            "intermediate_size": 48,
            "num_hidden_layers": 3,
            "head_dim": 8,
            "patch_size": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "pooling_kernel_size": 2,
            "position_embedding_size": 16,
            "use_clipped_linears": True,
        },
        sizes(**HEAD, **MIXED, **GEMMA4),
        {
            "pixel_values": (2, 16, 48),
            "image_position_ids": [[[index % 4, index // 4] for index in range(16)]] * 2,
            "mm_token_type_ids": image_types(4),
        },
        4,
        image_token_id=IMAGE,
        audio_config=None,
    ),
    "llama4": seeing(
        "Llama4",
        VISION
        | {"hidden_size": DIM, "intermediate_size": 128, "patch_size": 4, "pixel_shuffle_ratio": 0.5}
        | dict.fromkeys(("projector_input_dim", "projector_output_dim", "vision_output_dim"), DIM),
        sizes(**LLAMA4),
        PIXELS,
        4,
        image_token_index=IMAGE,
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
    "qwen3_5_vl": seeing(
        "Qwen3_5",
        QWEN_VISION | {"out_hidden_size": DIM, "intermediate_size": 48, "num_position_embeddings": 16},
        sizes(num_hidden_layers=4, layer_types=[LINEAR, FULL, LINEAR, FULL], **LINEAR_HEADS, **HEAD, **ROPE),
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

TIMM_SIZES = {"img_size": 16, "patch_size": 8, "num_classes": 5, "embed_dim": DIM, "depth": 3, "num_heads": 4}
EVA = {"qkv_fused": False, "swiglu_mlp": True, "scale_mlp": True, "scale_attn_inner": True, "use_rot_pos_emb": True}

TIMM = {
    "timm.VisionTransformer": ("VisionTransformer", TIMM_SIZES, {"x": (2, 3, 16, 16)}),
    "timm.Eva": ("Eva", TIMM_SIZES | EVA, {"x": (2, 3, 16, 16)}),
    "timm.Beit": ("Beit", TIMM_SIZES | {"use_rel_pos_bias": True}, {"x": (2, 3, 16, 16)}),
}
