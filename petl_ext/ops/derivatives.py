"""Derivatives and transformations that no kernel knows: plain PyTorch computes them."""

import torch
from torch.autograd import forward_ad


def are_transformed(tensors):
    """Whether derivatives in forward mode, or a transformation of torch.func such as vmap, are taken of `tensors`, of
    which some may be None, or torch.jit.trace watches, which can save no autograd.Function."""
    if torch.compiler.is_compiling():
        return False
    if torch._C._are_functorch_transforms_active() or torch.jit.is_tracing():
        return True
    if forward_ad._current_level < 0:  # outside of dual_level there are no tangents, and looking takes microseconds
        return False
    return any(tensor is not None and forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors)


def differentiable_gradients(reference, tensors, needed, dout):
    """The gradients of `reference(*tensors)` as plain PyTorch gives them where they are to be differentiated again.

    Args:
        tensors: of which some may be None.
        needed: of each tensor whether its gradient is wanted; the others' are None.
        dout: the gradient of the output.
    """
    with torch.enable_grad():
        # One tensor may be given twice, and each place has a gradient of its own.
        tensors = [None if tensor is None else tensor.view_as(tensor) for tensor in tensors]
        wanted = [tensor for tensor, is_needed in zip(tensors, needed, strict=True) if is_needed]
        found = iter(torch.autograd.grad(reference(*tensors), wanted, dout, create_graph=True, materialize_grads=True))
    return [next(found) if is_needed else None for is_needed in needed]
