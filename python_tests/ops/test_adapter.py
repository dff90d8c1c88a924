"""What is special to ops.adapter; what holds of every op is in test_every_op.py."""

from dataclasses import replace

import pytest
import torch
from devices import CPU_DEVICES, device_and_dtype
from memory import saved_for_backward
from op_problems import ADAPTER, CUDA_TILE, assert_equal, check, check_together
from problems import draw

from petl_ext import ops

FORMS = ADAPTER.op.forms
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)


def make_problem(*sizes, **options):
    return draw(ADAPTER.op, *sizes, **options)


@pytest.mark.parametrize("activation", ["relu", "gelu", "silu"])
def test_large_hidden_values(device, activation):
    """Far out the activations are the identity or zero: neither they nor their slopes may overflow or lose digits."""
    problem = make_problem(50, 64, 40, activation=activation)
    check(device, problem.change(x=problem["x"] * 1000))


def check_over_many_draws(device, names, draws, *sizes, **options):
    problems = [make_problem(*sizes, seed=seed, **options) for seed in range(device.draws(draws))]
    check_together(device, problems, names)


@DTYPES
@pytest.mark.parametrize("form", ["bypass", "bare"])
def test_gradient_of_the_gain_over_many_draws(device, form, dtype):
    check_over_many_draws(device, ["dscale"], 12, 70, 64, 20, dtype=dtype, **FORMS[form])


@DTYPES
@pytest.mark.parametrize("form", ["parallel", "sequential"])
def test_relu_over_many_draws(device, form, dtype):
    check_over_many_draws(device, ["dx", "ddown"], 12, CUDA_TILE - 1, 64, 129, dtype=dtype, **FORMS[form])


