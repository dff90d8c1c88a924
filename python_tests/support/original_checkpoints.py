"""Stand-ins for the original authors' checkpoints: what their code would have saved of a model's weights.

Written from the names in the papers' code bases, module by module, and without a look at the loader's tables.
"""

import torch

APT_PARTS = {"down": "mm.0.weight", "up": "mm.1.weight", "prompts": "mm_tokens", "log_scale": "scale"}
SEQUENTIAL_PARTS = {
    "down": "down_sampler.weight",
    "down_bias": "down_sampler.bias",
    "up": "up_sampler.weight",
    "up_bias": "up_sampler.bias",
}
PARALLEL_PARTS = {
    "norm_weight": "adapter_layer_norm_before.weight",
    "norm_bias": "adapter_layer_norm_before.bias",
    "down": "down_proj.weight",
    "down_bias": "down_proj.bias",
    "up": "up_proj.weight",
    "up_bias": "up_proj.bias",
}


class Original(dict):
    """A state dict under construction."""

    def put(self, key, module):
        """A Linear, Conv2d, LayerNorm, Embedding or Sequential, whose own names are the original's."""
        for name, parameter in module.named_parameters():
            self[f"{key}.{name}"] = parameter.detach().clone()

    def put_fused(self, weight_key, bias_key, *linears):
        self[weight_key] = torch.cat([linear.weight.detach() for linear in linears])
        self[bias_key] = torch.cat([linear.bias.detach() for linear in linears])

    def put_layer(self, key, layer, parts):
        for ours, theirs in parts.items():
            self[f"{key}.{theirs}"] = getattr(layer, ours).detach().clone()


def with_original_norms(model):
    """A ViLT whose norms add to the variance what timm's do, and those of the text what BERT's do."""
    for name, module in model.named_modules():
        if name.endswith(("layernorm_before", "layernorm_after")) or name in ("layernorm", "vilt.layernorm"):
            module.eps = 1e-6
    return model


def vilt_checkpoint(model, head=None, method=None):
    """Args: head: the original's name of the model's head; method: "apt", "sequential", "parallel" or "das"."""
    state, vilt = Original(), getattr(model, "vilt", model)
    words = vilt.embeddings.text_embeddings
    for name in ("word_embeddings", "position_embeddings", "token_type_embeddings", "LayerNorm"):
        state.put(f"text_embeddings.{name}", getattr(words, name))
    state["text_embeddings.position_ids"] = torch.arange(len(words.position_embeddings.weight))[None]
    state.put("token_type_embeddings", vilt.embeddings.token_type_embeddings)
    state["transformer.cls_token"] = vilt.embeddings.cls_token.detach().clone()
    state["transformer.pos_embed"] = vilt.embeddings.position_embeddings.detach().clone()
    state.put("transformer.patch_embed.proj", vilt.embeddings.patch_embeddings.projection)
    for i, layer in enumerate(vilt.encoder.layer):
        block = f"transformer.blocks.{i}"
        heads = layer.attention.attention
        state.put(f"{block}.norm1", layer.layernorm_before)
        state.put_fused(f"{block}.attn.qkv.weight", f"{block}.attn.qkv.bias", heads.query, heads.key, heads.value)
        state.put(f"{block}.attn.proj", layer.attention.output.dense)
        state.put(f"{block}.norm2", layer.layernorm_after)
        state.put(f"{block}.mlp.fc1", layer.intermediate.dense)
        state.put(f"{block}.mlp.fc2", layer.output.dense)
        if method == "apt":
            state.put_layer(f"{block}.attn.APT", layer.attention.output.apt, APT_PARTS)
        if method == "sequential":
            state.put_layer(f"{block}.adapter0", layer.attention.output.adapter, SEQUENTIAL_PARTS)
            state.put_layer(f"{block}.adapter1", layer.output.adapter, SEQUENTIAL_PARTS)
        if method == "parallel":
            state.put_layer(f"{block}.attn.PA", layer.attention.output.adapter, PARALLEL_PARTS)
        if method == "das":
            state.put_layer(f"{block}.adapter0", layer.adapter, PARALLEL_PARTS)
            state.put_layer(f"{block}.adapter1", layer.output.adapter, PARALLEL_PARTS)
            state.put_layer(f"adapter_list.{i}.0", layer.bypass, PARALLEL_PARTS)
    state.put("transformer.norm", vilt.layernorm)
    state.put("pooler.dense", vilt.pooler.dense)
    put_head(state, model, head)
    return dict(state)


