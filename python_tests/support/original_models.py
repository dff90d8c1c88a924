"""What the authors' ViLT and METER compute of a checkpoint, in plain torch, by the names in the file.

Written from the formulas of their code bases. Nothing here knows of transformers or of petl_ext. Heads are 4, RoBERTa's
padding is token 1, and attention masks are 1 for what takes part.
"""

import torch
import torch.nn.functional as F

HEADS = 4
SCALE_OF_PARALLEL = 4.0  # of APT's; DAS's is 1
TEXT_EPS, BLOCK_EPS, ROBERTA_EPS, FUSION_EPS, CLIP_EPS, HEAD_EPS = 1e-12, 1e-6, 1e-5, 1e-12, 1e-5, 1e-5


def linear(state, name, x):
    return F.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])


def norm(state, name, x, eps):
    return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], eps)


def attention(query, key, value, mask=None):
    """Rows [B, *, D]; mask [B, keys]."""
    q, k, v = (rows.unflatten(-1, (HEADS, -1)).transpose(1, 2) for rows in (query, key, value))
    scores = q @ k.mT * q.shape[-1] ** -0.5
    if mask is not None:
        scores = scores.masked_fill(mask[:, None, None] == 0, -torch.inf)
    return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)


def prompted(state, name, x, y):
    """APT: x is what the attention was given, y what it said."""
    prompts, down, up = (state[f"{name}.{part}"] for part in ("mm_tokens", "mm.0.weight", "mm.1.weight"))
    scores = (x @ (prompts + prompts @ down.T @ up.T).T).relu()
    gate = scores.max(-1, keepdim=True).values
    return state[f"{name}.scale"].exp() * (y + gate * (scores @ prompts))


def sequential(state, name, x):
    return x + linear(state, f"{name}.up_sampler", linear(state, f"{name}.down_sampler", x).relu())


def parallel(state, name, x):
    normed = norm(state, f"{name}.adapter_layer_norm_before", x, 1e-5)
    return linear(state, f"{name}.up_proj", linear(state, f"{name}.down_proj", normed).relu())


def has(state, name):
    return any(key.startswith(f"{name}.") for key in state)


def with_class_token(state, text):
    if "token4classifier" not in state:
        return text
    return torch.cat([state["token4classifier"].expand(len(text), 1, -1), text[:, 1:]], 1)


def classified(state, pooled):
    hidden = F.gelu(norm(state, "vqa_classifier.1", linear(state, "vqa_classifier.0", pooled), HEAD_EPS))
    return linear(state, "vqa_classifier.3", hidden)


def patches(kernel, pixels):
    return F.conv2d(pixels, kernel, stride=kernel.shape[-1]).flatten(2).mT


def vilt(state, input_ids, attention_mask, pixel_values, skipped=()):
    """The logits of VQA, for images of the size of the position embeddings; DAS without the blocks `skipped`."""
    words, types = state["text_embeddings.word_embeddings.weight"], state["token_type_embeddings.weight"]
    text = words[input_ids] + state["text_embeddings.token_type_embeddings.weight"][0]
    text = text + state["text_embeddings.position_embeddings.weight"][: input_ids.size(1)]
    text = with_class_token(state, norm(state, "text_embeddings.LayerNorm", text, TEXT_EPS))
    image = patches(state["transformer.patch_embed.proj.weight"], pixel_values)
    image = image + state["transformer.patch_embed.proj.bias"]
    image = torch.cat([state["transformer.cls_token"].expand(len(image), 1, -1), image], 1)
    image = image + state["transformer.pos_embed"]
    x = torch.cat([text + types[0], image + types[1]], 1)
    mask = torch.cat([attention_mask, torch.ones(image.shape[:2], dtype=torch.long)], 1)
    block = 0
    while has(state, f"transformer.blocks.{block}"):
        if block in skipped:
            x = x + parallel(state, f"adapter_list.{block}.0", x)
        else:
            x = vilt_block(state, f"transformer.blocks.{block}", x, mask)
        block += 1
    pooled = linear(state, "pooler.dense", norm(state, "transformer.norm", x, BLOCK_EPS)[:, 0]).tanh()
    return classified(state, pooled)


def vilt_block(state, name, x, mask):
    das = f"{name}.adapter0.down_proj.weight" in state
    normed = norm(state, f"{name}.norm1", x, BLOCK_EPS)
    attended = attention(*linear(state, f"{name}.attn.qkv", normed).chunk(3, -1), mask)
    y = linear(state, f"{name}.attn.proj", attended)
    if has(state, f"{name}.attn.APT"):
        y = prompted(state, f"{name}.attn.APT", normed, y)
    if has(state, f"{name}.attn.PA"):
        y = y + SCALE_OF_PARALLEL * parallel(state, f"{name}.attn.PA", normed)
    if f"{name}.adapter0.down_sampler.weight" in state:
        y = sequential(state, f"{name}.adapter0", y)
    x = x + y + (parallel(state, f"{name}.adapter0", x) if das else 0)
    y = F.gelu(linear(state, f"{name}.mlp.fc1", norm(state, f"{name}.norm2", x, BLOCK_EPS)))
    y = linear(state, f"{name}.mlp.fc2", y)
    if f"{name}.adapter1.down_sampler.weight" in state:
        y = sequential(state, f"{name}.adapter1", y)
    return x + y + (parallel(state, f"{name}.adapter1", x) if das else 0)


