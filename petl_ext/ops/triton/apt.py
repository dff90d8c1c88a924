"""Approximated prompt tuning in Triton. The formula is that of petl_ext/ops/apt.py."""

import torch
import triton
import triton.language as tl

from petl_ext.ops.apt import check_arguments
from petl_ext.ops.triton.dropout import dropout_arguments, keep_factors
from petl_ext.ops.triton.launching import (
    check_sizes,
    check_tensors,
    gradient_of_weight,
    launch,
    new_floats,
    new_gradient,
    row_tiles,
    rows_of,
)
from petl_ext.ops.triton.products import finite, narrow, product, rest_of, store_tile, tile
from petl_ext.ops.triton.tiles import columns_of, padded


@triton.jit
def apt_forward_rows(
    x, x_stride, y, y_stride, prompts, keys, log_scale, out, gate, scores, seeds, threshold, drop_scale, R, D, P, kept,
    PP: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, BN: tl.constexpr,
    SOFTMAX: tl.constexpr, REST: tl.constexpr, KEEP: tl.constexpr, DROPS: tl.constexpr,
):  # fmt: skip
    """Of BM rows. REST: the product sees what rounding the keys leaves out, too, since it decides ReLU's mask."""
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    p = tl.arange(0, PP)
    s = tl.zeros([BM, PP], tl.float32)
    for k in range(0, D, BK):
        d = k + tl.arange(0, BK)
        a = tile(x, x_stride, rows, d, R, D)
        b = tile(keys, D, p, d, P, D)
        s = product(a, tl.trans(narrow(b, a.dtype)), s)
        if REST:
            s = product(finite(a), tl.trans(narrow(rest_of(b, a.dtype), a.dtype)), s)
    s = tl.where(p[None, :] < P, s, float("-inf") if SOFTMAX else 0.0)  # beyond P an infinity of x makes it NaN
    is_nan = tl.max((s != s).to(tl.int32), 1) > 0
    if SOFTMAX:
        h = tl.exp(s - tl.max(s, 1)[:, None])
        g = 1 / tl.sum(h, 1)
        s = h * g[:, None]
    else:
        s = tl.where(s < 0, 0.0, s)  # a NaN stays one, of the gate too
    left = s
    if DROPS:
        left = s * keep_factors(seeds, threshold, drop_scale, rows, BM, PP, DROPS)
        is_nan |= tl.max((left != left).to(tl.int32), 1) > 0  # a dropped infinity
    if DROPS or not SOFTMAX:
        g = tl.max(left, 1)
        # In [0, 1], so that float16 cannot overflow. The least normal number is the least whose inverse is finite.
        h = left / tl.where(g >= 1.1754944e-38, g, float("inf"))[:, None]
        h = tl.where(left == float("inf"), left, h)
    g = tl.where(is_nan, float("nan"), g)
    h = narrow(tl.where(is_nan[:, None], float("nan"), h), x.dtype.element_ty)
    tl.store(gate + rows, g, mask=rows < R)
    if KEEP:
        store_tile(scores, kept, rows, p, R, kept, s)
    scale = tl.exp(tl.load(log_scale).to(tl.float32))
    for n in range(0, D, BN):
        d = n + tl.arange(0, BN)
        e = product(h, tile(prompts, D, p, d, P, D), tl.zeros([BM, BN], tl.float32))
        v = tile(y, y_stride, rows, d, R, D).to(tl.float32)
        store_tile(out, D, rows, d, R, D, scale * (v + (g * g)[:, None] * e))


@triton.jit
def apt_backward_rows(
    dout, dout_stride, y, y_stride, prompts, keys, log_scale, gate, scores, dx, dy, dscores, weighted, shares,
    seeds, threshold, drop_scale, R, D, P, kept,
    PP: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, BN: tl.constexpr, SOFTMAX: tl.constexpr,
    DX: tl.constexpr, DY: tl.constexpr, DWEIGHTS: tl.constexpr, DSCALE: tl.constexpr, DROPS: tl.constexpr,
):  # fmt: skip
    """Of BM rows: dx, dy, the left factors of the weights' gradients, and each row's share of dlog_scale."""
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    p = tl.arange(0, PP)
    scale = tl.exp(tl.load(log_scale).to(tl.float32))
    ds = tl.zeros([BM, PP], tl.float32)
    share = tl.zeros([BM], tl.float32)
    for k in range(0, D, BK):
        d = k + tl.arange(0, BK)
        a = tile(dout, dout_stride, rows, d, R, D)
        ds = product(a, tl.trans(narrow(tile(prompts, D, p, d, P, D), a.dtype)), ds)
        if DY:
            store_tile(dy, D, rows, d, R, D, scale * a.to(tl.float32))
        if DSCALE:
            share += tl.sum(a.to(tl.float32) * tile(y, y_stride, rows, d, R, D).to(tl.float32), 1)
    s = tile(scores, kept, rows, p, R, kept).to(tl.float32)
    factor = scale * tl.load(gate + rows, mask=rows < R, other=0.0)
    factors = keep_factors(seeds, threshold, drop_scale, rows, BM, PP, DROPS)
    ds = tl.where(p[None, :] < P, ds * factors, 0.0)
    total = tl.sum(s * ds, 1)
    if DSCALE:
        tl.store(shares + rows, factor * total + scale * share, mask=rows < R)
    # Under ReLU it is NaN, not zero, at a NaN.
    ds = factor[:, None] * (s * (ds - total[:, None]) if SOFTMAX else tl.where(s <= 0, 0.0, ds))
    ds = narrow(ds, dout.dtype.element_ty)
    if DWEIGHTS:
        store_tile(dscores, kept, rows, p, R, kept, ds)
        store_tile(weighted, kept, rows, p, R, kept, factor[:, None] * s * factors)
    if DX:
        for n in range(0, D, BN):
            d = n + tl.arange(0, BN)
            e = product(ds, tile(keys, D, p, d, P, D), tl.zeros([BM, BN], tl.float32))
            store_tile(dx, D, rows, d, R, D, e)


