"""Activations in two dtypes, beside weights in float32: what torch.autocast makes of a model."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from devices import CPU_DEVICES
from op_problems import ADAPTER, APT
from problems import draw
from tolerance import assert_as_good_as_torch

from petl_ext import ops

WIDE, NARROW = torch.float32, torch.bfloat16
DTYPES = pytest.mark.parametrize(("x", "stream"), list(itertools.product((WIDE, NARROW), repeat=2)), ids=str)
on_cpu = pytest.mark.parametrize("device", CPU_DEVICES, ids=str, indirect=True)


def mixture(op, sizes, x, stream, **form):
    """A problem with float32 weights; x has the values that rounding leaves as they are."""
    problem = draw(op, *sizes, **form)
    dtypes = {"x": x, "y": stream, "residual": stream}
    changed = {name: problem[name].to(NARROW).to(dtypes[name]) for name in dtypes if name in problem.tensors}
    return problem.change(**changed)


def check_under_autocast(problem):
    """Dtypes as the reference has them, and values by the one tolerance rule."""
    op = problem.op
    oracle = problem.double().run(op.reference)
    with torch.autocast("cpu", NARROW):
        ours, theirs = problem.run(op.ours), problem.run(op.reference)
    for name, result in ours.items():
        assert result.dtype is theirs[name].dtype, f"{name} has dtype {result.dtype}, expected {theirs[name].dtype}"
        assert_as_good_as_torch(name, result, theirs[name], oracle[name])


@on_cpu
@DTYPES
@pytest.mark.parametrize("activation", ["relu", "softmax"])
def test_apt(device, activation, x, stream):
    check_under_autocast(mixture(APT.op, (300, 768, 50), x, stream, activation=activation))


@on_cpu
@pytest.mark.parametrize("sizes", [(300, 768, 50), (97, 33, 7)], ids=str)
@DTYPES
@pytest.mark.parametrize("residual", [None, "x", "another"])
@pytest.mark.parametrize(("norm", "activation"), [(False, "relu"), (True, "relu"), (True, "gelu"), (False, "silu")])
def test_adapter(device, norm, activation, residual, x, stream, sizes):
    form = {"norm": norm, "activation": activation, "residual": residual, "scale": 0.5}
    check_under_autocast(mixture(ADAPTER.op, sizes, x, stream, **form))


@on_cpu
@pytest.mark.parametrize("residual", [None, "x"])
def test_mean_far_greater_than_deviations(device, residual):
    """A row's mean takes away what it has added: the weights that meet it are those that x has met."""
    problem = draw(ADAPTER.op, 300, 256, 96, norm=True, activation="gelu", residual=residual)
    check_under_autocast(problem.change(x=(problem["x"] + 300).to(NARROW).float()))


@on_cpu
def test_input_gradient_of_a_wide_stream_is_not_rounded(device):
    """dx of the sequential adapter is dout and what the adapter adds, in float32."""
    problem = mixture(ADAPTER.op, (200, 768, 48), WIDE, WIDE, residual="x", scale=1e-3)
    with torch.autocast("cpu", NARROW):
        dx = problem.run(ops.adapter)["dx"]
    oracle = problem.double().run(ops.adapter_reference)["dx"]
    added = (oracle - problem.dout).abs().max()
    assert (dx - oracle).abs().max() < 0.02 * added < 1e-3 * oracle.abs().max()


@on_cpu
def test_what_is_kept_of_hidden_units_has_the_sign_of_their_sum_with_the_bias(device):
    """ReLU's mask hangs on it; biases that almost cancel the products are where rounding could change it."""
    problem = draw(ADAPTER.op, 500, 64, 32, norm=True, dtype=NARROW, weight_dtype=WIDE)
    exact = problem.double()
    products = F.layer_norm(exact["x"], (64,), exact["norm_weight"]) @ exact["down"].mT
    bias = -products[7].float()
    with_bias = problem.change(down_bias=bias, norm_bias=torch.zeros_like(problem["norm_bias"]))
    raw = torch.ops.petl_ext.adapter_forward(*ADAPTER.raw(with_bias), keep_raw=True)[1]
    is_clear = (products + bias).abs() > 1e-6 * products.abs().max()
    assert torch.equal((raw.float() + bias > 0)[is_clear], (products + bias > 0)[is_clear])
    assert (raw - products).abs().max() < 0.01 * products.abs().max()


@on_cpu
@pytest.mark.parametrize("num_prompts", [50, 200])
@pytest.mark.parametrize("x", [WIDE, NARROW], ids=str)
@pytest.mark.parametrize("seed", range(3))
def test_input_gradient_is_ten_times_better_than_eager(device, seed, x, num_prompts):
    """The masks are those of unrounded keys, though fewer products see the weights whole where dx is not rounded."""
    problem = draw(APT.op, 1920, 768, num_prompts, dtype=NARROW, weight_dtype=WIDE, std=0.02, seed=seed)
    problem = problem.change(x=problem["x"].to(x))
    oracle = problem.double().run(ops.apt_reference)["dx"]
    with torch.autocast("cpu", NARROW):
        ours, eager = (problem.run(function)["dx"].double() for function in (ops.apt, ops.apt_reference))
    assert 10 * (ours - oracle).norm() <= (eager - oracle).norm()