def meter_checkpoint(model, head=None, method=None):
    state, meter = Original(), getattr(model, "meter", model)
    state.put("cross_modal_text_transform", meter.cross_modal_text_transform)
    state.put("cross_modal_image_transform", meter.cross_modal_image_transform)
    state.put("token_type_embeddings", meter.token_type_embeddings)
    put_clip(state, meter.vit_model)
    put_roberta(state, meter.text_transformer)
    for stream in ("image", "text"):
        for i, layer in enumerate(getattr(meter, f"cross_modal_{stream}_layers")):
            key = f"cross_modal_{stream}_layers.{i}"
            put_fusion_layer(state, key, layer, method)
            if method == "das":
                state.put_layer(f"adapter_list_{'l' if stream == 'text' else 'v'}.{i}.0", layer.bypass, PARALLEL_PARTS)
        state.put(f"cross_modal_{stream}_pooler.dense", getattr(meter, f"cross_modal_{stream}_pooler").dense)
    put_head(state, model, head)
    return dict(state)


def put_fusion_layer(state, key, layer, method):
    for name in ("attention", "crossattention"):
        attention = getattr(layer, name)
        put_attention(state, f"{key}.{name}", attention)
        if method == "apt":
            state.put_layer(f"{key}.{name}.output.APT", attention.output.apt, APT_PARTS)
        if method == "sequential":
            state.put_layer(f"{key}.{name}.output.adapter", attention.output.adapter, SEQUENTIAL_PARTS)
        if method == "parallel":
            state.put_layer(f"{key}.{name}.output.PA", attention.output.adapter, PARALLEL_PARTS)
        if method == "das":
            state.put_layer(f"{key}.{name}.output.adapter", attention.output.adapter, PARALLEL_PARTS)
    put_mlp(state, key, layer)
    if method == "sequential":
        state.put_layer(f"{key}.output.adapter", layer.output.adapter, SEQUENTIAL_PARTS)
    if method == "das":
        state.put_layer(f"{key}.adapter", layer.output.adapter, PARALLEL_PARTS)


def put_attention(state, key, attention):
    for part in ("query", "key", "value"):
        state.put(f"{key}.self.{part}", getattr(attention.self, part))
    state.put(f"{key}.output.dense", attention.output.dense)
    state.put(f"{key}.output.LayerNorm", attention.output.LayerNorm)


def put_mlp(state, key, layer):
    state.put(f"{key}.intermediate.dense", layer.intermediate.dense)
    state.put(f"{key}.output.dense", layer.output.dense)
    state.put(f"{key}.output.LayerNorm", layer.output.LayerNorm)


def put_roberta(state, roberta):
    key, words = "text_transformer", roberta.embeddings
    for name in ("word_embeddings", "position_embeddings", "token_type_embeddings", "LayerNorm"):
        state.put(f"{key}.embeddings.{name}", getattr(words, name))
    state[f"{key}.embeddings.position_ids"] = torch.arange(len(words.position_embeddings.weight))[None]
    for i, layer in enumerate(roberta.encoder.layer):
        put_attention(state, f"{key}.encoder.layer.{i}.attention", layer.attention)
        put_mlp(state, f"{key}.encoder.layer.{i}", layer)
    width = roberta.config.hidden_size
    state.put(f"{key}.pooler.dense", torch.nn.Linear(width, width))


def put_clip(state, clip):
    """CLIP as OpenAI names it, with what is left of its text tower."""
    state["vit_model.positional_embedding"] = torch.randn(7, 6)
    state["vit_model.token_embedding.weight"] = torch.randn(9, 6)
    state.put("vit_model.ln_final", torch.nn.LayerNorm(6))
    put_visual(state, "vit_model.visual", clip)


def put_visual(state, key, clip):
    state[f"{key}.class_embedding"] = clip.embeddings.class_embedding.detach().clone()
    state[f"{key}.positional_embedding"] = clip.embeddings.position_embedding.weight.detach().clone()
    state[f"{key}.conv1.weight"] = clip.embeddings.patch_embedding.weight.detach().clone()
    state.put(f"{key}.ln_pre", clip.pre_layrnorm)
    state.put(f"{key}.ln_post", clip.post_layernorm)
    for i, layer in enumerate(clip.encoder.layers):
        block, attention = f"{key}.transformer.resblocks.{i}", layer.self_attn
        projections = (attention.q_proj, attention.k_proj, attention.v_proj)
        state.put_fused(f"{block}.attn.in_proj_weight", f"{block}.attn.in_proj_bias", *projections)
        state.put(f"{block}.attn.out_proj", attention.out_proj)
        state.put(f"{block}.ln_1", layer.layer_norm1)
        state.put(f"{block}.mlp.c_fc", layer.mlp.fc1)
        state.put(f"{block}.mlp.c_proj", layer.mlp.fc2)
        state.put(f"{block}.ln_2", layer.layer_norm2)