@pytest.mark.parametrize("device", CPU_DEVICES, ids=str, indirect=True)
def test_hidden_values_beyond_float16(device):
    """Hidden values beyond float16's range (65504) must not overflow inside, since the output is finite.

    On CUDA they do, as in PyTorch: the second product takes them in float16.
    """
    problem = make_problem(50, 768, 8, dtype=torch.float16).to(device.torch_device)
    x, down, up = (problem[name] for name in ("x", "down", "up"))
    problem = problem.change(x=x * 200, down=(down.float() * 400).half(), up=(up.float() * 1e-3).half())
    assert (problem["x"].float() @ problem["down"].float().mT).max() > 65504
    out, oracle = problem.call(ops.adapter), problem.double().call(ops.adapter_reference)
    assert oracle.abs().max() < 65504
    torch.testing.assert_close(out.double(), oracle, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("mean", [1e2, 1e5])
def test_mean_far_greater_than_deviations(device, mean):
    """The normalized row keeps its digits, which x * inverse - mean * inverse would lose."""
    problem = make_problem(*device.cut((100, 768, 20)), norm=True, residual="another").to(device.torch_device)
    problem = problem.change(x=problem["x"] + mean)
    check(device, problem)
    oracle, ours = problem.double().run(ops.adapter_reference), problem.run(ops.adapter)
    for name in ("out", "dx", "ddown", "dnorm_weight"):
        error = (ours[name].double() - oracle[name]).abs().max() / oracle[name].abs().max()
        assert error < 5e-6, f"{name}: {error:.1e}"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_mean_far_greater_than_deviations_in_16_bits(device, dtype):
    sizes = device.cut((300, 256, 96))
    problem = make_problem(*sizes, norm=True, activation="gelu", dtype=dtype, residual="another")
    check(device, problem.change(x=problem["x"] + 300))


@device_and_dtype
@pytest.mark.parametrize("form", ["parallel", "bypass"])
@pytest.mark.parametrize(("weight", "bias"), [(1e-3, 1), (1e-2, 30), (30, 1e-3)])
def test_norm_weight_and_bias_of_different_sizes(device, weight, bias, form, dtype):
    """What a row's deviations say is not lost beside what LayerNorm's bias says of every row, or the reverse."""
    problem = make_problem(*device.cut((70, 256, 40)), dtype=dtype, activation="silu", **FORMS[form])
    norm = {name: problem[name] / scale for name, scale in (("norm_weight", 1 / weight), ("norm_bias", 0.2 / bias))}
    check(device, problem.change(**norm))


def test_constant_rows(device):
    problem = make_problem(30, 64, 20, norm=True)
    check(device, problem.change(x=problem["x"][:, :1].expand(30, 64).contiguous()))


@DTYPES
def test_infinity_stays_in_its_column(device, dtype):
    """Of the gradients that are sums over rows, only those of its column see it."""
    problem = make_problem(40, 64, 40, dtype=dtype, activation="silu", **FORMS["bypass"]).to(device.torch_device)
    problem.dout[3, 5] = float("inf")
    results = problem.run(ops.adapter)
    for name in ("dup", "dup_bias"):
        finite = results[name].isfinite().reshape(64, -1)
        assert not finite[5].all() and finite[:5].all() and finite[6:].all(), name


@pytest.mark.parametrize("form", ["bypass", "sequential"])
@pytest.mark.parametrize("activation", ["relu", "gelu", "silu"])
def test_nan_stays_in_its_row(device, activation, form):
    problem = make_problem(20, 64, 7, activation=activation, **FORMS[form]).to(device.torch_device)
    problem["x"][3, 5] = float("nan")
    results = problem.run(ops.adapter)
    for name in ("out", "dx"):
        assert not results[name][:3].isnan().any() and not results[name][4:].isnan().any(), name
    assert results["out"][3].isnan().all() and results["ddown"].isnan().any()


@pytest.mark.parametrize("device", CPU_DEVICES, ids=str, indirect=True)
@pytest.mark.parametrize("seed", range(3))
def test_gradients_are_ten_times_better_than_eager_in_bfloat16(device, seed):
    """A rounded row flips ReLU's mask; the kernels' mask is that of the unrounded one (Frobenius norm, float64).

    On CUDA the normalized row is rounded for the tensor cores, as in PyTorch, and the gradients are as good as eager's.
    """
    problem = make_problem(
        1920, 768, 96, dtype=torch.bfloat16, weight_dtype=torch.float32, std=0.02, seed=seed, **FORMS["parallel"]
    )
    problem = problem.to(device.torch_device)
    oracle, eager = problem.double().run(ops.adapter_reference), problem.run(ops.adapter_reference)
    ours = problem.run(ops.adapter)
    for name in ("dx", "ddown"):
        error, theirs = ((t[name].double() - oracle[name]).norm() for t in (ours, eager))
        assert 10 * error <= theirs, f"{name}: {error:.1e}, eager {theirs:.1e}"


def test_weights_with_strides(device):
    problem = make_problem(30, 64, 10, norm=True).to(device.torch_device)
    strided = {name: problem[name].mT.contiguous().mT for name in ("down", "up")}
    strided["up_bias"] = problem["up_bias"].repeat_interleave(2)[::2]
    assert_equal(problem.change(**strided).run(ops.adapter), problem.run(ops.adapter))


def test_residual_gradient_is_the_output_gradient_itself(device):
    problem = make_problem(50, 64, 10, residual="another").to(device.torch_device)
    problem["residual"].requires_grad_()
    out = problem.call(ops.adapter)
    (gradient,) = torch.autograd.grad(out, problem["residual"], problem.dout)
    assert gradient.data_ptr() == problem.dout.data_ptr()


def test_residual_that_is_x_or_a_copy_of_it_makes_no_difference(device):
    given = make_problem(50, 64, 10, norm=True, residual="x").to(device.torch_device)
    copied = replace(given.change(residual=given.tensors["x"].clone()), same={})
    ours, theirs = given.run(ops.adapter), copied.run(ops.adapter)
    torch.testing.assert_close(ours.pop("dx"), theirs.pop("dx") + theirs.pop("dresidual"))
    assert_equal(ours, theirs)


@pytest.mark.parametrize("activation", ["relu", "gelu", "silu"])
def test_reference_is_the_published_formula(activation):
    """adapter_reference against modules of torch.nn, in float64."""
    problem = make_problem(
        20, 16, 6, dtype=torch.float64, norm=True, residual="another", scale=4.0, activation=activation
    )
    weights = problem.tensors
    modules = [torch.nn.LayerNorm(16), torch.nn.Linear(16, 6), torch.nn.Linear(6, 16)]
    with torch.no_grad():
        for module, name in zip(modules, ("norm", "down", "up"), strict=True):
            module.double()
            module.weight.copy_(weights["norm_weight" if name == "norm" else name])
            module.bias.copy_(weights[f"{name}_bias"])
    norm, down, up = modules
    act = {"relu": torch.nn.ReLU(), "gelu": torch.nn.GELU(), "silu": torch.nn.SiLU()}[activation]
    expected = weights["residual"] + 4.0 * up(act(down(norm(weights["x"]))))
    torch.testing.assert_close(problem.call(ops.adapter_reference), expected)


@pytest.mark.parametrize("form", FORMS)
def test_only_hidden_units_are_saved_for_backward_beside_inputs(form):
    problem = make_problem(1920, 768, 96, **FORMS[form])
    problem = problem.trained()

    def call():
        return problem.call(ops.adapter)

    assert saved_for_backward(call, given=()) and saved_for_backward(call, problem.tensors.values()) == [1920 * 96 * 4]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_hidden_units_are_saved_as_products_take_them(dtype):
    problem = make_problem(1920, 768, 96, norm=True, dtype=dtype, weight_dtype=torch.float32).trained()
    with torch.autocast("cpu", torch.bfloat16):
        saved = saved_for_backward(lambda: problem.call(ops.adapter), problem.tensors.values())
    assert saved == [1920 * 96 * 2]


def test_residual_in_another_dtype(device):
    problem = make_problem(30, 64, 10, residual="another").to(device.torch_device)
    residual = problem["residual"].bfloat16().requires_grad_()
    apart = problem.change(residual=None)
    for function in (ops.adapter, ops.adapter_reference):
        out = problem.change(residual=residual).call(function)
        assert out.dtype is torch.float32
        assert torch.equal(out, residual + apart.call(function))
        out.sum().backward()
        assert residual.grad.dtype is torch.bfloat16 and torch.equal(residual.grad, torch.ones_like(residual))
        residual.grad = None
    with pytest.raises(RuntimeError, match=r"residual must have shape \[30, 64\], got \[1, 64\]"):
        problem.change(residual=residual[:1]).call(ops.adapter)
    raw = ADAPTER.raw(problem.change(residual=residual))
    if device.mixes_dtypes:
        assert torch.ops.petl_ext.adapter_forward(*raw)[0].dtype is torch.bfloat16
        return
    with pytest.raises(RuntimeError, match="residual must have the dtype of x"):
        device.raw(ADAPTER.op, "forward")(*raw)


def test_autocast_multiplies_in_its_dtype_and_leaves_the_stream_alone(device):
    problem = make_problem(30, 64, 10, **FORMS["bypass"]).to(device.torch_device)
    x, apart = problem["x"], replace(problem, same={})
    with torch.autocast(x.device.type, torch.bfloat16):
        out, reference = problem.call(ops.adapter), problem.call(ops.adapter_reference)
        alone = apart.call(ops.adapter)
    assert (out.dtype, reference.dtype, alone.dtype) == (torch.float32, torch.float32, torch.bfloat16)
    added = apart.change(x=x.bfloat16()).call(ops.adapter)
    # Where the kernel adds the residual, the sum is not rounded before.
    torch.testing.assert_close(out, x + added, rtol=0, atol=0.01 * added.abs().max().item())
    exact = problem.call(ops.adapter)
    torch.testing.assert_close(out, exact, rtol=0.02, atol=0.02 * exact.abs().max().item())
    torch.testing.assert_close(reference, exact, rtol=0.02, atol=0.02 * exact.abs().max().item())


def test_backward_op_takes_dout_in_the_dtype_of_x_only():
    dout, *rest = next(ADAPTER.raw_backward(ADAPTER.problem()))
    with pytest.raises(RuntimeError, match="adapter: dout must have the dtype of x"):
        torch.ops.petl_ext.adapter_backward(dout.bfloat16(), *rest)