def visual(state, key, pixels):
    """OpenAI's vision transformer of CLIP up to its last block."""
    x = patches(state[f"{key}.conv1.weight"], pixels)
    x = torch.cat([state[f"{key}.class_embedding"].expand(len(pixels), 1, -1), x], 1)
    x = norm(state, f"{key}.ln_pre", x + state[f"{key}.positional_embedding"], CLIP_EPS)
    block = 0
    while has(state, name := f"{key}.transformer.resblocks.{block}"):
        normed = norm(state, f"{name}.ln_1", x, CLIP_EPS)
        fused = F.linear(normed, state[f"{name}.attn.in_proj_weight"], state[f"{name}.attn.in_proj_bias"])
        x = x + linear(state, f"{name}.attn.out_proj", attention(*fused.chunk(3, -1)))
        hidden = linear(state, f"{name}.mlp.c_fc", norm(state, f"{name}.ln_2", x, CLIP_EPS))
        x = x + linear(state, f"{name}.mlp.c_proj", hidden * (1.702 * hidden).sigmoid())
        block += 1
    return x


def roberta(state, key, input_ids, mask):
    taking = (input_ids != 1).long()
    positions = taking.cumsum(1) * taking + 1
    x = state[f"{key}.embeddings.word_embeddings.weight"][input_ids]
    x = x + state[f"{key}.embeddings.position_embeddings.weight"][positions]
    x = x + state[f"{key}.embeddings.token_type_embeddings.weight"][0]
    x = norm(state, f"{key}.embeddings.LayerNorm", x, ROBERTA_EPS)
    layer = 0
    while has(state, name := f"{key}.encoder.layer.{layer}"):
        x = attend(state, f"{name}.attention", x, x, mask, ROBERTA_EPS)
        x = feed_forward(state, name, x, ROBERTA_EPS)
        layer += 1
    return x


def attend(state, name, x, source, mask, eps):
    """BERT's attention, which ends in a norm, with what the code bases add to METER's."""
    q, k, v = (linear(state, f"{name}.self.{part}", rows) for part, rows in zip(QKV, (x, source, source), strict=True))
    y = linear(state, f"{name}.output.dense", attention(q, k, v, mask))
    added = f"{name}.output.adapter"
    if has(state, f"{name}.output.APT"):
        y = prompted(state, f"{name}.output.APT", x, y)
    if f"{added}.down_sampler.weight" in state:
        y = sequential(state, added, y)
    if f"{added}.down_proj.weight" in state:  # DAS's
        y = y + parallel(state, added, x)
    out = norm(state, f"{name}.output.LayerNorm", y + x, eps)
    if has(state, f"{name}.output.PA"):
        out = out + SCALE_OF_PARALLEL * parallel(state, f"{name}.output.PA", x)
    return out


QKV = ("query", "key", "value")


def feed_forward(state, name, x, eps):
    y = linear(state, f"{name}.output.dense", F.gelu(linear(state, f"{name}.intermediate.dense", x)))
    if has(state, f"{name}.output.adapter"):
        y = sequential(state, f"{name}.output.adapter", y)
    out = norm(state, f"{name}.output.LayerNorm", y + x, eps)
    return out + parallel(state, f"{name}.adapter", x) if has(state, f"{name}.adapter") else out


def meter(state, input_ids, attention_mask, pixel_values, skipped=()):
    """The logits of VQA; DAS without the layers `skipped`, the text's first and then the image's."""
    types = state["token_type_embeddings.weight"]
    text = linear(state, "cross_modal_text_transform", roberta(state, "text_transformer", input_ids, attention_mask))
    image = norm(state, "vit_model.visual.ln_post", visual(state, "vit_model.visual", pixel_values), CLIP_EPS)
    text = with_class_token(state, text) + types[0]
    image = linear(state, "cross_modal_image_transform", image) + types[1]
    layers = sum(f"cross_modal_text_layers.{i}.output.dense.bias" in state for i in range(20))
    for i in range(layers):
        ours, others = (text, image), (image, text)
        text, image = (
            ours[stream] + parallel(state, f"adapter_list_{'lv'[stream]}.{i}.0", ours[stream])
            if i + stream * layers in skipped
            else fusion_layer(
                state,
                f"cross_modal_{('text', 'image')[stream]}_layers.{i}",
                (ours[stream], others[stream]),
                ((attention_mask, None), (None, attention_mask))[stream],
            )
            for stream in range(2)
        )
    pooled = [
        linear(state, f"cross_modal_{stream}_pooler.dense", rows[:, 0]).tanh()
        for stream, rows in (("text", text), ("image", image))
    ]
    return classified(state, torch.cat(pooled, -1))


def fusion_layer(state, name, streams, masks):
    """streams and masks: its own and the other's."""
    x = attend(state, f"{name}.attention", streams[0], streams[0], masks[0], FUSION_EPS)
    x = attend(state, f"{name}.crossattention", x, streams[1], masks[1], FUSION_EPS)
    return feed_forward(state, name, x, FUSION_EPS)
