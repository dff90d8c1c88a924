"""Small DVP models with random weights, inputs for them, and what they compute restated in plain torch.

The restatements take weights by name from the model's parameters, mask by -inf, and know nothing of transformers.
"""

import tiny_families
import torch
import torch.nn.functional as F
from prompt_projections import with_all_projections
from tiny_families import DIM, TOKENS, WORDS

from petl_ext.models import DVPT5, DVPBert, DVPLlama

CLASSES = {"bert": DVPBert, "t5": DVPT5, "llama": DVPLlama}
LAYERS, LABELS, VISUAL, VISUAL_DIM, HEADS, KEY_VALUE_HEADS = 3, 5, 7, 24, 4, 2
END = 2  # LLaMA's end-of-sequence token
SIZES = {"visual_dim": VISUAL_DIM, "num_heads": 2, "inner_dim": 16}


def make_language_model(family, seed=0, layers=LAYERS):
    stacks = 2 if family == "t5" else 1
    return tiny_families.FAMILIES[family].make(*[layers] * stacks, seed=seed)


def make_model(family, seed=0, **options):
    """In float64 and eval mode, with new layers far from where they start."""
    model = CLASSES[family](make_language_model(family, seed), **SIZES | {"num_labels": LABELS} | options)
    torch.manual_seed(seed + 1)
    for name, parameter in model.named_parameters():
        if not name.startswith(("language_model", "vision_model")) or ".adapter." in name:
            center = parameter.dim() == 1 and name.endswith("classifier.1.weight")
            torch.nn.init.normal_(parameter, mean=float(center), std=0.3)
    return model.double().eval()


def make_inputs(model, seed=1, batch=3):
    """The first text is half padding; LLaMA's second ends before its last token, its third has no end."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.ones(batch, TOKENS, dtype=torch.long)
    mask[0, TOKENS // 2 :] = 0
    words = torch.randint(3, WORDS - 1, (batch, TOKENS), generator=generator)
    if isinstance(model, DVPLlama):
        words[0, TOKENS // 2 - 1] = words[1, TOKENS - 3] = END
    dtype = next(model.parameters()).dtype
    visual = torch.randn(batch, VISUAL, VISUAL_DIM, generator=generator).to(dtype)
    return {"input_ids": words, "attention_mask": mask, "visual_features": visual}


def restated(model, input_ids, attention_mask, visual_features, original=False):
    """The classifier's logits."""
    features = {DVPBert: _bert, DVPT5: _t5, DVPLlama: _llama}[type(model)](
        model, input_ids, attention_mask, visual_features, original
    )
    return model.classifier(features)


def prompted(model, states, query, visual):
    layer = model.visual_prompts[model.insert_layer if len(model.visual_prompts) > 1 else 0]
    prompt = with_all_projections(layer, visual, query)[:, None]
    if len(model.type_embeddings):
        table = model.type_embeddings[model.insert_layer if len(model.type_embeddings) > 1 else 0].weight
        states, prompt = states + table[0], prompt + table[1]
    return torch.cat([prompt, states], dim=1)


class Weights:
    """The parameters below one module, as functions of rows."""

    def __init__(self, module):
        self.of = dict(module.named_parameters())

    def linear(self, name, x):
        bias = self.of.get(f"{name}.bias")
        return x @ self.of[f"{name}.weight"].T + (0 if bias is None else bias)

    def layer_norm(self, name, x):
        centered = x - x.mean(-1, keepdim=True)
        x = centered / (centered.square().mean(-1, keepdim=True) + 1e-12).sqrt()
        return x * self.of[f"{name}.weight"] + self.of[f"{name}.bias"]

    def rms_norm(self, name, x):
        return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * self.of[f"{name}.weight"]

    def adapter(self, name, x, activation=torch.relu):
        """x where the module of that name has none."""
        if f"{name}.adapter.down" not in self.of:
            return x
        down, down_bias, up, up_bias = (
            self.of[f"{name}.adapter.{part}"] for part in ("down", "down_bias", "up", "up_bias")
        )
        return x + activation(x @ down.T + down_bias) @ up.T + up_bias


def attention(query, key, value, bias, scale):
    """[B, rows, HEADS * d] each, `bias` [B or 1, HEADS or 1, rows, keys] is added to the scores."""
    q, k, v = (rows.unflatten(-1, (HEADS, -1)).transpose(1, 2) for rows in (query, key, value))
    return ((q @ k.mT * scale + bias).softmax(-1) @ v).transpose(1, 2).flatten(2)


def hidden(attention_mask):
    """-inf [B, 1, 1, T] for what is padding."""
    return torch.zeros(attention_mask.shape).masked_fill(attention_mask == 0, -torch.inf)[:, None, None]


def with_prompt(attention_mask):
    return torch.cat([torch.ones_like(attention_mask[:, :1]), attention_mask], dim=1)


def later(length):
    """-inf [length, length] for what stands behind."""
    return torch.full((length, length), -torch.inf).triu(1)


