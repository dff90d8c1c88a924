"""Attention pooling in Triton. The formula is that of petl_ext/ops/attention_pool.py.

The tokens of a sample are shared out in tiles and splits, whose number depends on N alone; scores pass through memory,
[B, H, N] in float32, so that the width D may be any.
"""

import torch
import triton
import triton.language as tl

from petl_ext.ops.attention_pool import check_arguments
from petl_ext.ops.triton.launching import (
    check_sizes,
    check_tensors,
    has_no_tensor_cores,
    launch,
    new_floats,
    new_gradient,
)
from petl_ext.ops.triton.products import narrow, product, store_tile, tile
from petl_ext.ops.triton.tiles import POOL_TILES, STATISTICS_TILES, TOKENS_PER_SPLIT, padded, tiles_for


@triton.jit
def _takes_part(mask, n, N, MASK: tl.constexpr):
    there = n < N
    if MASK:
        there = there & (tl.load(mask + n, mask=there, other=0) != 0)
    return there


@triton.jit
def _tokens(visual, token_stride, n, d, D, there):
    """[tokens, columns], zero where a token takes no part: what it holds is not read."""
    at = visual + n[:, None].to(tl.int64) * token_stride + d[None, :]
    return tl.load(at, mask=there[:, None] & (d[None, :] < D), other=0.0)


@triton.jit
def pool_scores(
    visual, sample_stride, token_stride, query, mask, scores, scale, N, D, H,
    HH: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, MASK: tl.constexpr,
):  # fmt: skip
    """scores [B, H, N] of one sample's tile of tokens, minus infinity where a token takes no part."""
    sample = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * BT + tl.arange(0, BT)
    h = tl.arange(0, HH)
    there = _takes_part(mask + sample * N, n, N, MASK)
    s = tl.zeros([HH, BT], tl.float32)
    for k in range(0, D, BK):
        d = k + tl.arange(0, BK)
        v = _tokens(visual + sample * sample_stride, token_stride, n, d, D, there)
        q = narrow(tile(query + sample * H * D, D, h, d, H, D), v.dtype)
        s = product(q, tl.trans(v), s)
    s = tl.where(there[None, :], s * scale, float("-inf"))
    store_tile(scores + sample * H * N, N, h, n, H, N, s)


@triton.jit
def pool_statistics(scores, statistics, N, total_heads, BT: tl.constexpr):
    """Of one head of one sample: the greatest score, and the sum of exp(score - greatest); NaN where there is one."""
    head = tl.program_id(0).to(tl.int64)
    greatest = tl.full([BT], float("-inf"), tl.float32)
    is_nan = tl.zeros([BT], tl.int32)
    for begin in range(0, N, BT):
        n = begin + tl.arange(0, BT)
        s = tl.load(scores + head * N + n, mask=n < N, other=float("-inf"))
        greatest = tl.maximum(greatest, s)
        is_nan = is_nan | (s != s).to(tl.int32)
    best = tl.max(greatest, 0)
    best = tl.where(tl.max(is_nan, 0) > 0, float("nan"), best)
    total = tl.zeros([BT], tl.float32)
    for begin in range(0, N, BT):
        n = begin + tl.arange(0, BT)
        s = tl.load(scores + head * N + n, mask=n < N, other=float("-inf"))
        total += tl.where(n < N, tl.exp(s - best), 0.0)
    tl.store(statistics + head, best)
    tl.store(statistics + total_heads + head, tl.sum(total, 0))


