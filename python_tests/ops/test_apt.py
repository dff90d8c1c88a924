"""ops.apt against its reference: values, gradients, and every way in which PyTorch may call it."""

import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from places import CPU_PATHS, CPU_PLACES, CUDA_PLACES, DEVICE_PLACES, emulation
from tolerance import assert_as_good_as_torch, outputs_and_gradients

from petl_ext import ops
from petl_ext.ops.kernels import no_kernel_text

NAMES = ("out", "dx", "dy", "dprompts", "dkeys", "dlog_scale")
TILE = 96  # rows per tile on the widest CPU path
CUDA_TILE = 128  # and of the largest block of threads


def make_inputs(rows, dim, num_prompts, dtype=torch.float32, weight_dtype=None, std=0.05, seed=0):
    """x, y, prompts, keys, log_scale, and a gradient of the output."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    prompts = normal(num_prompts, dim) * std
    keys = prompts + normal(num_prompts, dim) * std / 5
    weights = [t.to(weight_dtype or dtype) for t in (prompts, keys, torch.tensor([0.1]))]
    return [normal(rows, dim).to(dtype), normal(rows, dim).to(dtype), *weights], normal(rows, dim).to(dtype)


def check(place, inputs, dout, activation):
    def run(function, inputs, dout):
        return outputs_and_gradients(lambda *args: function(*args, activation), inputs, dout)

    *inputs, dout = place.put([*inputs, dout])
    oracle = run(ops.apt_reference, [t.double() for t in inputs], dout.double())
    theirs = run(ops.apt_reference, inputs, dout)
    ours = run(ops.apt, inputs, dout)
    for name, tensor, input_ in zip(NAMES, ours, [inputs[1], *inputs], strict=True):
        assert tensor.dtype == input_.dtype, f"{name} has dtype {tensor.dtype}, expected {input_.dtype}"
    for results in zip(NAMES, ours, theirs, oracle, strict=True):
        assert_as_good_as_torch(*results)


@pytest.mark.parametrize("activation", ["relu", "softmax"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("rows", "dim", "num_prompts"),
    [
        (1, 64, 1),
        (7, 64, 5),
        (TILE - 1, 768, 50),
        (TILE, 64, 16),
        (TILE + 1, 1024, 200),
        (CUDA_TILE - 1, 64, 129),
        (CUDA_TILE + 1, 72, 512),
        (3, 8192, 5),
        (1000, 768, 50),
    ],
)
def test_values_and_gradients(place, rows, dim, num_prompts, dtype, activation):
    check(place, *make_inputs(rows, dim, num_prompts, dtype), activation)


@pytest.mark.parametrize("place", CPU_PLACES, ids=str, indirect=True)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_width_that_is_no_multiple_of_eight(place, dtype):
    check(place, *make_inputs(65, 770, 33, dtype), "relu")


@pytest.mark.parametrize("place", CUDA_PLACES, ids=str, indirect=True)
@pytest.mark.parametrize(
    ("dim", "num_prompts", "message"),
    [
        (770, 33, "width D must be a multiple of 8 up to 8192, got 770"),
        (8200, 3, "width D must be a multiple of 8 up to 8192, got 8200"),
        (64, 513, "number of prompts P must be at most 512, got 513"),
    ],
)
def test_sizes_that_cuda_does_not_support(place, dim, num_prompts, message):
    inputs, _ = make_inputs(2, dim, num_prompts)
    with pytest.raises(RuntimeError, match=message):
        ops.apt(*place.put(inputs))


def test_more_rows_than_one_slab(place):
    check(place, *make_inputs(4100, 64, 17), "relu")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_float32_weights_beside_narrow_activations(place, dtype):
    check(place, *make_inputs(200, 768, 50, dtype, weight_dtype=torch.float32), "relu")


@pytest.mark.parametrize("wide", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("narrow", ["x", "y"])
def test_x_and_y_in_two_dtypes(place, narrow, wide):
    inputs, dout = make_inputs(200, 768, 50)
    dtypes = (torch.bfloat16, wide) if narrow == "x" else (wide, torch.bfloat16)
    inputs[:2] = [tensor.to(dtype) for tensor, dtype in zip(inputs[:2], dtypes, strict=True)]
    check(place, inputs, dout.to(inputs[1].dtype), "relu")


@pytest.mark.parametrize("activation", ["relu", "softmax"])
@pytest.mark.parametrize("spoiled", range(5), ids=["x", "y", "prompts", "keys", "log_scale"])
def test_a_nan_reaches_all_that_it_reaches_in_eager(place, spoiled, activation):
    """Of the gate, too, which is the greatest score."""
    inputs, dout = make_inputs(9, 64, 21)
    inputs[spoiled].view(-1)[-1] = torch.nan
    *inputs, dout = place.put([*inputs, dout])
    ours = outputs_and_gradients(lambda *tensors: ops.apt(*tensors, activation), inputs, dout)
    theirs = outputs_and_gradients(lambda *tensors: ops.apt_reference(*tensors, activation), inputs, dout)
    for name, found, wanted in zip(NAMES, ours, theirs, strict=True):
        assert not (wanted.isnan() & ~found.isnan()).any(), name


def test_rows_more_than_2_to_the_31_elements_apart(place):
    inputs, dout = make_inputs(2, 64, 10, torch.bfloat16)
    *inputs, dout = place.put([*inputs, dout])
    expected = outputs_and_gradients(ops.apt, inputs, dout)
    # Only the two rows are touched, so only their pages take memory.
    far_apart = torch.empty(2**31 + 64, dtype=torch.bfloat16, device=place.device).as_strided((2, 64), (2**31, 1))
    for i in range(2):
        x_or_y = [far_apart.copy_(inputs[i]) if j == i else inputs[j] for j in range(2)]
        tensors = [t.detach().requires_grad_() for t in (*x_or_y, *inputs[2:])]
        out = ops.apt(*tensors)
        actual = [out, *torch.autograd.grad(out, tensors, dout)]
        assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


def test_rows_that_overlap(place):
    inputs, dout = make_inputs(40, 72, 10)
    *inputs, dout = place.put([*inputs, dout])
    inputs[0] = inputs[0].flatten()[: 40 + 72 - 1].unfold(0, 72, 1)
    expected = ops.apt(inputs[0].contiguous(), *inputs[1:])
    assert inputs[0].stride() == (1, 1)
    assert torch.equal(ops.apt(*inputs), expected)


def test_large_values_in_float16(place):
    """Scores beyond float16's range (65504) must not overflow inside, since the output is finite."""
    inputs, _ = make_inputs(50, 768, 8, torch.float16)
    x, y, prompts, keys, log_scale = place.put(inputs)
    keys, prompts = (keys.float() * 400).half(), (prompts.float() * 1e-4).half()
    x, log_scale = x * 200, torch.full_like(log_scale, -12)
    assert (x.float() @ keys.float().mT).max() > 65504
    out = ops.apt(x, y, prompts, keys, log_scale)
    oracle = ops.apt_reference(*(t.double() for t in (x, y, prompts, keys, log_scale)))
    assert oracle.abs().max() < 65504
    assert (out.double() - oracle).abs().max() <= 1e-3 * oracle.abs().max()


