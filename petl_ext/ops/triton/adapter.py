"""The bottleneck adapter in Triton. The formula is that of petl_ext/ops/adapter.py.

LayerNorm's bias gives every row the same hidden units: they are added to the bias of the down projection, so that what
the products say of a row is not lost where that bias is far greater than the weight.
"""

import torch
import triton
import triton.language as tl

from petl_ext.ops.adapter import check_arguments
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
    sum_of_columns,
)
from petl_ext.ops.triton.products import centred, finite, narrow, product, rest_of, store_tile, tile
from petl_ext.ops.triton.tiles import columns_of, padded


@triton.jit
def _statistics(x, x_stride, rows, R, D, eps, BM: tl.constexpr, BK: tl.constexpr):
    """(mean, what rounding left out of it, inverse deviation) of each row, the squares taken around the mean."""
    mean = tl.zeros([BM], tl.float32)
    for k in range(0, D, BK):
        mean += tl.sum(tile(x, x_stride, rows, k + tl.arange(0, BK), R, D).to(tl.float32), 1)
    mean = mean / D
    squares = tl.zeros([BM], tl.float32)
    rest = tl.zeros([BM], tl.float32)
    for k in range(0, D, BK):
        d = k + tl.arange(0, BK)
        v = tl.where(d[None, :] < D, tile(x, x_stride, rows, d, R, D).to(tl.float32) - mean[:, None], 0.0)
        squares += tl.sum(v * v, 1)
        rest += tl.sum(v, 1)
    # Kept beside the mean: in a row far from zero it is as large as deviations are, and lost in the sum of the two.
    rest = rest / D
    return mean, rest, 1 / tl.sqrt(squares / D - rest * rest + eps)


@triton.jit
def _store_statistics(out, statistics, rows, R):
    mean, rest, inverse = statistics
    tl.store(out + rows, mean, mask=rows < R)
    tl.store(out + R + rows, rest, mask=rows < R)
    tl.store(out + R + R + rows, inverse, mask=rows < R)


@triton.jit
def _activated(values, ACTIVATION: tl.constexpr):
    if ACTIVATION == "relu":
        values = tl.where(values < 0, 0.0, values)
    elif ACTIVATION == "gelu":
        values = 0.5 * values * (1 + tl.erf(values * 0.7071067811865476))
    else:
        values = values * tl.sigmoid(values)
    return values


@triton.jit
def _before_activation(gradient, values, ACTIVATION: tl.constexpr):
    """The gradient of `values` from that of the activation's output."""
    if ACTIVATION == "relu":
        gradient = tl.where(values <= 0, 0.0, gradient)  # at a NaN it is NaN, not zero
    elif ACTIVATION == "gelu":
        density = 0.3989422804014327 * tl.exp(-0.5 * values * values)
        gradient *= 0.5 * (1 + tl.erf(values * 0.7071067811865476)) + values * density
    else:
        gate = tl.sigmoid(values)
        gradient *= gate * (1 + values * (1 - gate))
    return gradient


@triton.jit
def _normalized(values, statistics, norm_weight, d, D):
    mean, rest, inverse = statistics
    weight = tl.load(norm_weight + d, mask=d < D, other=0.0).to(tl.float32)
    return centred(values, mean, rest) * inverse[:, None] * weight[None, :]


@triton.jit
def _before_norm(gradient, x, statistics, norm_weight, d, D, first, second):
    """The gradient of x from that of the normalized row; first and second: means over the width of the row of
    gradient * norm_weight, and of that times the normalized row before its weight."""
    mean, rest, inverse = statistics
    weight = tl.load(norm_weight + d, mask=d < D, other=0.0).to(tl.float32)
    z = centred(x, mean, rest) * inverse[:, None]
    return inverse[:, None] * (gradient * weight[None, :] - first[:, None] - z * second[:, None])


@triton.jit
def _project(
    x, x_stride, rows, d, R, D, statistics, norm_weight, down, b, B, sums, NORM: tl.constexpr, REST: tl.constexpr
):
    """sums + (norm(x) - norm_bias) down^T, of the columns d.

    REST: what rounding the normalized row, or down, leaves out is multiplied too, since it decides ReLU's mask.
    """
    v = tile(x, x_stride, rows, d, R, D)
    w = tl.trans(tile(down, D, b, d, B, D))
    if NORM:
        wide = _normalized(v, statistics, norm_weight, d, D)
        v = narrow(wide, v.dtype)
        if REST:
            sums = product(narrow(rest_of(wide, v.dtype), v.dtype), w, sums)
    if REST and down.dtype.element_ty != v.dtype:
        sums = product(finite(v), rest_of(w, v.dtype), sums)
    return product(v, w, sums)


