"""How tensors of a file are made to fit a model: (tensor, wanted shape) to (tensor, what was done or "")."""

from petl_ext.models.meter.positions import grid_side, resize_position_embeddings


def resized(tensor, shape):
    """Position embeddings [1 + g * g, D] or [1, 1 + g * g, D]."""
    old, new = grid_side(tensor.size(-2)), grid_side(shape[-2])
    if tensor.shape[:-2] != shape[:-2] or old == new or 0 in (old, new):
        return tensor, ""
    wanted = resize_position_embeddings(tensor.flatten(0, -2), new).reshape(*shape[:-1], -1)
    return wanted, f"a grid of {old} x {old} positions resized bicubically to {new} x {new}"


def with_third_row(tensor, shape):
    if len(tensor) != 2 or shape[0] != 3:
        return tensor, ""
    return tensor[[0, 1, 1]], "row 2 is a copy of row 1, as the original starts NLVR2"


def second_row(tensor, shape):
    return tensor[1:2] if len(tensor) == 2 else tensor, "row 1 alone, as the original starts retrieval"
