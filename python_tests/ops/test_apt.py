"""What is special to ops.apt; what holds of every op is in test_every_op.py."""

import os
import re
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from devices import CPU_PATHS, emulation
from memory import saved_for_backward
from op_problems import APT, assert_equal, check
from problems import draw

from petl_ext import ops
from petl_ext.ops.kernels import no_kernel_text


def make_problem(*sizes, **options):
    return draw(APT.op, *sizes, **options)


@pytest.mark.parametrize("wide", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("narrow", ["x", "y"])
def test_x_and_y_in_two_dtypes(device, narrow, wide):
    problem = make_problem(*device.cut((200, 768, 50)))
    x, y = (problem[name].to(torch.bfloat16 if name == narrow else wide) for name in ("x", "y"))
    check(device, replace(problem.change(x=x, y=y), dout=problem.dout.to(y.dtype)))


@pytest.mark.parametrize("activation", ["relu", "softmax"])
@pytest.mark.parametrize("spoiled", ["x", "y", "prompts", "keys", "log_scale"])
def test_a_nan_reaches_all_that_it_reaches_in_eager(device, spoiled, activation):
    """Of the gate, too, which is the greatest score."""
    problem = make_problem(9, 64, 21, activation=activation)
    problem[spoiled].view(-1)[-1] = torch.nan
    problem = problem.to(device.torch_device)
    ours, theirs = problem.run(ops.apt), problem.run(ops.apt_reference)
    for name, found in ours.items():
        assert not (theirs[name].isnan() & ~found.isnan()).any(), name


def test_rows_more_than_2_to_the_31_elements_apart(device):
    problem = make_problem(2, 64, 10, dtype=torch.bfloat16).to(device.torch_device)
    expected = problem.run(ops.apt)
    # Only the two rows are touched, so only their pages take memory.
    far_apart = problem["x"].new_empty(2**31 + 64).as_strided((2, 64), (2**31, 1))
    for name in ("x", "y"):
        assert_equal(problem.change(**{name: far_apart.copy_(problem[name])}).run(ops.apt), expected)


def test_rows_that_overlap(device):
    problem = make_problem(40, 72, 10).to(device.torch_device)
    x = problem["x"].flatten()[: 40 + 72 - 1].unfold(0, 72, 1)
    assert x.stride() == (1, 1)
    assert torch.equal(problem.change(x=x).call(ops.apt), problem.change(x=x.contiguous()).call(ops.apt))


def test_large_values_in_float16(device):
    """Scores beyond float16's range (65504) must not overflow inside, since the output is finite."""
    problem = make_problem(50, 768, 8, dtype=torch.float16).to(device.torch_device)
    x, _, prompts, keys, log_scale = problem.tensors.values()
    keys, prompts = (keys.float() * 400).half(), (prompts.float() * 1e-4).half()
    x, log_scale = x * 200, torch.full_like(log_scale, -12)
    assert (x.float() @ keys.float().mT).max() > 65504
    problem = problem.change(x=x, prompts=prompts, keys=keys, log_scale=log_scale)
    out, oracle = problem.call(ops.apt), problem.double().call(ops.apt_reference)
    assert oracle.abs().max() < 65504
    assert (out.double() - oracle).abs().max() <= 1e-3 * oracle.abs().max()


def test_nan_is_not_hidden(device):
    problem = make_problem(20, 64, 8).to(device.torch_device)
    problem["x"][3, 5] = float("nan")
    results = problem.run(ops.apt)
    out, dx = results["out"], results["dx"]
    assert out[3].isnan().all() and dx[3].isnan().all()
    assert not out[:3].isnan().any() and not out[4:].isnan().any()


@pytest.mark.parametrize("seed", range(3))
def test_input_gradient_is_many_times_better_than_eager_in_bfloat16(device, seed):
    """Rounded keys flip ReLU's mask; float32 scores of unrounded keys do not (Frobenius norm against float64).

    On the CPU products of backward see the float32 weights whole as well; on CUDA, where they would cost two more
    products, they see them rounded.
    """
    problem = make_problem(1920, 768, 50, dtype=torch.bfloat16, weight_dtype=torch.float32, std=0.02, seed=seed)
    problem = problem.to(device.torch_device)
    exact = problem.double().run(ops.apt_reference)["dx"]
    eager, ours = problem.run(ops.apt_reference)["dx"], problem.run(ops.apt)["dx"]
    times = 8 if device.rounds_for_tensor_cores else 10
    assert times * (ours.double() - exact).norm() <= (eager.double() - exact).norm()


def test_cuda_kernel_that_cannot_be_launched():
    """Where a block has too little shared memory, the error says so, and the next call works."""
    problem = make_problem(10, 64, 300)
    with emulation():
        expected = problem.run(ops.apt)
        with (
            emulation(shared_memory_limit=64 << 10),
            pytest.raises(
                RuntimeError, match=r"apt: the CUDA kernel could not be launched.*: .* too little shared memory"
            ),
        ):
            problem.call(ops.apt)
        again = problem.run(ops.apt)
    assert_equal(again, expected)


@pytest.mark.parametrize("activation", ["relu", "softmax"])
def test_reference_gradients_are_those_of_the_published_formula(activation):
    """apt_reference under autograd against the backward formula of the specification, in float64."""
    problem = make_problem(20, 16, 6, dtype=torch.float64, activation=activation)
    (x, y, prompts, keys, log_scale), dout = problem.tensors.values(), problem.dout
    raw = x @ keys.T
    scores = raw.clamp(min=0) if activation == "relu" else raw.softmax(-1)
    gate, scale = scores.amax(-1, keepdim=True), log_scale.exp()
    out = scale * (y + gate * (scores @ prompts))
    dg = gate * scale * dout
    ds = dg @ prompts.T
    ds = ds * (raw > 0) if activation == "relu" else scores * (ds - (ds * scores).sum(-1, keepdim=True))
    formula = [out, ds @ keys, scale * dout, scores.T @ dg, ds.T @ x, (dout * out).sum().reshape(1)]
    for (name, actual), expected in zip(problem.run(ops.apt_reference).items(), formula, strict=True):
        torch.testing.assert_close(actual, expected, msg=name)


def test_saved_for_backward_is_keys_gate_and_scores():
    problem = make_problem(1920, 768, 50).trained()
    saved = saved_for_backward(lambda: problem.call(ops.apt), problem.tensors.values())
    assert 0 < sum(saved) <= 4 * 1920 * (56 + 1)


def test_backward_op_takes_only_what_forward_returned():
    dout, *tensors, gate, scores = next(APT.raw_backward(APT.problem()))[:8]
    for name, wrong in {
        "scores": (gate, scores.mT.contiguous().mT),
        "gate": (gate.bfloat16(), scores),
    }.items():
        with pytest.raises(RuntimeError, match=f"apt: {name} must .*, (got|as the forward op returned it)"):
            torch.ops.petl_ext.apt_backward(dout, *tensors, *wrong, "relu", True, True, True, True)


def test_backward_op_takes_dout_in_the_dtype_of_y_only():
    dout, *rest = next(APT.raw_backward(APT.problem()))
    with pytest.raises(RuntimeError, match="apt: dout must have the dtype of y"):
        torch.ops.petl_ext.apt_backward(dout.bfloat16(), *rest)


def test_cuda_tensors_where_the_build_has_no_cuda():
    expected = r"no kernel for cuda:0 .*Installed anew beside a CUDA build of torch"
    assert re.search(expected, no_kernel_text("apt", {"cuda:0"}))


def test_unknown_cpu_path():
    with pytest.raises(RuntimeError, match=r"must be auto or one of: .*portable, got sse9"):
        ops.cpu_path("sse9")
    code = "import torch, petl_ext; petl_ext.ops.cpu_path()"
    for call in ("", "'auto'"):
        result = subprocess.run(
            [sys.executable, "-c", code.replace("()", f"({call})")],
            env={**os.environ, "PETL_CPU_PATH": "sse9"},
            capture_output=True,
            text=True,
        )
        assert result.returncode and "PETL_CPU_PATH must be auto or one of" in result.stderr
    environment = {**os.environ, "PETL_CPU_PATH": "sse9"}
    assert subprocess.run([sys.executable, "-c", "import petl_ext"], env=environment).returncode == 0
    command = [sys.executable, "-m", "petl_ext", "info"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert "PETL_CPU_PATH must be auto or one of" in result.stderr


def test_cpu_path_from_the_environment():
    code = "import petl_ext; print(petl_ext.ops.cpu_path())"
    for name in CPU_PATHS:
        environment = {**os.environ, "PETL_CPU_PATH": name}
        result = subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
        )
        assert result.stdout.strip() == name