def _kept_dtype(x, y):
    return torch.bfloat16 if x.dtype is y.dtype is torch.bfloat16 else torch.float32


def _in_one_dtype(x, *others):
    """Their rows, in float32 where dtypes differ."""
    is_one = all(other.dtype is x.dtype for other in others)
    return [rows_of(tensor if is_one else tensor.float()) for tensor in (x, *others)]


def _prepared(x, y, prompts, keys, log_scale, activation, **more):
    """Checks the arguments; (R, D, P, the constants of both kernels)."""
    check_arguments(x, y, prompts, keys, log_scale, activation)
    check_tensors("apt", x=x, y=y, prompts=prompts, keys=keys, log_scale=log_scale, **more)
    inner, width = prompts.shape
    check_sizes("apt", width, inner)
    dtype = x.dtype if x.dtype is y.dtype else torch.float32
    tiles = row_tiles(inner, dtype, x.device)
    constants = {"PP": padded(inner), "BM": tiles.rows, "BK": tiles.depth}
    constants |= {"SOFTMAX": activation == "softmax", "tiles": tiles, "like": x}
    return x.numel() // width, width, inner, constants


def apt_forward(
    x, y, prompts, keys, log_scale, activation, keep_scores, packed=None, dropout=0.0, seeds=None, begun=None
):
    """packed and begun are None: petl_ext packs weights, and begins, for its own kernels alone."""
    rows, width, inner, constants = _prepared(x, y, prompts, keys, log_scale, activation)
    x_rows, y_rows = _in_one_dtype(x, y)
    kept = -(-inner // 8) * 8
    drop, drops = dropout_arguments("apt", x, dropout, seeds)
    is_crowded = drops and x_rows.dtype is not torch.float32  # of floats, few columns would spill
    constants |= {"DROPS": drops, "BN": columns_of(constants["tiles"], inner, is_crowded)}
    out, gate = torch.empty(y.shape, dtype=y.dtype, device=y.device), new_floats(y, rows)
    scores = torch.empty((rows, kept) if keep_scores else (0,), dtype=_kept_dtype(x, y), device=y.device)
    if rows:
        launch(
            apt_forward_rows,
            (triton.cdiv(rows, constants["BM"]),),
            *(x_rows, x_rows.stride(0), y_rows, y_rows.stride(0), prompts.contiguous(), keys.contiguous(), log_scale),
            *(out, gate, scores, *drop, rows, width, inner, kept),
            REST=activation == "relu" and x_rows.dtype is not torch.float32 and keys.dtype is not x_rows.dtype,
            KEEP=keep_scores,
            **constants,
        )
    return out, gate, scores


def _check_kept(dout, x, y, gate, scores, shapes):
    for name, tensor, dtype in (("gate", gate, torch.float32), ("scores", scores, _kept_dtype(x, dout))):
        if tensor.shape != shapes[name] or tensor.dtype is not dtype or not tensor.is_contiguous():
            raise RuntimeError(f"apt: {name} must be contiguous and {dtype}, as the forward op returned it")
    if y is not None and y.dtype is not dout.dtype:
        raise RuntimeError("apt: dout must have the dtype of y")


def apt_backward(
    dout, x, y, prompts, keys, log_scale, gate, scores, activation, needs_dx, needs_dy, needs_dprompts, needs_dkeys,
    dropout=0.0, seeds=None,
):  # fmt: skip
    rows, width, inner, constants = _prepared(x, dout, prompts, keys, log_scale, activation, dout=dout)
    kept = -(-inner // 8) * 8
    _check_kept(dout, x, y, gate, scores, {"gate": (rows,), "scores": (rows, kept)})
    dout_rows, x_rows, y_rows = _in_one_dtype(dout, x, dout if y is None else y)
    drop, drops = dropout_arguments("apt", x, dropout, seeds)
    constants |= {"DROPS": drops, "BN": columns_of(constants["tiles"], inner, drops)}
    dx, dy = new_gradient(x, needs_dx), new_gradient(dout, needs_dy)
    gradients = [new_gradient(prompts, needs_dprompts), new_gradient(keys, needs_dkeys)]
    gradients.append(new_gradient(log_scale, y is not None))
    if not rows:
        return dx, dy, *(gradient.zero_() for gradient in gradients)
    lefts = dout_rows.new_empty((2, rows, kept) if needs_dprompts or needs_dkeys else (2, 1, 1))
    shares = new_floats(x, rows)
    launch(
        apt_backward_rows,
        (triton.cdiv(rows, constants["BM"]),),
        *(dout_rows, dout_rows.stride(0), y_rows, y_rows.stride(0), prompts.contiguous(), keys.contiguous(), log_scale),
        *(gate, scores, dx, dy, *lefts, shares, *drop, rows, width, inner, kept),
        DX=needs_dx,
        DY=needs_dy,
        DWEIGHTS=needs_dprompts or needs_dkeys,
        DSCALE=y is not None,
        **constants,
    )
    dscores, weighted = lefts
    if needs_dprompts:
        gradients[0].copy_(gradient_of_weight(weighted, dout_rows, inner))
    if needs_dkeys:
        gradients[1].copy_(gradient_of_weight(dscores, x_rows, inner))
    if y is not None:
        gradients[2].copy_(shares.sum())
    return dx, dy, *gradients
