"""What holds of every op: values and gradients against its reference, and every way in which PyTorch may call it."""

import itertools
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from devices import (
    CPU_DEVICES,
    CUDA_DEVICES,
    DEVICES,
    DTYPES,
    ONE_OF_EACH,
    TRITON,
    TRITON_SLAB,
    TRITON_TILE,
    device_and_dtype,
    emulation,
)
from op_problems import TESTED, assert_equal, check
from problems import OPS, draw

from petl_ext import ops

on_cpu = pytest.mark.parametrize("device", CPU_DEVICES, ids=str, indirect=True)
on_cuda = pytest.mark.parametrize("device", CUDA_DEVICES, ids=str, indirect=True)
COMPILED = [device for device in DEVICES if not device.is_interpreted]
on_what_is_compiled = pytest.mark.parametrize("device", COMPILED, ids=str, indirect=True)
on_what_is_interpreted = pytest.mark.parametrize(
    "device", [device for device in DEVICES if device.is_interpreted], ids=str, indirect=True
)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
every_op = pytest.mark.parametrize("tested", TESTED.values(), ids=str)


def of_each(names, values_of):
    """Parametrizes by each op and what `values_of(tested)` gives of it."""
    cases = [
        pytest.param(tested, *values, id="-".join(map(str, (tested, *values))))
        for tested in TESTED.values()
        for values in values_of(tested)
    ]
    return pytest.mark.parametrize(("tested", *names), cases)


every_form = of_each(["form"], lambda tested: [(form,) for form in tested.op.forms])


# Schemas and fake kernels are the native ones on every backend; the interpreter takes the usual forms.
on_each_device_in_its_forms = pytest.mark.parametrize(
    ("device", "tested", "form"),
    [
        pytest.param(device, tested, form, id=f"{device}-{tested}-{form}")
        for device in ONE_OF_EACH
        for tested in TESTED.values()
        for form in (tested.usual if device.is_interpreted else tested.op.forms)
    ],
    indirect=["device"],
)


def test_every_op_is_tested():
    public = {name.removesuffix("_reference") for name in ops.__all__ if name.endswith("_reference")}
    assert TESTED.keys() == OPS.keys() == public


def check_sizes(device, tested, sizes, form, dtype, cut=None):
    activation = tested.sizes[sizes]
    options = {"activation": activation} if activation else {}
    check(device, tested.problem(*(cut or sizes), form=form, dtype=dtype, **options))


@on_what_is_compiled
@every_dtype
@of_each(["sizes", "form"], lambda tested: itertools.product(tested.sizes, tested.op.forms))
def test_values_and_gradients(device, tested, sizes, form, dtype):
    check_sizes(device, tested, sizes, form, dtype)


@on_what_is_interpreted
@every_dtype
@of_each(
    ["sizes", "form"],
    lambda tested: itertools.product((s for s in tested.sizes if TRITON.cut(s) == s), tested.op.forms),
)
def test_values_and_gradients_where_kernels_are_interpreted(device, tested, sizes, form, dtype):
    check_sizes(device, tested, sizes, form, dtype, device.cut(sizes, TRITON_TILE))


@on_cpu
@every_dtype
@every_form
def test_width_that_is_no_multiple_of_eight(device, tested, form, dtype):
    for sizes in tested.odd_sizes:
        check(device, tested.problem(*sizes, form=form, dtype=dtype))


@on_cuda
@of_each(["message"], lambda tested: [(message,) for message in tested.unsupported])
def test_sizes_that_cuda_does_not_support(device, tested, message):
    problem = tested.problem(*tested.unsupported[message]).to(device.torch_device)
    with pytest.raises(RuntimeError, match=message):
        problem.call(tested.op.ours)


@pytest.mark.parametrize("tested", [tested for tested in TESTED.values() if tested.slabs], ids=str)
def test_more_rows_than_one_slab(device, tested):
    check(device, tested.problem(*device.cut(tested.slabs, TRITON_SLAB)))


@pytest.mark.parametrize(
    ("dtype", "weight_dtype"), [*itertools.permutations(DTYPES, 2)], ids=lambda dtype: str(dtype).removeprefix("torch.")
)
@every_op
def test_weights_in_another_dtype(device, tested, dtype, weight_dtype):
    """Between two narrow ones with a smooth activation: whether rounding lets a value near zero through is luck."""
    activations = tested.op.activations
    activation = activations[0 if torch.float32 in (dtype, weight_dtype) else -1]
    for form in tested.usual:
        sizes, dtypes = device.cut(tested.mixed, TRITON_TILE), {"dtype": dtype, "weight_dtype": weight_dtype}
        check(device, tested.problem(*sizes, form=form, activation=activation, **dtypes))