@triton.jit
def pool_sums(
    visual, sample_stride, token_stride, mask, left, statistics, sums, N, D, H, B, split_tokens,
    HH: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr, MASK: tl.constexpr, WEIGHTS: tl.constexpr,
):  # fmt: skip
    """sums [splits, B, H, D] of left visual over one split's tokens; WEIGHTS: left are scores, which become weights."""
    sample = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BD + tl.arange(0, BD)
    split = tl.program_id(2)
    h = tl.arange(0, HH)
    if WEIGHTS:
        best = tl.load(statistics + sample * H + h, mask=h < H, other=0.0)
        total = tl.load(statistics + (B + sample) * H + h, mask=h < H, other=1.0)
    e = tl.zeros([HH, BD], tl.float32)
    end = tl.minimum(N, (split + 1) * split_tokens)
    for begin in range(split * split_tokens, end, BT):
        n = begin + tl.arange(0, BT)
        there = _takes_part(mask + sample * N, n, end, MASK)
        v = _tokens(visual + sample * sample_stride, token_stride, n, d, D, there)
        w = tile(left + sample * H * N, N, h, n, H, end)
        if WEIGHTS:
            w = tl.where((n < end)[None, :], tl.exp(w - best[:, None]), 0.0)
        e = product(narrow(w, v.dtype), v, e)
    if WEIGHTS:
        e = e / total[:, None]
    store_tile(sums + (split * B + sample) * H * D, D, h, d, H, D, e)


@triton.jit
def pool_backward_tokens(
    dpooled, visual, sample_stride, token_stride, query, mask, pooled, statistics, dvisual, dscores, scale, N, D, H, B,
    HH: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, BN: tl.constexpr, MASK: tl.constexpr,
    DVISUAL: tl.constexpr, DQUERY: tl.constexpr,
):  # fmt: skip
    """Of one sample's tile of tokens: dvisual, and dscores [B, H, N] for dquery."""
    sample = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * BT + tl.arange(0, BT)
    h = tl.arange(0, HH)
    first = sample * H * D
    there = _takes_part(mask + sample * N, n, N, MASK)
    s = tl.zeros([HH, BT], tl.float32)
    dweights = tl.zeros([HH, BT], tl.float32)
    mean = tl.zeros([HH], tl.float32)
    for k in range(0, D, BK):
        d = k + tl.arange(0, BK)
        v = _tokens(visual + sample * sample_stride, token_stride, n, d, D, there)
        g = tile(dpooled + first, D, h, d, H, D)
        s = product(narrow(tile(query + first, D, h, d, H, D), v.dtype), tl.trans(v), s)
        dweights = product(g, tl.trans(v), dweights)
        mean += tl.sum(g.to(tl.float32) * tile(pooled + first, D, h, d, H, D).to(tl.float32), 1)
    best = tl.load(statistics + sample * H + h, mask=h < H, other=0.0)
    total = tl.load(statistics + (B + sample) * H + h, mask=h < H, other=1.0)
    w = tl.where((h < H)[:, None] & there[None, :], tl.exp(s * scale - best[:, None]) / total[:, None], 0.0)
    ds = tl.where((h < H)[:, None] & there[None, :], scale * w * (dweights - mean[:, None]), 0.0)
    if DQUERY:
        store_tile(dscores + sample * H * N, N, h, n, H, N, ds)
    if DVISUAL:
        w = tl.trans(narrow(w, visual.dtype.element_ty))
        ds = tl.trans(narrow(ds, visual.dtype.element_ty))
        for k in range(0, D, BN):
            d = k + tl.arange(0, BN)
            e = product(w, tile(dpooled + first, D, h, d, H, D), tl.zeros([BT, BN], tl.float32))
            e = product(ds, tile(query + first, D, h, d, H, D), e)
            store_tile(dvisual + sample * N * D, D, n, d, N, D, e)