@triton.jit
def adapter_forward_rows(
    x, x_stride, residual, residual_stride, norm_weight, down, down_bias, up, up_bias, factor, out,
    seeds, threshold, drop_scale, eps, R, D, B,
    BB: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, BN: tl.constexpr,
    ACTIVATION: tl.constexpr, NORM: tl.constexpr, RESIDUAL: tl.constexpr, REST: tl.constexpr, DROPS: tl.constexpr,
):  # fmt: skip
    """Of BM rows."""
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    b = tl.arange(0, BB)
    nothing = tl.zeros([BM], tl.float32)
    statistics = (nothing, nothing, nothing)
    if NORM:
        statistics = _statistics(x, x_stride, rows, R, D, eps, BM, BK)
    hidden = tl.zeros([BM, BB], tl.float32)
    for k in range(0, D, BK):
        d = k + tl.arange(0, BK)
        hidden = _project(x, x_stride, rows, d, R, D, statistics, norm_weight, down, b, B, hidden, NORM, REST)
    hidden += tl.load(down_bias + b, mask=b < B, other=0.0)[None, :]
    hidden = tl.where(b[None, :] < B, _activated(hidden, ACTIVATION), 0.0)
    hidden *= keep_factors(seeds, threshold, drop_scale, rows, BM, BB, DROPS)
    hidden = narrow(hidden, x.dtype.element_ty)
    f = tl.load(factor)
    for n in range(0, D, BN):
        d = n + tl.arange(0, BN)
        u = narrow(tile(up, B, d, b, D, B), hidden.dtype)
        e = product(hidden, tl.trans(u), tl.zeros([BM, BN], tl.float32))
        e = f * (e + tl.load(up_bias + d, mask=d < D, other=0.0).to(tl.float32)[None, :])
        if RESIDUAL:
            e += tile(residual, residual_stride, rows, d, R, D).to(tl.float32)
        store_tile(out, D, rows, d, R, D, e)


@triton.jit
def adapter_backward_rows(
    dout, dout_stride, x, x_stride, norm_weight, down, down_bias, up, up_bias, norm_down, factor,
    dx, hidden_out, dhidden_out, dhidden_sums, statistics_out, shares, seeds, threshold, drop_scale, eps, R, D, B, kept,
    BB: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, BN: tl.constexpr,
    ACTIVATION: tl.constexpr, NORM: tl.constexpr, RESIDUAL: tl.constexpr, REST: tl.constexpr, DROPS: tl.constexpr,
    DX: tl.constexpr, DWEIGHTS: tl.constexpr, DGAIN: tl.constexpr,
):  # fmt: skip
    """Of BM rows: dx, left factors of the weights' gradients, shares of dgain / scale. norm_down: down norm_weight."""
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    b = tl.arange(0, BB)
    nothing = tl.zeros([BM], tl.float32)
    statistics = (nothing, nothing, nothing)
    if NORM:
        statistics = _statistics(x, x_stride, rows, R, D, eps, BM, BK)
        _store_statistics(statistics_out, statistics, rows, R)
    projected = tl.zeros([BM, BB], tl.float32)
    dhidden = tl.zeros([BM, BB], tl.float32)
    share = tl.zeros([BM], tl.float32)
    for k in range(0, D, BK):
        d = k + tl.arange(0, BK)
        projected = _project(x, x_stride, rows, d, R, D, statistics, norm_weight, down, b, B, projected, NORM, REST)
        g = tile(dout, dout_stride, rows, d, R, D)
        dhidden = product(g, tile(up, B, d, b, D, B), dhidden)
        if DGAIN:
            share += tl.sum(g.to(tl.float32) * tl.load(up_bias + d, mask=d < D, other=0.0).to(tl.float32)[None, :], 1)
    projected = tl.where(b[None, :] < B, projected, 0.0)  # beyond B an infinity makes it NaN
    factors = keep_factors(seeds, threshold, drop_scale, rows, BM, BB, DROPS)
    dhidden = tl.where(b[None, :] < B, dhidden * factors, 0.0)
    hidden = projected + tl.load(down_bias + b, mask=b < B, other=0.0)[None, :]
    active = tl.where(b[None, :] < B, _activated(hidden, ACTIVATION), 0.0)
    if DGAIN:
        tl.store(shares + rows, share + tl.sum(active * dhidden, 1), mask=rows < R)
    if DWEIGHTS:  # before the derivative, which needs registers
        store_tile(hidden_out, kept, rows, b, R, kept, active * factors)
    dhidden = tl.load(factor) * _before_activation(dhidden, hidden, ACTIVATION)
    left = narrow(dhidden, x.dtype.element_ty)
    if DWEIGHTS:
        store_tile(dhidden_out, kept, rows, b, R, kept, left)
        tl.store(dhidden_sums + tl.program_id(0).to(tl.int64) * BB + b, tl.sum(dhidden, 0))
    if DX:
        if NORM:
            first = tl.sum(dhidden * tl.load(norm_down + b, mask=b < B, other=0.0)[None, :], 1) / D
            second = tl.sum(dhidden * projected, 1) / D
        for n in range(0, D, BN):
            d = n + tl.arange(0, BN)
            e = product(left, tile(down, D, b, d, B, D), tl.zeros([BM, BN], tl.float32))
            if NORM:
                e = _before_norm(e, tile(x, x_stride, rows, d, R, D), statistics, norm_weight, d, D, first, second)
            if RESIDUAL:
                e += tile(dout, dout_stride, rows, d, R, D).to(tl.float32)
            store_tile(dx, D, rows, d, R, D, e)