def test_nan_is_not_hidden(place):
    inputs, dout = make_inputs(20, 64, 8)
    inputs[0][3, 5] = float("nan")
    out, dx, *_ = outputs_and_gradients(ops.apt, place.put(inputs), dout.to(place.device))
    assert out[3].isnan().all() and dx[3].isnan().all()
    assert not out[:3].isnan().any() and not out[4:].isnan().any()


@pytest.mark.parametrize("seed", range(3))
def test_input_gradient_is_many_times_better_than_eager_in_bfloat16(place, seed):
    """Rounded keys flip ReLU's mask; float32 scores of unrounded keys do not (Frobenius norm against float64).

    On the CPU the products of backward see the float32 weights whole as well; on CUDA, where they would cost two more
    products, they see them rounded.
    """
    inputs, dout = make_inputs(1920, 768, 50, torch.bfloat16, weight_dtype=torch.float32, std=0.02, seed=seed)
    *inputs, dout = place.put([*inputs, dout])
    exact = outputs_and_gradients(ops.apt_reference, [t.double() for t in inputs], dout.double())[1]
    eager = outputs_and_gradients(ops.apt_reference, inputs, dout)[1]
    ours = outputs_and_gradients(ops.apt, inputs, dout)[1]
    times = 8 if place.runs_cuda_kernels else 10
    assert times * (ours.double() - exact).norm() <= (eager.double() - exact).norm()