def _bert(model, input_ids, attention_mask, visual, original):
    bert = model.language_model
    weights = Weights(bert.embeddings)
    x = weights.of["word_embeddings.weight"][input_ids] + weights.of["token_type_embeddings.weight"][0]
    x = weights.layer_norm("LayerNorm", x + weights.of["position_embeddings.weight"][: input_ids.size(1)])
    mask = attention_mask
    for i, layer in enumerate(bert.encoder.layer):
        if i == model.insert_layer:
            x, mask = prompted(model, x, x[:, 0], visual), with_prompt(mask)
        weights = Weights(layer)
        q, k, v = (weights.linear(f"attention.self.{part}", x) for part in ("query", "key", "value"))
        y = weights.linear("attention.output.dense", attention(q, k, v, hidden(mask), (DIM // HEADS) ** -0.5))
        y = weights.adapter("attention.output.dropout", y)
        x = weights.layer_norm("attention.output.LayerNorm", y + x)
        y = F.gelu(weights.linear("intermediate.dense", x))
        y = weights.adapter("output.dropout", weights.linear("output.dense", y))
        x = weights.layer_norm("output.LayerNorm", y + x)
    return x[:, 1]


def _t5(model, input_ids, attention_mask, visual, original):
    t5 = model.language_model
    shared = t5.shared.weight

    def attend(weights, name, x, source, bias):
        q, k, v = weights.linear(f"{name}.q", x), *(weights.linear(f"{name}.{part}", source) for part in "kv")
        return weights.adapter(name, weights.linear(f"{name}.o", attention(q, k, v, bias, 1.0)))

    def feed_forward(weights, name, x):
        y = weights.linear(f"{name}.DenseReluDense.wi", weights.rms_norm(f"{name}.layer_norm", x)).relu()
        return x + weights.adapter(f"{name}.DenseReluDense", weights.linear(f"{name}.DenseReluDense.wo", y))

    def relative(stack, block, length):
        """Biases [1, HEADS, length, length]; no distance here is beyond those that have a row of their own."""
        if original and block > 0:
            return torch.zeros(1, HEADS, length, length)
        table = stack.block[0].layer[0].SelfAttention.relative_attention_bias.weight
        ahead = torch.arange(length)[None] - torch.arange(length)[:, None]
        ours, half = ahead.clamp(max=0).abs(), len(table) // 2
        buckets = ours if stack is t5.decoder else torch.where(ahead > 0, half + ahead, ours)
        return table[buckets].permute(2, 0, 1)[None]

    x = shared[input_ids]
    for i, block in enumerate(t5.encoder.block):
        weights = Weights(block)
        normed = weights.rms_norm("layer.0.layer_norm", x)
        bias = relative(t5.encoder, i, x.size(1)) + hidden(attention_mask)
        x = x + attend(weights, "layer.0.SelfAttention", normed, normed, bias)
        x = feed_forward(weights, "layer.1", x)
    text = Weights(t5.encoder).rms_norm("final_layer_norm", x)
    rows = [row if original else row[m == 1] for row, m in zip(text, attention_mask, strict=True)]
    query = torch.stack([row.mean(0) for row in rows])

    x = shared[torch.zeros(len(input_ids), 1, dtype=torch.long)]
    for i, block in enumerate(t5.decoder.block):
        if i == model.insert_layer:
            x = prompted(model, x, query, visual)
        weights = Weights(block)
        normed = weights.rms_norm("layer.0.layer_norm", x)
        bias = relative(t5.decoder, i, x.size(1)) + (0 if original else later(x.size(1)))
        x = x + attend(weights, "layer.0.SelfAttention", normed, normed, bias)
        normed = weights.rms_norm("layer.1.layer_norm", x)
        x = x + attend(weights, "layer.1.EncDecAttention", normed, text, hidden(attention_mask))
        x = feed_forward(weights, "layer.2", x)
    return Weights(t5.decoder).rms_norm("final_layer_norm", x)[:, -1]


def _llama(model, input_ids, attention_mask, visual, original):
    ends = []
    for words, mask in zip(input_ids.tolist(), attention_mask.tolist(), strict=True):
        last = 0 if original else sum(mask) - 1
        ends.append(words.index(END) if END in words else last)
    return llama_states(model, input_ids, attention_mask, visual, ends)[range(len(ends)), [end + 1 for end in ends]]


def llama_states(model, input_ids, attention_mask, visual, ends):
    """The last states [B, 1 + T, D] of texts padded on the right, the query being each text's token `ends`."""
    llama = model.language_model.model
    x, mask = llama.embed_tokens.weight[input_ids], attention_mask
    for i, layer in enumerate(llama.layers):
        if i == model.insert_layer:
            x, mask = prompted(model, x, x[range(len(ends)), list(ends)], visual), with_prompt(mask)
        weights = Weights(layer)
        normed = weights.rms_norm("input_layernorm", x)
        q, k, v = (weights.linear(f"self_attn.{part}_proj", normed) for part in "qkv")
        q, k = rotated(q), rotated(k)
        k, v = (each_twice(rows) for rows in (k, v))
        y = attention(q, k, v, hidden(mask) + later(x.size(1)), (DIM // HEADS) ** -0.5)
        silu = F.silu
        x = x + weights.adapter("self_attn", weights.linear("self_attn.o_proj", y), silu)
        normed = weights.rms_norm("post_attention_layernorm", x)
        y = silu(weights.linear("mlp.gate_proj", normed)) * weights.linear("mlp.up_proj", normed)
        x = x + weights.adapter("mlp", weights.linear("mlp.down_proj", y), silu)
    return Weights(llama).rms_norm("norm", x)


def rotated(rows):
    """[B, T, heads * d] with row t's halves turned by t / 10000^(2 i / d)."""
    width = DIM // HEADS
    angles = torch.arange(rows.size(1))[:, None].double() / 10000 ** (torch.arange(0, width, 2).double() / width)
    first, second = rows.unflatten(-1, (-1, 2, width // 2)).unbind(-2)
    cosines, sines = angles.cos()[:, None], angles.sin()[:, None]
    return torch.stack([first * cosines - second * sines, second * cosines + first * sines], dim=-2).flatten(2)


def each_twice(rows):
    """Key and value heads for the query heads that share them."""
    return rows.unflatten(-1, (KEY_VALUE_HEADS, -1)).repeat_interleave(HEADS // KEY_VALUE_HEADS, dim=2).flatten(2)
