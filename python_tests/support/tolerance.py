"""The one tolerance rule: an op may err at most twice as much as PyTorch does in the same dtype."""

import torch

ROUNDING = 1e-6  # of the oracle's largest value: what is granted where PyTorch happens to be exact


def assert_as_good_as_torch(name, ours, theirs, oracle):
    """max|ours - oracle| <= 2 max|theirs - oracle| + 1e-6 max|oracle|, the oracle being in float64."""
    assert ours.shape == oracle.shape, f"{name}: shape {tuple(ours.shape)}, expected {tuple(oracle.shape)}"
    if oracle.numel() == 0:
        return
    error, allowed = (ours.double() - oracle).abs().max(), 2 * (theirs.double() - oracle).abs().max()
    allowed = allowed + ROUNDING * oracle.abs().max()
    assert error <= allowed, f"{name}: error {error:.3e}, allowed {allowed:.3e}"


def outputs_and_gradients(function, inputs, dout):
    """[out, gradient of each input], where an input that needs no gradient has none."""
    inputs = [t.detach().clone().requires_grad_() for t in inputs]
    out = function(*inputs)
    return [out.detach(), *torch.autograd.grad(out, inputs, dout.to(out.dtype))]