def test_infinite_input_stays_in_its_row(place):
    """Odd P and columns beyond it: what is padded must not turn an infinity into NaN elsewhere."""
    inputs, dout = make_inputs(20, 64, 7, torch.bfloat16)
    inputs[0][3] = float("-inf")
    inputs[3] = inputs[3].abs()
    inputs[2] = inputs[2].abs()
    *inputs, dout = place.put([*inputs, dout])
    out, dx, *_ = outputs_and_gradients(ops.apt, inputs, dout)
    expected = outputs_and_gradients(ops.apt_reference, [t.double() for t in inputs], dout.double())
    assert torch.equal(out.isfinite(), expected[0].isfinite())
    assert torch.equal(dx.isfinite(), expected[1].isfinite())


def test_any_leading_shape_and_strides(place):
    inputs, dout = make_inputs(60, 64, 10)
    x, y, *weights, dout = place.put([*inputs, dout])
    expected = outputs_and_gradients(ops.apt, [x, y, *weights], dout)
    layouts = {
        "leading axes": lambda t: t.view(3, 4, 5, 64),
        "row stride": lambda t: torch.cat([t, t], 1)[:, :64],
        "transposed": lambda t: t.mT.contiguous().mT,
        "permuted": lambda t: t.view(6, 10, 64).permute(1, 0, 2).contiguous().permute(1, 0, 2),
        "not aligned": lambda t: torch.cat([t.new_zeros(1), t.flatten()])[1:].view(60, 64),
    }
    for name, layout in layouts.items():
        a, b = layout(x).detach().requires_grad_(), layout(y).detach().requires_grad_()
        out = ops.apt(a, b, *weights)
        assert out.shape == a.shape and out.is_contiguous(), name
        gradients = torch.autograd.grad(out, [a, b], layout(dout).reshape(out.shape))
        for got, wanted in zip([out, *gradients], expected, strict=False):
            assert torch.equal(got.reshape(60, 64), wanted), name


def test_one_row_without_leading_axes():
    (x, y, *weights), _ = make_inputs(1, 64, 10)
    assert torch.equal(ops.apt(x[0], y[0], *weights), ops.apt(x, y, *weights)[0])


def test_expanded_gradient():
    inputs, _ = make_inputs(30, 64, 10)
    inputs = [t.requires_grad_() for t in inputs]
    by_sum = torch.autograd.grad(ops.apt(*inputs).sum(), inputs)
    by_ones = torch.autograd.grad(ops.apt(*inputs), inputs, torch.ones(30, 64))
    assert all(torch.equal(a, b) for a, b in zip(by_sum, by_ones, strict=True))


def test_empty_input(place):
    inputs, dout = make_inputs(0, 64, 10)
    *inputs, dout = place.put([*inputs, dout])
    out, *gradients = outputs_and_gradients(ops.apt, inputs, dout)
    assert out.shape == (0, 64)
    assert all(torch.equal(g, torch.zeros_like(t)) for g, t in zip(gradients, inputs, strict=True))


