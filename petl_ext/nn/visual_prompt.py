"""The layer of dynamic visual prompting."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from petl_ext.checks import check_positive_integer, check_probability
from petl_ext.ops.attention_pool import attention_pool


class VisualPromptLayer(nn.Module):
    """Pools an image's tokens into one prompt, by the attention of one query of text (DVP, arXiv 2306.00409).

    It is multi-head attention with one query per sample, computed without a projected token: the key projection is
    folded into the query, and the value projection comes after pooling. That is exact. The key bias adds one number to
    all scores of a head, which softmax takes out again, and the weights of a head sum to 1 before the value bias.
    Where `key` or `value` has been replaced, wrapped or hooked, as by LoRA, quantization or offloading, its weight does
    not say what it computes: then both project every token, as in ordinary attention.

    It holds the four linear layers `query` [I, D], `key` and `value` [I, Dv] and `output` [D, I], with biases: the
    authors' `linear_q`, `linear_k`, `linear_v` and `linear_merge`, initialized as torch's nn.Linear. `key.bias` is
    there for their checkpoints; its gradient is exactly zero.

    Args:
        dim: the language model's width D.
        num_heads: H.
        visual_dim: the width Dv of the image's tokens; None is D.
        inner_dim: the width I of all heads together; None is D. The authors take 512 with 16 heads for LLaMA.
        dropout: on the attention weights, in training. Above 0 plain PyTorch computes the training forward: the kernels
            of attention pooling have no dropout.

    Raises:
        ValueError: a size below 1, an inner_dim that num_heads do not divide, or a dropout outside [0, 1).
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 12,
        visual_dim: int | None = None,
        inner_dim: int | None = None,
        dropout: float = 0.0,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        visual_dim = dim if visual_dim is None else visual_dim
        inner_dim = dim if inner_dim is None else inner_dim
        sizes = {"dim": dim, "num_heads": num_heads, "visual_dim": visual_dim, "inner_dim": inner_dim}
        for name, value in sizes.items():
            check_positive_integer(f"VisualPromptLayer: {name}", value)
        if inner_dim % num_heads:
            raise ValueError(
                f"VisualPromptLayer: inner_dim must be a multiple of num_heads {num_heads}, got {inner_dim}"
            )
        check_probability("VisualPromptLayer: dropout", dropout)
        self.num_heads = num_heads
        self.dropout = dropout
        factory = {"device": device, "dtype": dtype}
        self.query = nn.Linear(dim, inner_dim, **factory)
        self.key = nn.Linear(visual_dim, inner_dim, **factory)
        self.value = nn.Linear(visual_dim, inner_dim, **factory)
        self.output = nn.Linear(inner_dim, dim, **factory)

    def forward(self, visual: Tensor, query: Tensor, mask: Tensor | None = None) -> Tensor:
        """
        Args:
            visual: the image's tokens [B, N, Dv].
            query: [B, D].
            mask: bool [B, N], True where a token takes part; None is all.

        Returns:
            The prompt [B, D].

        Raises:
            ValueError: a shape does not fit, or a sample has no token that takes part.
        """
        self._check(visual, query, mask)
        queries = self._by_head(self.query(query))
        if not (_is_plain_linear(self.key) and _is_plain_linear(self.value)):
            return self.output(self._attend(visual, queries, mask).flatten(1))
        folded = _per_head(queries, self._by_head(self.key.weight, dim=0))
        pooled, weight = self._pool(visual, folded, mask)
        context = _per_head(pooled, self._by_head(self.value.weight, dim=0).mT)
        context = context + weight * self._by_head(self.value.bias)
        # Of the key bias only a gradient of zero is left: DistributedDataParallel waits for one of every parameter.
        return self.output(context.flatten(1)) + 0 * self.key.bias.sum()

    def _attend(self, visual, queries, mask):
        """[B, H, d] by projecting every token with `key` and `value` themselves."""
        keys, values = (self._by_head(project(visual)).transpose(1, 2) for project in (self.key, self.value))
        scores = queries[:, :, None] @ keys.mT * self._scale
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
        if mask is not None:
            scores = scores.masked_fill(~mask[:, None, None], float("-inf"))
        weights = F.dropout(scores.softmax(-1), self.dropout, self.training).to(values.dtype)
        return (weights @ values)[:, :, 0]

    @property
    def _scale(self):
        return (self.value.out_features // self.num_heads) ** -0.5

    def _by_head(self, tensor, dim=-1):
        return tensor.unflatten(dim, (self.num_heads, -1))

    def _pool(self, visual, folded, mask):
        """(pooled [B, H, Dv], sums of the weights by which they are pooled, to be multiplied with [H, d])."""
        scale = self._scale
        if not (self.training and self.dropout > 0):
            return attention_pool(visual, folded, mask, scale), 1
        # Weights that dropout has left do not sum to 1. A column of ones beside the tokens is pooled to their sum.
        visual, folded = F.pad(visual, (0, 1), value=1.0), F.pad(folded, (0, 1))
        pooled = attention_pool(visual, folded, mask, scale, self.dropout)
        return pooled[..., :-1], pooled[..., -1:]

    def _check(self, visual, query, mask):
        if torch.jit.is_tracing():  # sizes are tensors, of which it warns
            return
        width, dim = self.value.in_features, self.query.in_features
        if visual.dim() != 3 or visual.size(1) == 0 or visual.size(2) != width:
            raise ValueError(
                f"VisualPromptLayer: visual must be [B, N, {width}] with N above zero, got {list(visual.shape)}"
            )
        # Not len(visual), a constant to torch.export.
        if query.dim() != 2 or query.size(0) != visual.size(0) or query.size(1) != dim:
            raise ValueError(
                f"VisualPromptLayer: query must be [{len(visual)}, {dim}], a row for each sample of visual, "
                f"got {list(query.shape)}"
            )
        if mask is None:
            return
        if mask.shape != visual.shape[:2] or mask.dtype is not torch.bool:
            raise ValueError(
                f"VisualPromptLayer: mask must be bool {list(visual.shape[:2])}, got {mask.dtype} {list(mask.shape)}"
            )
        if not (mask.is_meta or torch.compiler.is_compiling()) and not mask.any(1).all():
            empty = (~mask.any(1)).nonzero()[0].item()
            raise ValueError(f"VisualPromptLayer: mask hides all tokens of sample {empty}")

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, dropout={self.dropout}"


def _is_plain_linear(module):
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return type(module) is nn.Linear and not any(hooks) and "forward" not in vars(module)


def _per_head(rows, weights):
    """rows [B, H, n] times weights [H, n, m], head by head, to [B, H, m]."""
    return torch.matmul(rows.transpose(0, 1), weights).transpose(0, 1)