def dvp_checkpoint(model, head="vqa_classifier"):
    """Of a DVPBert, DVPT5 or DVPLlama with a vision model; adapters and candidates as the model has them."""
    state, family = Original(), model.language_model_type
    put_language_model(state, family, model.language_model.base_model)
    put_visual(state, "visumodel", model.vision_model)
    state["visumodel.proj"] = torch.randn(model.vision_model.config.hidden_size, 6)
    for i, layer in enumerate(model.visual_prompts):
        key = f"cross_attn_options.{i}" if model.options["candidates"] else "cross_attn"
        for theirs, ours in (("v", "value"), ("k", "key"), ("q", "query"), ("merge", "output")):
            state.put(f"{key}.linear_{theirs}", getattr(layer, ours))
    for i, table in enumerate(model.type_embeddings):
        state.put(f"token_type_embeddings{f'_options.{i}' if model.options['candidates'] else ''}", table)
    if model.options["candidates"]:
        state["layer_alphas"] = torch.randn(model.num_layers)
    if model.options["use_adapters"]:
        for key, adapters in dvp_adapters(model).items():
            for i, adapter in enumerate(adapters):
                state.put_layer(f"{key}.{i}", adapter, SEQUENTIAL_PARTS)
    if head:
        state.put(head, model.classifier)
    return dict(state)


def put_language_model(state, family, base):
    """As transformers 4.30 names it, which also saved position_ids and LLaMA's inv_freq; most of it twice."""
    key = f"{family}_model"
    for name, parameter in base.named_parameters(remove_duplicate=False):
        if ".adapter." not in name and not name.startswith("lm_head."):
            state[f"{key}.{name}"] = parameter.detach().clone()
    if family == "bert":
        state[f"{key}.embeddings.position_ids"] = torch.arange(base.config.max_position_embeddings)[None]
    if family == "llama":
        for i in range(len(base.layers)):
            state[f"{key}.layers.{i}.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    copies = {
        "bert": {"bert_embeddings": "embeddings", "bert_encoder": "encoder"},
        "t5": {"t5_encoder": "encoder", "t5_decoder": "decoder"},
        "llama": {"embed_tokens": "embed_tokens", "layers": "layers", "norm": "norm"},
    }
    for copy, part in copies[family].items():
        names = [name for name in state if name.startswith(f"{key}.{part}.")]
        state |= {name.replace(f"{key}.{part}.", f"{copy}.", 1): state[name].clone() for name in names}


def dvp_adapters(model):
    """{the list's name: adapters in its order}."""
    base = model.language_model.base_model
    if model.language_model_type == "bert":
        places = [m for layer in base.encoder.layer for m in (layer.attention.output.dropout, layer.output.dropout)]
    elif model.language_model_type == "llama":
        places = [m for layer in base.layers for m in (layer.self_attn, layer.mlp)]
    else:
        encoder = [m for b in base.encoder.block for m in (b.layer[0].SelfAttention, b.layer[1].DenseReluDense)]
        decoder = [
            module
            for b in base.decoder.block
            for module in (b.layer[0].SelfAttention, b.layer[1].EncDecAttention, b.layer[2].DenseReluDense)
        ]
        return {"encoder_adapter": [m.adapter for m in encoder], "decoder_adapter": [m.adapter for m in decoder]}
    return {"adapter_modules": [module.adapter for module in places]}


def put_head(state, model, head):
    if head is None:
        return
    if head == "mlm_score":
        state.put("mlm_score.transform", model.mlm_score.transform)
        state["mlm_score.decoder.weight"] = model.mlm_score.decoder.weight.detach().clone()
        state["mlm_score.bias"] = model.mlm_score.decoder.bias.detach().clone()
    else:
        state.put(head, model.rank_output if head == "rank_output" else model.classifier)


def pretraining_heads(width, pooled, words=50):
    """The heads of a pre-training checkpoint, with random weights: they fit no model but ViltForMaskedLM."""
    state = Original()
    state.put("mlm_score.transform.dense", torch.nn.Linear(width, width))
    state.put("mlm_score.transform.LayerNorm", torch.nn.LayerNorm(width))
    state["mlm_score.decoder.weight"] = torch.randn(words, width)
    state["mlm_score.bias"] = torch.randn(words)
    state.put("itm_score.fc", torch.nn.Linear(pooled, 2))
    return dict(state)


def lightning(state):
    """The rest of a Lightning checkpoint around the weights."""
    return {
        "epoch": 9,
        "global_step": 24989,
        "pytorch-lightning_version": "1.1.4",
        "state_dict": state,
        "optimizer_states": [{"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": [{"lr": 1e-4, "params": [0]}]}],
        "hyper_parameters": {"config": {"loss_names": {"vqa": 1}}, "trainable": ["classifier", "APT"]},
    }