def test_two_runs_are_bit_equal(place):
    inputs, dout = make_inputs(5000, 64, 33, torch.bfloat16)
    *inputs, dout = place.put([*inputs, dout])
    first, second = (outputs_and_gradients(ops.apt, inputs, dout) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("order", ["forward", "reverse"])
@pytest.mark.parametrize("copies", ["lazy", "eager"])
def test_cuda_kernels_give_the_same_bits_in_whatever_order_they_run(order, copies):
    """A missing barrier or wait would show: warps run in either order, asynchronous copies land early or late."""
    for num_prompts, dtype in ((50, torch.bfloat16), (200, torch.bfloat16), (300, torch.float16), (300, torch.float32)):
        problem = make_inputs(131, 136, num_prompts, dtype)
        with emulation():
            expected = outputs_and_gradients(ops.apt, *problem)
        with emulation(order=order, copies=copies):
            actual = outputs_and_gradients(ops.apt, *problem)
        assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


def test_cuda_kernel_that_cannot_be_launched():
    """Where a block has too little shared memory, the error says so, and the next call works."""
    problem = make_inputs(10, 64, 300)
    with emulation():
        expected = outputs_and_gradients(ops.apt, *problem)
        with (
            emulation(shared_memory_limit=64 << 10),
            pytest.raises(
                RuntimeError, match=r"apt: the CUDA kernel could not be launched.*: .* too little shared memory"
            ),
        ):
            ops.apt(*problem[0])
        again = outputs_and_gradients(ops.apt, *problem)
    assert all(torch.equal(a, b) for a, b in zip(again, expected, strict=True))


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_bit_equal_whatever_the_number_of_threads(threads):
    inputs, dout = make_inputs(5000, 64, 33)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    expected = outputs_and_gradients(ops.apt, inputs, dout)
    try:
        torch.set_num_threads(threads)
        for _ in range(2):
            again = outputs_and_gradients(ops.apt, inputs, dout)
            assert all(torch.equal(a, b) for a, b in zip(again, expected, strict=True))
    finally:
        torch.set_num_threads(before)


def test_only_the_gradients_asked_for(place):
    inputs, dout = make_inputs(50, 64, 10)
    *inputs, dout = place.put([*inputs, dout])
    expected = outputs_and_gradients(ops.apt, inputs, dout)[1:]
    for index in range(5):
        tensors = [t.clone().requires_grad_(i == index) for i, t in enumerate(inputs)]
        ops.apt(*tensors).backward(dout)
        assert torch.equal(tensors[index].grad, expected[index]), NAMES[index + 1]
        assert all(t.grad is None for i, t in enumerate(tensors) if i != index)


def test_float64_runs_the_reference():
    inputs, dout = make_inputs(20, 64, 10, torch.float64)
    for ours, theirs in zip(
        outputs_and_gradients(ops.apt, inputs, dout),
        outputs_and_gradients(ops.apt_reference, inputs, dout),
        strict=True,
    ):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("activation", ["relu", "softmax"])
def test_reference_gradients_are_those_of_the_published_formula(activation):
    """apt_reference under autograd against the backward formula of the specification, in float64."""
    (x, y, prompts, keys, log_scale), dout = make_inputs(20, 16, 6, torch.float64)
    raw = x @ keys.T
    scores = raw.clamp(min=0) if activation == "relu" else raw.softmax(-1)
    gate, scale = scores.amax(-1, keepdim=True), log_scale.exp()
    out = scale * (y + gate * (scores @ prompts))
    dg = gate * scale * dout
    ds = dg @ prompts.T
    ds = ds * (raw > 0) if activation == "relu" else scores * (ds - (ds * scores).sum(-1, keepdim=True))
    formula = [out, ds @ keys, scale * dout, scores.T @ dg, ds.T @ x, (dout * out).sum().reshape(1)]
    actual = outputs_and_gradients(
        lambda *args: ops.apt_reference(*args, activation), [x, y, prompts, keys, log_scale], dout
    )
    for name, a, b in zip(NAMES, actual, formula, strict=True):
        torch.testing.assert_close(a, b, msg=name)


def test_saved_for_backward_is_keys_gate_and_scores():
    inputs, _ = make_inputs(1920, 768, 50)
    inputs = [t.requires_grad_() for t in inputs]
    saved = {}

    def pack(tensor):
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        ops.apt(*inputs)
    for tensor in inputs:
        saved.pop(tensor.untyped_storage().data_ptr(), None)
    assert sum(saved.values()) <= 4 * 1920 * (56 + 1)


@pytest.mark.parametrize("place", DEVICE_PLACES, ids=str, indirect=True)
def test_opcheck(place):
    inputs, dout = make_inputs(30, 64, 10)
    *inputs, dout = place.put([*inputs, dout])
    torch.library.opcheck(torch.ops.petl_ext.apt_forward.default, (*inputs, "relu", True))
    _, gate, scores = torch.ops.petl_ext.apt_forward(*inputs, "relu", True)
    x, y, prompts, keys, log_scale = inputs
    for optional_y, needs in ((y, (True,) * 4), (None, (False, True, False, True))):
        arguments = (dout, x, optional_y, prompts, keys, log_scale, gate, scores, "relu", *needs)
        torch.library.opcheck(torch.ops.petl_ext.apt_backward.default, arguments)


@pytest.mark.parametrize("place", DEVICE_PLACES, ids=str, indirect=True)
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_as_one_graph(place, dynamic):
    compiled = torch.compile(ops.apt, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for rows in (30, 47):
        inputs, dout = make_inputs(rows, 64, 10)
        *inputs, dout = place.put([*inputs, dout])
        for got, wanted in zip(
            outputs_and_gradients(compiled, inputs, dout), outputs_and_gradients(ops.apt, inputs, dout), strict=True
        ):
            assert torch.equal(got, wanted)


@pytest.mark.parametrize("index", [0, 1, 2, 3, 4])
def test_wrong_arguments_are_named(place, index):
    inputs = place.put(make_inputs(30, 64, 10)[0])
    names = ("x", "y", "prompts", "keys", "log_scale")
    wrong_dtype = [t.int() if i == index else t for i, t in enumerate(inputs)]
    with pytest.raises(RuntimeError, match=rf"apt: {names[index]} must be float32, bfloat16 or float16, got Int"):
        ops.apt(*wrong_dtype)
    wrong_shape = [t[..., :-1] if i == index else t for i, t in enumerate(inputs)]
    # A narrower `prompts` sets the width that the others are held against.
    blamed = "x" if names[index] == "prompts" else names[index]
    with pytest.raises(RuntimeError, match=rf"apt: {blamed} must have shape \[.*\].*, got \[.*\]"):
        ops.apt(*wrong_shape)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_unknown_activation(dtype):
    inputs, _ = make_inputs(30, 64, 10, dtype)
    with pytest.raises(RuntimeError, match="activation must be relu or softmax, got gelu"):
        ops.apt(*inputs, "gelu")


@pytest.mark.parametrize(("index", "name"), [(0, "y"), (1, "y"), (3, "keys"), (4, "log_scale")])
def test_wrong_shapes_in_float64_and_under_compile(index, name):
    inputs, _ = make_inputs(30, 64, 10, torch.float64)
    inputs[index] = torch.cat([inputs[index]] * 2)
    with pytest.raises(RuntimeError, match=rf"apt: {name} must have shape .*, got"):
        ops.apt(*inputs)
    with pytest.raises(RuntimeError, match=rf"{name} must have shape .*, got"):
        ops.apt(*(tensor.float().to("meta") for tensor in inputs))


def test_tensors_on_two_devices():
    inputs, _ = make_inputs(3, 64, 10)
    inputs[3] = inputs[3].to("meta")
    with pytest.raises(RuntimeError, match="all arguments must be on one device, got cpu, meta"):
        ops.apt(*inputs)


def test_backward_op_takes_only_what_forward_returned():
    inputs, dout = make_inputs(30, 64, 10)
    _, gate, scores = torch.ops.petl_ext.apt_forward(*inputs, "relu", True)
    x, y, *weights = inputs
    for name, wrong in {
        "scores": (gate, scores.mT.contiguous().mT),
        "gate": (gate.bfloat16(), scores),
    }.items():
        with pytest.raises(RuntimeError, match=f"apt: {name} must .*, (got|as the forward op returned it)"):
            torch.ops.petl_ext.apt_backward(dout, x, y, *weights, *wrong, "relu", True, True, True, True)


def test_backward_op_takes_dout_in_the_dtype_of_y_only():
    inputs, dout = make_inputs(30, 64, 10)
    _, gate, scores = torch.ops.petl_ext.apt_forward(*inputs, "relu", True)
    x, y, *weights = inputs
    with pytest.raises(RuntimeError, match="apt: dout must have the dtype of y"):
        torch.ops.petl_ext.apt_backward(dout.bfloat16(), x, y, *weights, gate, scores, "relu", *[True] * 4)


def test_several_python_threads_at_once(place):
    problems = [make_inputs(300, 64, 10 + i, seed=i) for i in range(4)]
    problems = [(place.put(inputs), dout.to(place.device)) for inputs, dout in problems]
    expected = [outputs_and_gradients(ops.apt, *problem) for problem in problems]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            results = list(pool.map(lambda problem: outputs_and_gradients(ops.apt, *problem), problems))
            for result, wanted in zip(results, expected, strict=True):
                assert all(torch.equal(a, b) for a, b in zip(result, wanted, strict=True))


def test_works_after_an_error(place):
    inputs, dout = make_inputs(30, 64, 10)
    *inputs, dout = place.put([*inputs, dout])
    expected = outputs_and_gradients(ops.apt, inputs, dout)
    with pytest.raises(RuntimeError):
        ops.apt(inputs[0][:5], *inputs[1:])
    again = outputs_and_gradients(ops.apt, inputs, dout)
    assert all(torch.equal(a, b) for a, b in zip(again, expected, strict=True))


def test_device_without_kernel():
    inputs, _ = make_inputs(3, 64, 10)
    with pytest.raises(NotImplementedError, match=r"no kernel for meta.*apt_reference"):
        torch.ops.petl_ext.apt_forward.default.redispatch(
            torch._C.DispatchKeySet(torch._C.DispatchKey.XPU), *[t.to("meta") for t in inputs], "relu", False
        )


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
