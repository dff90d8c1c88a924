"""The vision transformer of OpenAI's CLIP, whose names METER's and DVP's files have."""

from petl_ext.models.checkpoints.rules import rule

BLOCK, LAYER = "transformer.resblocks.{i}", "encoder.layers.{i}"
CLIP_PROJ = "CLIP's projection to its joint space, which the model does not use"
CLIP_TEXT = "CLIP's text tower, which the model does not use"


def visual_rules(theirs, ours, resized=None):
    """From OpenAI's `visual` under the name `theirs` to transformers' CLIPVisionModel under the name `ours`.

    Args:
        resized: how position embeddings of another grid are adapted; None refuses them.
    """
    names = {
        "conv1.weight": ["embeddings.patch_embedding.weight"],
        "class_embedding": ["embeddings.class_embedding"],
        "ln_pre.{t}": ["pre_layrnorm.{t}"],
        f"{BLOCK}.ln_1.{{t}}": [f"{LAYER}.layer_norm1.{{t}}"],
        f"{BLOCK}.attn.in_proj_{{t}}": [f"{LAYER}.self_attn.{part}_proj.{{t}}" for part in "qkv"],
        f"{BLOCK}.attn.out_proj.{{t}}": [f"{LAYER}.self_attn.out_proj.{{t}}"],
        f"{BLOCK}.ln_2.{{t}}": [f"{LAYER}.layer_norm2.{{t}}"],
        f"{BLOCK}.mlp.c_fc.{{t}}": [f"{LAYER}.mlp.fc1.{{t}}"],
        f"{BLOCK}.mlp.c_proj.{{t}}": [f"{LAYER}.mlp.fc2.{{t}}"],
        "ln_post.{t}": ["post_layernorm.{t}"],
    }
    positions = rule(f"{theirs}.positional_embedding", f"{ours}.embeddings.position_embedding.weight", adapt=resized)
    return (positions, *(rule(f"{theirs}.{key}", *(f"{ours}.{name}" for name in to)) for key, to in names.items()))
