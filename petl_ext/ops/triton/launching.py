"""How an op reaches its Triton kernels: checks, rows, slabs of weights' gradients, and the device of a call."""

import threading

import torch
import triton

from petl_ext.ops.triton import LIMITS
from petl_ext.ops.triton.products import column_sums, weight_gradient
from petl_ext.ops.triton.tiles import (
    AMD_ROW_TILES,
    COLUMN_TILES,
    ROW_TILES,
    WEIGHT_ROWS,
    WEIGHT_TILES,
    padded,
    tiles_for,
)

_INTERPRETER = threading.Lock()
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Weights' gradients are summed in slabs of rows, as many as the number of rows alone decides: the same on every device.
MOST_SLABS, FEWEST_ROWS = 32, 512


def check_tensors(op, **tensors):
    """Raises a RuntimeError that names the first tensor whose dtype or device no kernel takes; None is no tensor."""
    first, x = next(iter(tensors.items()))
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if tensor.dtype not in DTYPES:
            raise RuntimeError(f"{op}: {name} must be float32, bfloat16 or float16, got {tensor.dtype}")
        check_device(op, name, tensor, x, first)


def check_device(op, name, tensor, x, first="x"):
    """Raises a RuntimeError where a tensor is not on the device of x, which is called `first`."""
    if tensor.device != x.device:
        raise RuntimeError(f"{op}: {name} must be on {x.device}, as {first} is, got {tensor.device}")


def check_sizes(op, width, inner):
    limits = LIMITS[op]
    if not limits.allow(width, inner):
        raise RuntimeError(
            f"{op}: the Triton kernels take a width D up to {limits.max_width} and an inner size up to "
            f"{limits.max_inner}, got {width} and {inner}"
        )


def rows_of(tensor):
    """The tensor as a matrix of its last axis, copied where rows are not contiguous."""
    width = tensor.size(-1)
    matrix = tensor.reshape(tensor.numel() // width, width)
    return matrix if matrix.stride(1) == 1 else matrix.contiguous()


def new_floats(like, *shape):
    return torch.empty(shape, dtype=torch.float32, device=like.device)


def new_gradient(tensor, is_needed):
    """Contiguous and shaped as the tensor, or empty."""
    return torch.empty(tensor.shape if is_needed else (0,), dtype=tensor.dtype, device=tensor.device)


def has_no_tensor_cores(dtype, device):
    """For products of this dtype: float32 is multiplied without TF32, and Triton knows none of NVIDIA's before 8.0."""
    if dtype is torch.float32:
        return True
    is_nvidia = device.type == "cuda" and torch.version.hip is None
    return is_nvidia and torch.cuda.get_device_capability(device) < (8, 0)


def row_tiles(inner, dtype, device):
    table = AMD_ROW_TILES if torch.version.hip else ROW_TILES
    return tiles_for(table, inner, has_no_tensor_cores(dtype, device))


def launch(kernel, grid, *arguments, tiles, like, **constants):
    """Queues a kernel on the current stream of the device of `like`; the interpreter knows one thread."""
    is_on_cpu = like.device.type == "cpu"
    with _INTERPRETER if is_on_cpu else torch.get_device_module(like.device).device(like.device):
        kernel[grid](*arguments, **constants, num_warps=tiles.warps, num_stages=tiles.stages)


def _slabs_of(rows):
    """(how many, rows of each)."""
    slab_rows = triton.cdiv(max(FEWEST_ROWS, triton.cdiv(rows, MOST_SLABS)), 64) * 64
    return triton.cdiv(rows, slab_rows), slab_rows


def gradient_of_weight(left, right, inner, norm=None):
    """left^T right in float32, [inner, D].

    Args:
        left: [R, inner or more].
        right: [R, D].
        norm: [3, R], the rows' means, what rounding left out of those, and the inverse deviations.
    """
    rows, width = right.shape
    (slabs, slab_rows), tiles = _slabs_of(rows), WEIGHT_TILES[has_no_tensor_cores(right.dtype, right.device)]
    sums = new_floats(right, slabs, inner, width)
    taken = min(WEIGHT_ROWS, padded(inner))
    launch(
        weight_gradient,
        (slabs, triton.cdiv(width, tiles.columns), triton.cdiv(inner, taken)),
        *(left, left.stride(0), right, right.stride(0), left if norm is None else norm, sums),
        *(rows, inner, width, slab_rows),
        LL=taken,
        BR=tiles.rows,
        BD=tiles.columns,
        NORM=norm is not None,
        tiles=tiles,
        like=right,
    )
    return sums.sum(0)


def sum_of_columns(matrix):
    """[D] in float32."""
    rows, width = matrix.shape
    slabs, slab_rows = _slabs_of(rows)
    sums = new_floats(matrix, slabs, width)
    tiles = COLUMN_TILES
    launch(
        column_sums,
        (slabs, triton.cdiv(width, tiles.columns)),
        *(matrix, matrix.stride(0), sums, rows, width, slab_rows),
        BR=tiles.rows,
        BD=tiles.columns,
        tiles=tiles,
        like=matrix,
    )
    return sums.sum(0)
