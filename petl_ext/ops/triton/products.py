"""What the Triton kernels of all ops share: tiles of matrices, products, and the gradients of weights.

Sums are float32, and float32 is multiplied as it is, without TF32.
"""

import triton
import triton.language as tl

from petl_ext.ops.triton import is_interpreted

# Triton's interpreter multiplies the raw bits of bfloat16, and cuts digits off where it shall round to it. Off on a
# device.
MENDS_BFLOAT16 = tl.constexpr(is_interpreted())


@triton.jit
def narrow(values, dtype: tl.constexpr):
    """float32 rounded to `dtype`."""
    if MENDS_BFLOAT16 and dtype == tl.bfloat16 and values.dtype == tl.float32:
        bits = values.to(tl.uint32, bitcast=True)
        nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        values = tl.where(values == values, nearest.to(tl.float32, bitcast=True), values)
    return values.to(dtype)


@triton.jit
def tile(data, stride, rows, columns, row_count, column_count):
    """[rows, columns] of a matrix whose rows are contiguous, zero beyond its end."""
    there = (rows[:, None] < row_count) & (columns[None, :] < column_count)
    return tl.load(data + rows[:, None].to(tl.int64) * stride + columns[None, :], mask=there, other=0.0)


@triton.jit
def store_tile(data, stride, rows, columns, row_count, column_count, values):
    there = (rows[:, None] < row_count) & (columns[None, :] < column_count)
    at = data + rows[:, None].to(tl.int64) * stride + columns[None, :]
    tl.store(at, narrow(values, data.dtype.element_ty), mask=there)


@triton.jit
def product(left, right, sums):
    """sums + left right, the right factor rounded to the left one's dtype."""
    right = narrow(right, left.dtype)
    if MENDS_BFLOAT16 and left.dtype == tl.bfloat16:
        left = left.to(tl.float32)
        right = right.to(tl.float32)
    return tl.dot(left, right, sums, input_precision="ieee")


@triton.jit
def rest_of(values, dtype: tl.constexpr):
    """What rounding to `dtype` leaves out."""
    return values.to(tl.float32) - narrow(values, dtype).to(tl.float32)


@triton.jit
def finite(values):
    """Zero in place of infinities: a factor of rests, since what is infinite or not a number the whole factor says."""
    return tl.where(tl.abs(values.to(tl.float32)) < float("inf"), values, 0.0).to(values.dtype)


@triton.jit
def centred(values, mean, rest):
    """Rows less their mean, of which `rest` is what its float32 leaves out."""
    return values.to(tl.float32) - mean[:, None] - rest[:, None]


@triton.jit
def weight_gradient(
    left, left_stride, right, right_stride, statistics, sums, R, L, D, slab_rows,
    LL: tl.constexpr, BR: tl.constexpr, BD: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """sums [slabs, L, D] = left^T right of one slab of rows; NORM: `right` is normalized first."""
    slab = tl.program_id(0)
    d = tl.program_id(1) * BD + tl.arange(0, BD)
    inner = tl.program_id(2) * LL + tl.arange(0, LL)
    end = tl.minimum(R, (slab + 1) * slab_rows)
    total = tl.zeros([LL, BD], tl.float32)
    for begin in range(slab * slab_rows, end, BR):
        rows = begin + tl.arange(0, BR)
        a = tile(left, left_stride, rows, inner, end, L)
        b = tile(right, right_stride, rows, d, end, D)
        if NORM:
            mean = tl.load(statistics + rows, mask=rows < end, other=0.0)
            rest = tl.load(statistics + R + rows, mask=rows < end, other=0.0)
            inverse = tl.load(statistics + R + R + rows, mask=rows < end, other=0.0)
            b = narrow(centred(b, mean, rest) * inverse[:, None], right.dtype.element_ty)
        total = product(tl.trans(a), b, total)
    store_tile(sums + slab.to(tl.int64) * L * D, D, inner, d, L, D, total)


@triton.jit
def column_sums(data, stride, sums, R, D, slab_rows, BR: tl.constexpr, BD: tl.constexpr):
    """sums [slabs, D] of one slab of rows."""
    slab = tl.program_id(0)
    d = tl.program_id(1) * BD + tl.arange(0, BD)
    end = tl.minimum(R, (slab + 1) * slab_rows)
    total = tl.zeros([BD], tl.float32)
    for begin in range(slab * slab_rows, end, BR):
        total += tl.sum(tile(data, stride, begin + tl.arange(0, BR), d, end, D).to(tl.float32), 0)
    tl.store(sums + slab.to(tl.int64) * D + d, total, mask=d < D)