@every_op
def test_infinity_stays_in_its_row(device, tested):
    """An odd inner size and columns beyond it: what is padded must not turn an infinity into NaN elsewhere."""
    first = tested.op.rows[0]
    for form, dtype, infinity in itertools.product(tested.op.forms, DTYPES, (torch.inf, -torch.inf)):
        problem = tested.problem(*tested.small[:-1], 7, form=form, dtype=dtype).to(device.torch_device)
        problem[first][1] = infinity
        for name in tested.op.weights:
            if name in problem.tensors and problem[name].dim() == 2:
                problem[name].abs_()
        results, expected = problem.run(tested.op.ours), problem.double().run(tested.op.reference)
        for name in ("out", f"d{first}"):
            assert torch.equal(results[name].isfinite(), expected[name].isfinite()), (form, dtype, infinity, name)


@every_form
def test_any_leading_shape_and_strides(device, tested, form):
    for dtype in DTYPES[1:2] if device.is_interpreted else DTYPES:
        problem = tested.problem(*tested.laid_out_sizes, form=form, dtype=dtype).to(device.torch_device)
        expected = problem.run(tested.op.ours)
        for layout_name, layout in tested.layouts.items():
            trained = problem.trained()
            laid_out = {name: layout(t) for name, t in trained.tensors.items() if name in tested.laid_out}
            out = trained.call(tested.op.ours, {**trained.tensors, **laid_out})
            dout = layout(problem.dout)
            assert out.shape == dout.shape and out.is_contiguous(), layout_name
            gradients = torch.autograd.grad(out, list(trained.tensors.values()), dout)
            for got, (name, wanted) in zip((out, *gradients), expected.items(), strict=True):
                assert torch.equal(got.reshape(wanted.shape), wanted), f"{dtype}, {layout_name}: {name}"


@pytest.mark.parametrize("tested", [tested for tested in TESTED.values() if tested.rows_alone], ids=str)
def test_one_row_without_leading_axes(tested):
    problem = tested.problem(1, *tested.small[1:])
    alone = problem.change(**{name: problem[name][0] for name in tested.op.rows})
    assert torch.equal(alone.call(tested.op.ours), problem.call(tested.op.ours)[0])


@every_op
def test_expanded_gradient(tested):
    problem = tested.problem().trained()
    leaves, out = list(problem.tensors.values()), problem.call(tested.op.ours)
    by_sum = torch.autograd.grad(out.sum(), leaves)
    by_ones = torch.autograd.grad(problem.call(tested.op.ours), leaves, torch.ones(out.shape))
    assert all(torch.equal(a, b) for a, b in zip(by_sum, by_ones, strict=True))


@every_form
def test_empty_input(device, tested, form):
    problem = tested.problem(0, *tested.small[1:], form=form).to(device.torch_device)
    results = problem.run(tested.op.ours)
    assert results.pop("out").shape == problem.dout.shape
    assert_equal(results, {f"d{name}": torch.zeros_like(t) for name, t in problem.tensors.items()})


@device_and_dtype
@every_op
def test_two_runs_are_bit_equal(device, tested, dtype):
    for form in tested.usual:
        problem = tested.problem(*device.cut(tested.long, TRITON_SLAB), form=form, dtype=dtype).to(device.torch_device)
        assert_equal(problem.run(tested.op.ours), problem.run(tested.op.ours))


@pytest.mark.parametrize("order", ["forward", "reverse"])
@pytest.mark.parametrize("copies", ["lazy", "eager"])
@every_op
def test_cuda_kernels_give_the_same_bits_in_whatever_order_they_run(tested, order, copies):
    """A missing barrier or wait would show: warps run in either order, asynchronous copies land early or late."""
    for sizes, dtype in tested.ordered:
        problem = tested.problem(*sizes, dtype=dtype)
        with emulation():
            expected = problem.run(tested.op.ours)
        with emulation(order=order, copies=copies):
            assert_equal(problem.run(tested.op.ours), expected)


@every_dtype
@pytest.mark.parametrize("threads", [1, 2, 5])
@every_op
def test_bit_equal_whatever_the_number_of_threads(tested, threads, dtype):
    problem = tested.problem(*tested.long, dtype=dtype)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    expected = problem.run(tested.op.ours)
    try:
        torch.set_num_threads(threads)
        for _ in range(2):
            assert_equal(problem.run(tested.op.ours), expected)
    finally:
        torch.set_num_threads(before)


