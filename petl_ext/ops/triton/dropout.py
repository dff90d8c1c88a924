"""Dropout in Triton, as petl_ext/ops/dropout.py says what is dropped."""

import triton
import triton.language as tl

from petl_ext.checks import check_probability
from petl_ext.ops.dropout import check_seeds, threshold_of
from petl_ext.ops.triton.launching import check_device


@triton.jit
def keep_factors(seeds, threshold, scale, rows, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DROPS: tl.constexpr):
    """By what the values [ROWS, COLUMNS] are multiplied: the scale, or zero where they are dropped; one where nothing
    is."""
    if DROPS:
        nothing = tl.zeros([ROWS, COLUMNS // 4], tl.uint32)
        row = rows.to(tl.int64)
        quads = nothing + tl.arange(0, COLUMNS // 4).to(tl.uint32)[None, :]
        lower = nothing + (row & 0xFFFFFFFF).to(tl.uint32)[:, None]
        upper = nothing + (row >> 32).to(tl.uint32)[:, None]
        last = nothing + (tl.load(seeds + 1) & 0xFFFFFFFF).to(tl.uint32)
        first, second, third, fourth = tl.philox(tl.load(seeds), quads, lower, upper, last)
        draws = tl.interleave(tl.interleave(first, third), tl.interleave(second, fourth))
        factors = tl.where(draws >= threshold, scale, 0.0)
    else:
        factors = 1.0
    return factors


def dropout_arguments(op, x, dropout, seeds):
    """(what a kernel takes: the seeds, the threshold and the scale; whether anything is dropped)."""
    check_probability(f"{op}: dropout", dropout)
    if dropout == 0:
        return (x, 0, 1.0), False
    if seeds is None:
        raise RuntimeError(f"{op}: seeds must be given where dropout is above 0")
    check_seeds(op, seeds)
    check_device(op, "seeds", seeds, x)
    return (seeds, threshold_of(dropout), 1 / (1 - dropout)), True
