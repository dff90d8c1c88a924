"""The modules of the code of APT (arXiv 2306.15706) and DVP (arXiv 2306.00409) that are no bottlenecks."""

import torch
from torch import nn

from petl_ext.ops.apt import ACTIVATIONS as APT_ACTIVATIONS
from petl_ext.ops.apt import apt
from petl_ext.ops.attention_pool import attention_pool
from petl_ext.patching.activation import activation_of, refuse_activation
from petl_ext.patching.dispatch import own_forward_because
from petl_ext.patching.kind import (
    Kind,
    Settings,
    as_gain,
    described,
    dropout_of,
    names_in,
    promoted,
    refuse_dropout,
    refuse_linear,
    refuse_names,
    refuse_scale,
)


class PromptDiffusion(Kind):
    """exp(scale) * (x + rowmax(a) * (a mm_tokens)), with a = act(res (mm_tokens + mm(mm_tokens))^T)."""

    petl_name = "prompt diffusion"
    petl_op = "apt"
    petl_published = "APT's approximate_prompt (mm, mm_tokens, activation, attn_drop, scale)"

    def forward(self, x, res):
        if x.shape != res.shape or own_forward_because(self, res):
            return super().forward(x, res)
        return self.petl_compute(self, x, res)

    @staticmethod
    def petl_looks_like(module):
        return {"mm", "mm_tokens"} <= names_in(module)

    @staticmethod
    def petl_refusal(module):
        if reason := refuse_names(module, ("mm", "mm_tokens", "activation", "attn_drop", "scale")):
            return reason
        prompts, pair = module.mm_tokens, module.mm
        if type(pair) is not nn.Sequential or [type(part) for part in pair] != [nn.Linear, nn.Linear]:
            return f"mm is {described(pair)}, not a Sequential of two Linear"
        if any(part.bias is not None for part in pair):
            return "mm has a bias"
        if not isinstance(prompts, torch.Tensor):
            return f"mm_tokens is {described(prompts)}, not a parameter"
        if prompts.dim() != 2 or not prompts.size(1) == pair[0].in_features == pair[1].out_features:
            sizes = f"{pair[0].in_features} to {pair[1].out_features}"
            return f"mm_tokens has the shape {list(prompts.shape)}, but mm goes from {sizes}"
        return (
            refuse_activation(module.activation, APT_ACTIVATIONS)
            or refuse_scale(module.scale)
            or refuse_dropout(module.attn_drop)
        )

    @staticmethod
    def petl_candidates(module):
        return [Settings(activation_of(module.activation))]

    @staticmethod
    def petl_examples(module, draw, *size):
        width = module.mm_tokens.size(1)
        return [(draw(*size, width), draw(*size, width))]

    @staticmethod
    def petl_compute(module, x, res):
        prompts = module.mm_tokens
        keys = prompts + module.mm(prompts)
        weights, activation = (prompts, keys, as_gain(module.scale)), module.petl_settings.activation
        out = apt(res, x, *weights, activation, dropout_of(module))
        return promoted(out, module.scale)

    @staticmethod
    def petl_sizes(module):
        return module.mm_tokens.size(1), module.mm_tokens.size(0)


class CrossAttention(Kind):
    """Multi-head attention; by the op where one query per sample reads tokens that are both keys and values. Its mask
    is True where a token is hidden."""

    petl_name = "cross-attention of one query"
    petl_op = "attention_pool"
    petl_published = "DVP's Cross_Attention (linear_v, linear_k, linear_q, linear_merge, dropout)"

    def forward(self, v, k, q, mask):
        if not _is_pooling(v, k, q, mask) or own_forward_because(self, v):
            return super().forward(v, k, q, mask)
        return self.petl_compute(self, v, k, q, mask)

    @staticmethod
    def petl_looks_like(module):
        return {"linear_v", "linear_k", "linear_q", "linear_merge"} <= names_in(module)

    @staticmethod
    def petl_refusal(module):
        if reason := refuse_names(module, ("linear_v", "linear_k", "linear_q", "linear_merge", "dropout")):
            return reason
        value, key, query, merge = module.linear_v, module.linear_k, module.linear_q, module.linear_merge
        if reason := refuse_linear(value, key, query, merge) or refuse_dropout(module.dropout):
            return reason
        heads, inner = getattr(module, "num_heads", None), query.out_features
        if type(heads) is not int or heads < 1 or inner % heads:
            return f"num_heads is {heads!r}, for a width of {inner}"
        if value.in_features != key.in_features or {value.out_features, key.out_features, merge.in_features} != {inner}:
            parts = {"linear_v": value, "linear_k": key, "linear_q": query, "linear_merge": merge}
            sizes = [f"{name} goes from {part.in_features} to {part.out_features}" for name, part in parts.items()]
            return f"its projections do not fit together: {', '.join(sizes)}"
        return ""

    @staticmethod
    def petl_candidates(module):
        return [Settings()]

    @staticmethod
    def petl_examples(module, draw, *size):
        if len(size) != 2:
            return []
        batch, tokens = size
        visual, query = draw(*size, module.linear_v.in_features), draw(batch, 1, module.linear_q.in_features)
        hidden = torch.zeros(batch, 1, 1, tokens, dtype=torch.bool, device="cpu")
        # The last tokens of one sample, all of the next.
        hidden[0, ..., (tokens + 1) // 2 :], hidden[1:2] = True, True
        return [(visual, visual, query, None), (visual, visual, query, hidden)]

    @staticmethod
    def petl_compute(module, v, k, q, mask):
        """As `petl_ext.VisualPromptLayer`: the key projection is folded into the query, and the value projection comes
        after pooling."""
        heads = module.num_heads
        query = module.linear_q(q[:, 0]).unflatten(1, (heads, -1))
        key, value = (part.weight.unflatten(0, (heads, -1)) for part in (module.linear_k, module.linear_v))
        folded, visible = torch.matmul(query.transpose(0, 1), key).transpose(0, 1), None
        if mask is not None:
            # Where all tokens of a sample are hidden, all of the original's scores are -1e9: its weights are equal.
            hidden = mask[:, 0, 0].expand(v.shape[:2])
            all_hidden = hidden.all(1, keepdim=True)
            visible, folded = ~hidden | all_hidden, folded.masked_fill(all_hidden[..., None], 0)
        pooled = attention_pool(v, folded, visible, query.size(-1) ** -0.5)
        context = torch.matmul(pooled.transpose(0, 1), value.mT).transpose(0, 1).flatten(1) + module.linear_v.bias
        # The key bias cancels in the softmax; DistributedDataParallel waits for a gradient of every parameter.
        return (module.linear_merge(context) + 0 * module.linear_k.bias.sum())[:, None]

    @staticmethod
    def petl_sizes(module):
        return module.linear_v.in_features, module.num_heads


def _is_pooling(v, k, q, mask):
    if k is not v or v.dim() != 3 or v.size(1) == 0 or q.dim() != 3 or q.shape[:2] != (v.size(0), 1):
        return False
    if mask is None:
        return True
    return mask.dtype is torch.bool and mask.dim() == 4 and mask.shape[1:] == (1, 1, v.size(1))