@every_form
def test_only_the_gradients_asked_for(device, tested, form):
    problem = tested.problem(form=form).to(device.torch_device)
    expected = problem.run(tested.op.ours)
    for wanted in problem.tensors:
        leaves = {name: t.clone().requires_grad_(name == wanted) for name, t in problem.tensors.items()}
        problem.call(tested.op.ours, leaves).backward(problem.dout)
        assert torch.equal(leaves[wanted].grad, expected[f"d{wanted}"]), wanted
        assert all(t.grad is None for name, t in leaves.items() if name != wanted)


@every_op
def test_float64_runs_the_reference(tested):
    problem = tested.problem(dtype=torch.float64)
    assert_equal(problem.run(tested.op.ours), problem.run(tested.op.reference))


@on_each_device_in_its_forms
def test_opcheck(device, tested, form):
    problem = tested.problem(form=form).to(device.torch_device)
    torch.library.opcheck(device.raw(tested.op, "forward"), tested.raw(problem))
    for arguments in tested.raw_backward(problem):
        torch.library.opcheck(device.raw(tested.op, "backward"), arguments)


@on_each_device_in_its_forms
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_as_one_graph(device, tested, form, dynamic):
    torch._dynamo.reset()
    compiled = torch.compile(tested.op.ours, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for sizes in (tested.small, tested.other):
        problem = tested.problem(*sizes, form=form).to(device.torch_device)
        assert_equal(problem.run(compiled), problem.run(tested.op.ours))


@every_op
def test_integers_are_refused(device, tested):
    problem = draw(tested.op, *tested.small, **tested.everything).to(device.torch_device)
    for name, tensor in problem.tensors.items():
        said = tested.int_message.get(name, f"{name} must be float32, bfloat16 or float16, got (Int|torch.int32)")
        with pytest.raises(RuntimeError, match=f"{tested}: {said}"):
            problem.change(**{name: tensor.int()}).call(tested.op.ours)


@of_each(["message"], lambda tested: [(message,) for message in tested.wrong_for_kernels | tested.wrong])
def test_wrong_arguments_are_named(device, tested, message):
    with pytest.raises(RuntimeError, match=f"{tested}: ({message})"):
        tested.wrong_problem(message).to(device.torch_device).call(tested.op.ours)


@of_each(["message"], lambda tested: [(message,) for message in tested.wrong])
def test_wrong_arguments_in_float64_and_under_compile(tested, message):
    problem = tested.wrong_problem(message)
    for elsewhere in (problem.double(), problem.to("meta")):
        with pytest.raises(RuntimeError, match=f"{tested}: ({message})"):
            elsewhere.call(tested.op.ours)


@every_op
def test_tensors_on_two_devices(tested):
    problem = draw(tested.op, *tested.small, **tested.everything)
    for name in tested.op.weights:
        with pytest.raises(RuntimeError, match="all arguments must be on one device, got cpu, meta"):
            problem.change(**{name: problem[name].to("meta")}).call(tested.op.ours)


@every_op
def test_several_python_threads_at_once(device, tested):
    problems = [tested.problem(*device.cut((*tested.several, 10 + i), TRITON_TILE), seed=i) for i in range(4)]
    problems = [problem.to(device.torch_device) for problem in problems]
    expected = [problem.run(tested.op.ours) for problem in problems]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(device.draws(5)):
            results = pool.map(lambda problem: problem.run(tested.op.ours), problems)
            for result, wanted in zip(results, expected, strict=True):
                assert_equal(result, wanted)


@every_op
def test_works_after_an_error(device, tested):
    problem = tested.problem().to(device.torch_device)
    expected = problem.run(tested.op.ours)
    for message in tested.wrong:
        with pytest.raises(RuntimeError):
            tested.wrong_problem(message).to(device.torch_device).call(tested.op.ours)
    assert_equal(problem.run(tested.op.ours), expected)


@every_op
def test_device_without_kernel(tested):
    problem = tested.problem().to("meta")
    for direction, arguments in (("forward", tested.raw(problem)), ("backward", next(tested.raw_backward(problem)))):
        with pytest.raises(NotImplementedError, match=rf"no kernel for meta.*{tested}_reference"):
            tested.op.raw(direction).redispatch(torch._C.DispatchKeySet(torch._C.DispatchKey.XPU), *arguments)
