"""Attention pooling: one query per head, and tokens that are their own keys and values.

    scores = scale * query visual^T    weights = softmax over the tokens    pooled = weights visual

It is multi-head cross-attention of one query row, rewritten: with the key projection folded into the query and the
value projection applied to what was pooled, the tokens need neither. Source: the cross-attention of "Adapting
Pre-trained Language Models to Vision-Language Tasks via Dynamic Visual Prompting" (arXiv 2306.00409).
"""

from math import prod

import torch
from torch import Tensor

from petl_ext.ops.arrays import takes_arrays
from petl_ext.ops.autocast import as_autocast_wants
from petl_ext.ops.derivatives import differentiable_gradients
from petl_ext.ops.kernels import raw_ops_for, register

# statistics [2, B, H] are for backward, in float32: the greatest of a head's scores, and the sum of
# exp(score - greatest). Their logarithm's sum would do, but lose digits where scores are large.
torch.library.define(
    "petl_ext::attention_pool_forward",
    "(Tensor visual, Tensor query, Tensor? mask, float scale) -> (Tensor pooled, Tensor statistics)",
)
# needs_* say which gradients to compute, the others come back empty.
torch.library.define(
    "petl_ext::attention_pool_backward",
    "(Tensor dpooled, Tensor visual, Tensor query, Tensor? mask, Tensor pooled, Tensor statistics, float scale,"
    " bool needs_dvisual, bool needs_dquery) -> (Tensor dvisual, Tensor dquery)",
)


def check_arguments(visual, query, mask):
    """The arguments' checks for float64, meta tensors and torch.compile, which never reach a kernel; the kernels repeat
    them in C++."""
    if torch.jit.is_tracing():  # sizes are tensors, of which it warns
        return
    if visual.dim() != 3 or visual.size(1) == 0 or visual.size(2) == 0:
        raise RuntimeError(
            f"attention_pool: visual must have shape [B, N, D] with N and D above zero, got {list(visual.shape)}"
        )
    batch, tokens, width = visual.shape
    if query.dim() != 3 or query.size(0) != batch or query.size(1) == 0 or query.size(2) != width:
        raise RuntimeError(
            f"attention_pool: query must have shape [{batch}, H, {width}] with H above zero, got {list(query.shape)}"
        )
    if mask is None:
        return
    if mask.shape != (batch, tokens):
        raise RuntimeError(f"attention_pool: mask must have shape [{batch}, {tokens}], got {list(mask.shape)}")
    if mask.dtype is not torch.bool:
        raise RuntimeError(f"attention_pool: mask must be bool, True where a token takes part, got {mask.dtype}")


def attention_pool_reference(
    visual: Tensor, query: Tensor, mask: Tensor | None = None, scale: float = 1.0, dropout: float = 0.0
) -> Tensor:
    """`attention_pool` in plain PyTorch, in the dtype of visual, on any device and in float64 too; it can drop out
    weights. A sample of which no token takes part becomes NaN, as in torch's softmax.

    Args:
        dropout: probability that a weight is set to zero.

    Raises:
        RuntimeError: a shape is not as `attention_pool` says, or mask is not bool.
    """
    visual = as_autocast_wants(visual)
    check_arguments(visual, query, mask)
    if mask is not None:
        # A weight of zero would let a NaN through.
        visual = visual.masked_fill(~mask[..., None], 0)
    scores = query.to(visual.dtype) @ visual.mT * scale
    if mask is not None:
        scores = scores.masked_fill(~mask[:, None], float("-inf"))
    weights = torch.softmax(scores, dim=-1, dtype=visual.dtype)
    return torch.dropout(weights, dropout, dropout > 0) @ visual


@torch.library.register_fake("petl_ext::attention_pool_forward")
def _(visual, query, mask, scale):
    check_arguments(visual, query, mask)
    devices = {str(tensor.device) for tensor in (visual, query, mask) if tensor is not None}
    if len(devices) > 1:
        raise RuntimeError(f"attention_pool: all arguments must be on one device, got {', '.join(sorted(devices))}")
    return visual.new_empty(query.shape), visual.new_empty((2, *query.shape[:2]), dtype=torch.float32)


@torch.library.register_fake("petl_ext::attention_pool_backward")
def _(dpooled, visual, query, mask, pooled, statistics, scale, needs_dvisual, needs_dquery):
    dvisual = visual.new_empty(visual.shape if needs_dvisual else (0,))
    return dvisual, query.new_empty(query.shape if needs_dquery else (0,))


