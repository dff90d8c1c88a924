"""The Hopper path on a GPU, where PETL_HOPPER=1 asks for it: as right as PyTorch, and the same bits each time."""

import pytest
import torch
from problems import ADAPTER, APT, draw_rows, forward_backward
from tolerance import assert_as_good_as_torch

asked = torch.cuda.is_available() and torch.ops.petl_ext.hopper_state("") == "on"
pytestmark = pytest.mark.skipif(not asked, reason="needs a GPU of compute capability 9.0 and PETL_HOPPER=1")

INNER = (50, 90, 128, 180, 200, 256)
HALF = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
OPS_AND_ACTIVATIONS = pytest.mark.parametrize(
    ("op", "activation"), [(op, activation) for op in (APT, ADAPTER) for activation in op.activations], ids=str
)


def problem_on_gpu(op, rows, dim, inner, dtype, activation):
    return draw_rows(op, rows, dim, inner, dtype, torch.float32, activation=activation, device="cuda")


@HALF
@pytest.mark.parametrize("dim", [64, 768])
@pytest.mark.parametrize("inner", INNER)
@OPS_AND_ACTIVATIONS
def test_values(op, activation, inner, dim, dtype):
    problem = problem_on_gpu(op, 1613, dim, inner, dtype, activation)
    oracle, theirs = problem.double().run(op.reference), problem.run(op.reference)
    for name, ours in problem.run(op.ours).items():
        assert_as_good_as_torch(name, ours, theirs[name], oracle[name])


@OPS_AND_ACTIVATIONS
@pytest.mark.parametrize("inner", INNER)
def test_two_runs_are_equal(op, activation, inner):
    """With more tiles of rows than blocks."""
    problem = problem_on_gpu(op, 20_000, 768, inner, torch.bfloat16, activation)
    first = forward_backward(problem, op.ours)
    for _ in range(3):
        for name, result in forward_backward(problem, op.ours).items():
            assert torch.equal(result, first[name]), name


@OPS_AND_ACTIVATIONS
def test_it_is_the_hopper_path(op, activation):
    """The lean path adds in another order: somewhere its results differ in their last bit."""
    problem = problem_on_gpu(op, 20_000, 768, 200, torch.bfloat16, activation)
    ours = forward_backward(problem, op.ours)
    torch.ops.petl_ext.hopper_state("0")
    try:
        lean = forward_backward(problem, op.ours)
    finally:
        torch.ops.petl_ext.hopper_state("1")
    for name in ("out", "dx"):
        assert not torch.equal(lean[name], ours[name]) and torch.allclose(lean[name], ours[name], atol=0.1, rtol=0.1)
