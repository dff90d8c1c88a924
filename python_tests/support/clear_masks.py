"""Problems whose ReLU no rounding can flip: every pre-activation is far from zero.

A product near zero may come out on either side of it, depending on the order of the sums. Its gradient then is all
there or not at all, so two right kernels may differ by far more than they round.
"""

import torch
import torch.nn.functional as F

WEIGHTS_OF = {"apt": "keys", "adapter": "down"}  # whose products with the rows go through the ReLU
SHIFT = 1.5  # standard deviations


@torch.no_grad()
def with_clear_mask(problem):
    """The problem with every second row, every second unit and every second column shifted to the other side.

    Rows and weights move by SHIFT of their deviations along one vector of signs, up or down, so the product of a row
    with a unit moves by SHIFT * SHIFT * D of theirs. What it was before, and what the shift of one adds by chance to
    the other, grows with the root of D alone.
    """
    name = WEIGHTS_OF[problem.op.name]
    return problem.change(**{each: _shifted(problem[each]) for each in ("x", name)}).trained()


def _shifted(matrix):
    rows, columns = (1 - 2 * (torch.arange(size, device=matrix.device) % 2) for size in matrix.shape)
    shift = SHIFT * matrix.double().std() * rows[:, None] * columns
    return (matrix.double() + shift).to(matrix.dtype)


@torch.no_grad()
def pre_activations(problem):
    """What goes into the ReLU [rows, inner size], in float64."""
    exact = problem.double()
    if exact.op.name == "apt":
        return exact["x"] @ exact["keys"].mT
    hidden = F.layer_norm(exact["x"], exact["x"].shape[-1:], exact["norm_weight"], exact["norm_bias"])
    return F.linear(hidden, exact["down"], exact["down_bias"])