def _forward_flops(visual, query, *_, **__):
    """visual query^T and weights visual: B N H D each."""
    return 2 * 2 * visual[1] * prod(query)


def _backward_flops(dpooled, visual, query, *rest, **_):
    """visual query^T, as weights are not kept, and visual dpooled^T always; dscores query and weights dpooled for
    dvisual, dscores visual for dquery: B N H D each."""
    needs_dvisual, needs_dquery = rest[-2:]
    return 2 * (2 + 2 * needs_dvisual + needs_dquery) * visual[1] * prod(query)


def _sizes(tensors):
    visual, query = tensors
    return visual.size(0) * visual.size(1), visual.size(2), query.size(1), str(query.dtype).removeprefix("torch.")


register("attention_pool", _forward_flops, _backward_flops, _sizes)


class _AttentionPool(torch.autograd.Function):
    @staticmethod
    def forward(ctx, visual, query, mask, scale, raw_ops):
        pooled, statistics = getattr(torch.ops, raw_ops).attention_pool_forward(visual, query, mask, scale)
        ctx.save_for_backward(visual, query, mask, pooled, statistics)
        ctx.scale, ctx.raw_ops = scale, raw_ops
        return pooled

    @staticmethod
    def backward(ctx, dpooled):
        needs = ctx.needs_input_grad[:2]
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            visual, query, mask, *_ = ctx.saved_tensors
            gradients = differentiable_gradients(
                lambda visual, query: attention_pool_reference(visual, query, mask, ctx.scale),
                (visual, query),
                needs,
                dpooled,
            )
            return *gradients, None, None, None
        raw_ops = getattr(torch.ops, ctx.raw_ops)
        gradients = raw_ops.attention_pool_backward(dpooled, *ctx.saved_tensors, ctx.scale, *needs)
        return *(d if needed else None for d, needed in zip(gradients, needs, strict=True)), None, None, None


@takes_arrays
def attention_pool(
    visual: Tensor, query: Tensor, mask: Tensor | None = None, scale: float = 1.0, dropout: float = 0.0
) -> Tensor:
    """Pools each sample's tokens by one softmax per head: `pooled = softmax(scale * query visual^T) visual`.

    The tokens are read once forward and once backward, in samples of which one token has most of a head's weight twice;
    no weights are kept for backward, where they are computed again.

    Args:
        visual: [B, N, D], the tokens. Any strides; tokens whose rows are not contiguous are copied.
        query: [B, H, D], of each sample one query per head, in visual's space. Those of multi-head attention with the
            key weight Wk are `q_h Wk_h`, of head h's rows of Wk; the key's bias cancels in the softmax.
        mask: bool [B, N], True where a token takes part; None: all do. What the others hold is not read, and their
            gradient is zero. Of each sample at least one must take part.
        scale: a number, for multi-head attention 1 / sqrt(width of a head).
        dropout: probability that a weight is set to zero.

    visual and query are float32, bfloat16 or float16, in any mixture; scores, softmax and sums are float32. Under
    autocast a float32 visual is rounded to autocast's dtype, as for torch.matmul. Where visual needs no gradient,
    backward computes that of query alone, and writes nothing of visual's size.

    The reference computes where a tensor is float64 or a dropout is above 0, for derivatives in forward mode and those
    of the gradients (`create_graph=True`), inside transformations of torch.func and under torch.jit.trace, and where
    `petl_ext.ops.backend` has chosen it.

    On CUDA, D is a multiple of 8 up to 8192 and H at most 64; the query is rounded to the dtype of visual, and visual
    is copied where rows are not aligned to 16 bytes.

    A sample of which no token takes part is an error of the CPU's kernels. Elsewhere, and where the reference computes,
    its rows of the result are NaN: to look would mean to wait for the device.

    Returns:
        [B, H, D], in the dtype of visual (under autocast, in autocast's).

    Raises:
        RuntimeError: a shape, dtype or device is not as above, or no token of a sample takes part.
        ValueError: dropout is no number in [0, 1).
        NotImplementedError: there is no kernel for the tensors' device.
    """
    visual, scale = as_autocast_wants(visual), float(scale)
    raw_ops = raw_ops_for("attention_pool", (visual, query), dropout)
    if raw_ops is None:
        return attention_pool_reference(visual, query, mask, scale, dropout)
    if torch.is_grad_enabled() and (visual.requires_grad or query.requires_grad):
        return _AttentionPool.apply(visual, query, mask, scale, raw_ops)
    return getattr(torch.ops, raw_ops).attention_pool_forward(visual, query, mask, scale)[0]
