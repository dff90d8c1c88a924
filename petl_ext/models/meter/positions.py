"""Position embeddings of a grid of patches, for grids of other sizes."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from petl_ext.checks import check_positive_integer


def resize_position_embeddings(weight: Tensor, grid: int) -> Tensor:
    """CLIP's position embeddings for another number of patches, as METER resizes them when it loads a checkpoint.

    The class token's row stays; the others are interpolated bicubically over the square of patches.

    Args:
        weight: [1 + g * g, D] for g patches to a side.
        grid: the new number of patches to a side.

    Returns:
        [1 + grid * grid, D] in weight's dtype; `weight` itself where g is already `grid`.

    Raises:
        ValueError: weight has no such shape, or grid is no positive integer.
    """
    check_positive_integer("resize_position_embeddings: grid", grid)
    old = grid_side(weight.size(0)) if weight.dim() == 2 else 0
    if old == 0:
        raise ValueError(
            "resize_position_embeddings: weight must be [1 + g * g, D], a class token and a square of patches, "
            f"got {list(weight.shape)}"
        )
    if grid == old:
        return weight
    patches = weight[1:].unflatten(0, (old, old)).permute(2, 0, 1).to(torch.promote_types(weight.dtype, torch.float32))
    patches = F.interpolate(patches[None], size=(grid, grid), mode="bicubic")[0]
    return torch.cat([weight[:1], patches.flatten(1).mT.to(weight.dtype)])


def grid_side(rows):
    """Patches to a side, where rows are a class token and a square of patches; 0 where they are not."""
    side = math.isqrt(max(rows - 1, 0))
    return side if side * side + 1 == rows else 0