class _Inputs:
    """What forward and backward share: checked, and as the kernels want it."""

    def __init__(self, x, weights, scale, eps, activation, dropout, seeds, residual=None, **more):
        check_arguments(x, residual, *weights, activation)
        names = ("norm_weight", "norm_bias", "down", "down_bias", "up", "up_bias", "gain")
        for name, tensor in {"residual": residual, **more}.items():
            if tensor is not None and tensor.dtype is not x.dtype:
                raise RuntimeError(f"adapter: {name} must have the dtype of x, {x.dtype}, got {tensor.dtype}")
        check_tensors("adapter", x=x, residual=residual, **dict(zip(names, weights, strict=True)), **more)
        norm_weight, norm_bias, down, down_bias, up, up_bias, gain = weights
        self.inner, self.width = down.shape
        check_sizes("adapter", self.width, self.inner)
        self.rows, self.x = x.numel() // self.width, rows_of(x)
        self.has_norm, self.scale = norm_weight is not None, scale
        self.down, self.up, self.up_bias = down.contiguous(), up.contiguous(), up_bias.contiguous()
        # Elementwise, since torch may multiply matrices in TF32.
        self.norm_weight = norm_weight.contiguous() if self.has_norm else self.up_bias
        self.down_bias = down_bias.float().contiguous()
        if self.has_norm:
            self.down_bias = self.down_bias + (self.down.float() * norm_bias.float()).sum(1)
        self.factor = scale * gain.float() if gain is not None else torch.full((1,), scale, device=x.device)
        tiles = row_tiles(self.inner, x.dtype, x.device)
        self.grid = (triton.cdiv(self.rows, tiles.rows),)
        self.dropout, drops = dropout_arguments("adapter", x, dropout, seeds)
        self.constants = {"BB": padded(self.inner), "BM": tiles.rows, "BK": tiles.depth, "DROPS": drops}
        is_crowded = drops and x.dtype is not torch.float32  # of floats, few columns would spill on gfx942
        self.constants["BN"] = columns_of(tiles, self.inner, is_crowded)
        is_rounded = x.dtype is not torch.float32 and (self.has_norm or down.dtype is not x.dtype)
        self.constants |= {"ACTIVATION": activation, "NORM": self.has_norm, "tiles": tiles, "like": x}
        self.constants["REST"] = activation == "relu" and is_rounded
        self.eps = eps