class _Inputs:
    """What forward and backward share: checked, and as the kernels want it."""

    def __init__(self, visual, query, mask, scale, **more):
        check_arguments(visual, query, mask)
        check_tensors("attention_pool", visual=visual, query=query, **more)
        if mask is not None and mask.device != visual.device:
            raise RuntimeError(f"attention_pool: mask must be on {visual.device}, as visual is, got {mask.device}")
        for name, tensor in more.items():
            if tensor.shape != query.shape:
                raise RuntimeError(
                    f"attention_pool: {name} must have shape {list(query.shape)}, got {list(tensor.shape)}"
                )
            if tensor.dtype is not visual.dtype:
                raise RuntimeError(
                    f"attention_pool: {name} must have the dtype of visual, {visual.dtype}, got {tensor.dtype}"
                )
        self.samples, self.tokens, self.width = visual.shape
        self.heads = query.size(1)
        check_sizes("attention_pool", self.width, self.heads)
        self.visual = visual if visual.stride(2) == 1 else visual.contiguous()
        self.query, self.scale = query.contiguous(), scale
        self.mask = self.query if mask is None else mask.contiguous().view(torch.uint8)
        self.tiles = tiles_for(POOL_TILES, self.heads, has_no_tensor_cores(visual.dtype, visual.device))
        self.constants = {"HH": padded(self.heads), "BT": self.tiles.rows, "MASK": mask is not None, "like": visual}

    @property
    def of_visual(self):
        return self.visual, self.visual.stride(0), self.visual.stride(1)

    @property
    def tile_grid(self):
        return self.samples, triton.cdiv(self.tokens, self.tiles.rows)

    def sums(self, left, statistics, **constants):
        """left visual, [B, H, D] in float32."""
        splits = triton.cdiv(self.tokens, TOKENS_PER_SPLIT)
        sums = new_floats(self.visual, splits, self.samples, self.heads, self.width)
        launch(
            pool_sums,
            (self.samples, triton.cdiv(self.width, self.tiles.columns), splits),
            *(*self.of_visual, self.mask, left, statistics, sums),
            *(self.tokens, self.width, self.heads, self.samples, TOKENS_PER_SPLIT),
            BD=self.tiles.columns,
            tiles=self.tiles,
            **self.constants,
            **constants,
        )
        return sums[0] if splits == 1 else sums.sum(0)


def attention_pool_forward(visual, query, mask, scale):
    given = _Inputs(visual, query, mask, scale)
    statistics = new_floats(visual, 2, given.samples, given.heads)
    pooled = torch.empty(query.shape, dtype=visual.dtype, device=visual.device)
    if not given.samples:
        return pooled, statistics
    scores = new_floats(visual, given.samples, given.heads, given.tokens)
    sizes = (given.tokens, given.width, given.heads)
    launch(
        pool_scores,
        given.tile_grid,
        *(*given.of_visual, given.query, given.mask, scores, scale, *sizes),
        BK=given.tiles.depth,
        tiles=given.tiles,
        **given.constants,
    )
    heads = given.samples * given.heads
    launch(
        pool_statistics,
        (heads,),
        *(scores, statistics, given.tokens, heads),
        BT=STATISTICS_TILES.rows,
        tiles=STATISTICS_TILES,
        like=visual,
    )
    return pooled.copy_(given.sums(scores, statistics, WEIGHTS=True)), statistics


def attention_pool_backward(dpooled, visual, query, mask, pooled, statistics, scale, needs_dvisual, needs_dquery):
    given = _Inputs(visual, query, mask, scale, dpooled=dpooled, pooled=pooled)
    shape = (2, given.samples, given.heads)
    if statistics.shape != shape or statistics.dtype is not torch.float32 or not statistics.is_contiguous():
        raise RuntimeError(
            "attention_pool: statistics must be contiguous and torch.float32, as the forward op returned it"
        )
    dvisual, dquery = new_gradient(visual, needs_dvisual), new_gradient(query, needs_dquery)
    if not given.samples:
        return dvisual, dquery
    dscores = new_floats(visual, *(shape[1:] if needs_dquery else (1, 1)), given.tokens)
    launch(
        pool_backward_tokens,
        given.tile_grid,
        *(dpooled.contiguous(), *given.of_visual, given.query, given.mask, pooled.contiguous(), statistics),
        *(dvisual, dscores, scale, given.tokens, given.width, given.heads, given.samples),
        BK=given.tiles.depth,
        BN=given.tiles.columns,
        DVISUAL=needs_dvisual,
        DQUERY=needs_dquery,
        tiles=given.tiles,
        **given.constants,
    )
    if needs_dquery and given.tokens == 1:
        dquery.zero_()  # one token's weight is 1, whatever the query is
    elif needs_dquery:
        dquery.copy_(given.sums(dscores, statistics, WEIGHTS=False))
    return dvisual, dquery