def adapter_forward(
    x, residual, norm_weight, norm_bias, down, down_bias, up, up_bias, gain, scale, eps, activation,
    packed=None, dropout=0.0, seeds=None,
):  # fmt: skip
    """packed is None: petl_ext packs weights for its own kernels alone."""
    weights = (norm_weight, norm_bias, down, down_bias, up, up_bias, gain)
    given = _Inputs(x, weights, scale, eps, activation, dropout, seeds, residual)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    residual_rows = given.x if residual is None else rows_of(residual)
    if given.rows:
        launch(
            adapter_forward_rows,
            given.grid,
            *(given.x, given.x.stride(0), residual_rows, residual_rows.stride(0), given.norm_weight, given.down),
            *(given.down_bias, given.up, given.up_bias, given.factor, out),
            *(*given.dropout, eps, given.rows, given.width, given.inner),
            RESIDUAL=residual is not None,
            **given.constants,
        )
    # Nothing is kept: keep_raw is False for Triton.
    return out, x.new_empty(0, dtype=torch.bfloat16 if x.dtype is torch.bfloat16 else torch.float32)


def adapter_backward(
    dout, x, norm_weight, norm_bias, down, down_bias, up, up_bias, gain, scale, eps, activation,
    residual_is_input, needs_dx, needs_dweights, needs_dgain, dropout=0.0, seeds=None,
):  # fmt: skip
    weights = (norm_weight, norm_bias, down, down_bias, up, up_bias, gain)
    given = _Inputs(x, weights, scale, eps, activation, dropout, seeds, dout=dout)
    dx, dgain = new_gradient(x, needs_dx), _gradient_like(gain, needs_dgain, down_bias)
    gradients = [_gradient_like(weight, needs_dweights, down_bias) for weight in weights[:-1]]
    if not given.rows:
        return dx, *(gradient.zero_() for gradient in (*gradients, dgain))
    dout_rows, kept = rows_of(dout), -(-given.inner // 8) * 8
    lefts = given.x.new_empty((2, given.rows, kept) if needs_dweights else (2, 1, 1))
    dhidden_sums = new_floats(x, *given.grid, given.constants["BB"])
    statistics, shares = new_floats(x, 3, given.rows), new_floats(x, given.rows)
    norm_down = (given.down.float() * given.norm_weight.float()).sum(1) if given.has_norm else shares
    launch(
        adapter_backward_rows,
        given.grid,
        *(dout_rows, dout_rows.stride(0), given.x, given.x.stride(0), given.norm_weight, given.down, given.down_bias),
        *(given.up, given.up_bias, norm_down, given.factor, dx, *lefts, dhidden_sums),
        *(statistics, shares, *given.dropout, eps, given.rows, given.width, given.inner, kept),
        RESIDUAL=residual_is_input,
        DX=needs_dx,
        DWEIGHTS=needs_dweights,
        DGAIN=needs_dgain and gain is not None,
        **given.constants,
    )
    if needs_dweights:
        norm = statistics if given.has_norm else None
        found = _weight_gradients(given, norm_bias, dout_rows, *lefts, dhidden_sums.sum(0), norm)
        for gradient, value in zip(gradients, found, strict=True):
            if value is not None:
                gradient.copy_(value)
    if needs_dgain and gain is not None:
        dgain.copy_(scale * shares.sum())
    return dx, *gradients, dgain


def _gradient_like(weight, is_needed, otherwise):
    return new_gradient(otherwise if weight is None else weight, is_needed and weight is not None)


def _weight_gradients(given, norm_bias, dout, hidden, dhidden, dhidden_sum, norm):
    """In the order of the weights, None for those that are not there; in float32."""
    ddown = gradient_of_weight(dhidden, given.x, given.inner, norm)
    ddown_bias = dhidden_sum[: given.inner]
    dup = given.factor * gradient_of_weight(hidden, dout, given.inner).mT
    dup_bias = given.factor * sum_of_columns(dout)
    dnorm_weight = dnorm_bias = None
    if norm is not None:
        # ddown is still that of the normalized rows, which LayerNorm's weight multiplies.
        dnorm_weight = (given.down.float() * ddown).sum(0)
        dnorm_bias = (given.down.float() * ddown_bias[:, None]).sum(0)
        ddown = ddown * given.norm_weight.float() + ddown_bias[:, None] * norm_bias.float()
    return dnorm_weight, dnorm_bias, ddown, ddown_bias, dup, dup_bias
