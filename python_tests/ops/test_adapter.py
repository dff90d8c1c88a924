"""ops.adapter against its reference: values, gradients, and every way in which PyTorch may call it."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace

import pytest
import torch
from places import CPU_PLACES, CUDA_PLACES, DEVICE_PLACES, emulation
from tolerance import assert_as_good_as_torch, outputs_and_gradients

from petl_ext import ops

TILE = 96  # rows per tile on the widest CPU path
CUDA_TILE = 128  # and of the largest block of threads
RAW_ORDER = ("norm_weight", "norm_bias", "down", "down_bias", "up", "up_bias", "gain")


@dataclass
class Problem:
    """Arguments of `adapter` by name (a tensor given as `scale` is named gain), and a gradient of the output."""

    tensors: dict
    dout: torch.Tensor
    residual_is_input: bool = False
    options: dict = field(default_factory=dict)

    def call(self, function, tensors=None):
        arguments = dict(self.tensors if tensors is None else tensors)
        if "gain" in arguments:
            arguments["scale"] = arguments.pop("gain")
        if self.residual_is_input:
            arguments["residual"] = arguments["x"]
        return function(**arguments, **self.options)

    def run(self, function):
        """{"out": the output, "dx": ..., and so on for each tensor}."""
        results = outputs_and_gradients(
            lambda *tensors: self.call(function, dict(zip(self.tensors, tensors, strict=True))),
            list(self.tensors.values()),
            self.dout,
        )
        return dict(zip(("out", *(f"d{name}" for name in self.tensors)), results, strict=True))

    def change(self, **tensors):
        return replace(self, tensors={**self.tensors, **tensors})

    def convert(self, to):
        """The problem with each tensor moved or converted by `to`."""
        return replace(self, tensors={name: to(t) for name, t in self.tensors.items()}, dout=to(self.dout))

    def on(self, place):
        return self.convert(lambda tensor: tensor.to(place.device))

    def double(self):
        return self.convert(lambda tensor: tensor.double())

    def raw(self, needs=None):
        """Arguments of the raw op adapter_forward, or with `needs` of adapter_backward."""
        x = self.tensors["x"]
        weights = [self.tensors.get(name) for name in RAW_ORDER]
        rest = (self.options.get("scale", 1.0), 1e-5, self.options.get("activation", "relu"))
        if needs is None:
            return (x, x if self.residual_is_input else self.tensors.get("residual"), *weights, *rest)
        return (self.dout, x, *weights, *rest, self.residual_is_input, *needs)


def make_problem(
    rows,
    dim,
    bottleneck,
    dtype=torch.float32,
    weight_dtype=None,
    norm=False,
    residual=None,
    gain=False,
    std=0.05,
    seed=0,
    **options,
):
    """residual: None, "input" or "other"; options are those of `adapter`: activation, scale, eps."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape, std=1.0, mean=0.0):
        return torch.randn(*shape, generator=generator) * std + mean

    tensors = {
        "x": normal(rows, dim),
        "down": normal(bottleneck, dim, std=std),
        "down_bias": normal(bottleneck, std=0.1),
        "up": normal(dim, bottleneck, std=std),
        "up_bias": normal(dim, std=0.1),
    }
    if norm:
        tensors |= {"norm_weight": normal(dim, std=0.2, mean=1.0), "norm_bias": normal(dim, std=0.2)}
    if gain:
        tensors["gain"] = torch.tensor([0.7])
    tensors = {name: t.to(dtype if name == "x" else weight_dtype or dtype) for name, t in tensors.items()}
    if residual == "other":
        tensors["residual"] = normal(rows, dim).to(dtype)
    return Problem(tensors, normal(rows, dim).to(dtype), residual == "input", options)


def check(place, problem):
    problem = problem.on(place)
    oracle, theirs = problem.double().run(ops.adapter_reference), problem.run(ops.adapter_reference)
    ours = problem.run(ops.adapter)
    for name, result in ours.items():
        expected = problem.tensors["x" if name == "out" else name[1:]].dtype
        assert result.dtype == expected, f"{name} has dtype {result.dtype}, expected {expected}"
        # Which error of one number is smaller is luck: see dgain below.
        if name != "dgain":
            assert_as_good_as_torch(name, result, theirs[name], oracle[name])


def assert_equal(results, expected):
    for name, result in results.items():
        assert torch.equal(result, expected[name]), name


DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
FORMS = {
    "parallel": {"norm": True, "scale": 4.0},
    "sequential": {"residual": "input"},
    "bypass": {"norm": True, "residual": "input", "gain": True},
    "other residual": {"residual": "other", "scale": -0.5},
    "bare": {"gain": True},
}


@pytest.mark.parametrize("form", FORMS)
@DTYPES
@pytest.mark.parametrize(
    ("rows", "dim", "bottleneck", "activation"),
    [
        (1, 64, 1, "silu"),
        (7, 64, 5, "relu"),
        (TILE - 1, 768, 96, "relu"),
        (TILE, 64, 16, "gelu"),
        (TILE + 1, 1024, 200, "silu"),
        (CUDA_TILE - 1, 64, 129, "silu"),
        (CUDA_TILE + 1, 72, 512, "gelu"),
        (1000, 768, 33, "gelu"),
    ],
)
def test_values_and_gradients(place, rows, dim, bottleneck, activation, dtype, form):
    check(place, make_problem(rows, dim, bottleneck, dtype, activation=activation, **FORMS[form]))


@pytest.mark.parametrize("place", CPU_PLACES, ids=str, indirect=True)
@pytest.mark.parametrize("form", FORMS)
@DTYPES
def test_width_that_is_no_multiple_of_eight(place, dtype, form):
    for dim in (770, 33):
        check(place, make_problem(65, dim, 33, dtype, **FORMS[form]))


@pytest.mark.parametrize("place", CUDA_PLACES, ids=str, indirect=True)
@pytest.mark.parametrize(
    ("dim", "bottleneck", "message"),
    [
        (770, 33, "width D must be a multiple of 8 up to 8192, got 770"),
        (8200, 3, "width D must be a multiple of 8 up to 8192, got 8200"),
        (64, 513, "bottleneck B must be at most 512, got 513"),
    ],
)
def test_sizes_that_cuda_does_not_support(place, dim, bottleneck, message):
    problem = make_problem(2, dim, bottleneck).on(place)
    with pytest.raises(RuntimeError, match=message):
        problem.call(ops.adapter)


def test_more_rows_than_one_slab(place):
    check(place, make_problem(4100, 64, 17, **FORMS["bypass"]))


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_float32_weights_beside_narrow_activations(place, dtype, norm):
    check(place, make_problem(200, 768, 50, dtype, torch.float32, norm=norm, residual="input", gain=True))


def test_narrow_weights_beside_float32_activations(place):
    check(place, make_problem(200, 768, 50, torch.float32, torch.bfloat16, norm=True, residual="input"))


@pytest.mark.parametrize("activation", ["relu", "gelu", "silu"])
def test_large_hidden_values(place, activation):
    """Far out the activations are the identity or zero: neither they nor their slopes may overflow or lose digits."""
    problem = make_problem(50, 64, 40, activation=activation)
    check(place, problem.change(x=problem.tensors["x"] * 1000))


def check_over_many_draws(place, names, draws, *sizes, **form):
    """For what has its largest error by luck: of few numbers, or of a hidden unit so near to zero that rounding decides
    whether ReLU lets it through."""
    problems = [make_problem(*sizes, seed=seed, **form).on(place) for seed in range(draws)]

    def results(problems, function):
        runs = [problem.run(function) for problem in problems]
        return {name: torch.cat([run[name] for run in runs]) for name in names}

    oracle = results([problem.double() for problem in problems], ops.adapter_reference)
    theirs, ours = results(problems, ops.adapter_reference), results(problems, ops.adapter)
    for name in names:
        assert_as_good_as_torch(name, ours[name], theirs[name], oracle[name])


@DTYPES
@pytest.mark.parametrize("form", ["bypass", "bare"])
def test_gradient_of_the_gain_over_many_draws(place, form, dtype):
    check_over_many_draws(place, ["dgain"], 12, 70, 64, 20, dtype, **FORMS[form])


@DTYPES
@pytest.mark.parametrize("form", ["parallel", "sequential"])
def test_relu_over_many_draws(place, form, dtype):
    check_over_many_draws(place, ["dx", "ddown"], 12, CUDA_TILE - 1, 64, 129, dtype, **FORMS[form])


@pytest.mark.parametrize("place", CPU_PLACES, ids=str, indirect=True)
def test_hidden_values_beyond_float16(place):
    """Hidden values beyond float16's range (65504) must not overflow inside, since the output is finite.

    On CUDA they do, as in PyTorch: the second product takes them in float16.
    """
    problem = make_problem(50, 768, 8, torch.float16).on(place)
    x, down, up = (problem.tensors[name] for name in ("x", "down", "up"))
    problem = problem.change(x=x * 200, down=(down.float() * 400).half(), up=(up.float() * 1e-3).half())
    assert (problem.tensors["x"].float() @ problem.tensors["down"].float().mT).max() > 65504
    out, oracle = problem.call(ops.adapter), problem.double().call(ops.adapter_reference)
    assert oracle.abs().max() < 65504
    torch.testing.assert_close(out.double(), oracle, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("mean", [1e2, 1e5])
def test_mean_far_greater_than_deviations(place, mean):
    """The normalised row keeps its digits, which x * inverse - mean * inverse would lose."""
    problem = make_problem(100, 768, 20, norm=True, residual="other").on(place)
    problem = problem.change(x=problem.tensors["x"] + mean)
    check(place, problem)
    oracle, ours = problem.double().run(ops.adapter_reference), problem.run(ops.adapter)
    for name in ("out", "dx", "ddown", "dnorm_weight"):
        error = (ours[name].double() - oracle[name]).abs().max() / oracle[name].abs().max()
        assert error < 5e-6, f"{name}: {error:.1e}"


@DTYPES
@pytest.mark.parametrize("form", ["parallel", "bypass"])
@pytest.mark.parametrize(("weight", "bias"), [(1e-3, 1), (1e-2, 30), (30, 1e-3)])
def test_norm_weight_and_bias_of_different_sizes(place, weight, bias, form, dtype):
    """What a row's deviations say is not lost beside what LayerNorm's bias says of every row, or the reverse."""
    problem = make_problem(70, 256, 40, dtype, activation="silu", **FORMS[form])
    norm = {
        name: problem.tensors[name] / scale for name, scale in (("norm_weight", 1 / weight), ("norm_bias", 0.2 / bias))
    }
    check(place, problem.change(**norm))


def test_constant_rows(place):
    problem = make_problem(30, 64, 20, norm=True)
    check(place, problem.change(x=problem.tensors["x"][:, :1].expand(30, 64).contiguous()))


@pytest.mark.parametrize("form", ["bypass", "sequential"])
@pytest.mark.parametrize("activation", ["relu", "gelu", "silu"])
def test_nan_stays_in_its_row(place, activation, form):
    problem = make_problem(20, 64, 7, activation=activation, **FORMS[form]).on(place)
    problem.tensors["x"][3, 5] = float("nan")
    results = problem.run(ops.adapter)
    for name in ("out", "dx"):
        assert not results[name][:3].isnan().any() and not results[name][4:].isnan().any(), name
    assert results["out"][3].isnan().all() and results["ddown"].isnan().any()


@pytest.mark.parametrize("place", CPU_PLACES, ids=str, indirect=True)
@pytest.mark.parametrize("seed", range(3))
def test_gradients_are_ten_times_better_than_eager_in_bfloat16(place, seed):
    """A rounded row flips ReLU's mask; the kernels' mask is that of the unrounded one (Frobenius norm, float64).

    On CUDA the normalised row is rounded for the tensor cores, as in PyTorch, and the gradients are as good as eager's.
    """
    problem = make_problem(1920, 768, 96, torch.bfloat16, torch.float32, std=0.02, seed=seed, **FORMS["parallel"])
    problem = problem.on(place)
    oracle, eager = problem.double().run(ops.adapter_reference), problem.run(ops.adapter_reference)
    ours = problem.run(ops.adapter)
    for name in ("dx", "ddown"):
        error, theirs = ((t[name].double() - oracle[name]).norm() for t in (ours, eager))
        assert 10 * error <= theirs, f"{name}: {error:.1e}, eager {theirs:.1e}"


@DTYPES
def test_infinite_input_stays_in_its_row(place, dtype):
    """Odd B and columns beyond it: what is padded must not turn an infinity into NaN elsewhere."""
    problem = make_problem(20, 64, 7, dtype).on(place)
    problem.tensors["x"][3] = float("inf")
    problem.tensors["down"].abs_()
    problem.tensors["up"].abs_()
    results, expected = problem.run(ops.adapter), problem.double().run(ops.adapter_reference)
    for name in ("out", "dx"):
        assert torch.equal(results[name].isfinite(), expected[name].isfinite()), name


@pytest.mark.parametrize("form", ["bypass", "other residual"])
def test_any_leading_shape_and_strides(place, form):
    problem = make_problem(60, 64, 10, **FORMS[form]).on(place)
    expected = problem.run(ops.adapter)
    layouts = {
        "leading axes": lambda t: t.view(3, 4, 5, 64),
        "row stride": lambda t: torch.cat([t, t], 1)[:, :64],
        "transposed": lambda t: t.mT.contiguous().mT,
        "permuted": lambda t: t.view(6, 10, 64).permute(1, 0, 2).contiguous().permute(1, 0, 2),
        "not aligned": lambda t: torch.cat([t.new_zeros(1), t.flatten()])[1:].view(60, 64),
    }
    for layout_name, layout in layouts.items():
        rows = {name: layout(problem.tensors[name]) for name in ("x", "residual") if name in problem.tensors}
        leaves = {name: t.detach().requires_grad_() for name, t in {**problem.tensors, **rows}.items()}
        out = problem.call(ops.adapter, leaves)
        assert out.shape == rows["x"].shape and out.is_contiguous(), layout_name
        gradients = torch.autograd.grad(out, list(leaves.values()), layout(problem.dout).reshape(out.shape))
        for name, got in zip(("out", *(f"d{name}" for name in leaves)), (out, *gradients), strict=True):
            assert torch.equal(got.reshape(expected[name].shape), expected[name]), f"{layout_name}: {name}"


def test_one_row_without_leading_axes():
    problem = make_problem(1, 64, 10, **FORMS["bypass"])
    alone = problem.change(x=problem.tensors["x"][0])
    assert torch.equal(alone.call(ops.adapter), problem.call(ops.adapter)[0])


def test_weights_with_strides(place):
    problem = make_problem(30, 64, 10, norm=True).on(place)
    strided = {name: problem.tensors[name].mT.contiguous().mT for name in ("down", "up")}
    strided["up_bias"] = problem.tensors["up_bias"].repeat_interleave(2)[::2]
    assert_equal(problem.change(**strided).run(ops.adapter), problem.run(ops.adapter))


def test_expanded_gradient():
    problem = make_problem(30, 64, 10, **FORMS["bypass"])
    leaves = {name: t.requires_grad_() for name, t in problem.tensors.items()}
    by_sum = torch.autograd.grad(problem.call(ops.adapter, leaves).sum(), list(leaves.values()))
    by_ones = torch.autograd.grad(problem.call(ops.adapter, leaves), list(leaves.values()), torch.ones(30, 64))
    assert all(torch.equal(a, b) for a, b in zip(by_sum, by_ones, strict=True))


@pytest.mark.parametrize("form", FORMS)
def test_empty_input(place, form):
    problem = make_problem(0, 64, 10, **FORMS[form]).on(place)
    results = problem.run(ops.adapter)
    assert results.pop("out").shape == (0, 64)
    assert_equal(results, {f"d{name}": torch.zeros_like(t) for name, t in problem.tensors.items()})


@DTYPES
def test_two_runs_are_bit_equal(place, dtype):
    problem = make_problem(5000, 64, 33, dtype, **FORMS["bypass"]).on(place)
    assert_equal(problem.run(ops.adapter), problem.run(ops.adapter))


@pytest.mark.parametrize("order", ["forward", "reverse"])
@pytest.mark.parametrize("copies", ["lazy", "eager"])
def test_cuda_kernels_give_the_same_bits_in_whatever_order_they_run(order, copies):
    """A missing barrier or wait would show: warps run in either order, asynchronous copies land early or late."""
    for bottleneck, dtype in ((50, torch.bfloat16), (200, torch.bfloat16), (300, torch.float16), (300, torch.float32)):
        problem = make_problem(131, 136, bottleneck, dtype, **FORMS["bypass"])
        with emulation():
            expected = problem.run(ops.adapter)
        with emulation(order=order, copies=copies):
            assert_equal(problem.run(ops.adapter), expected)


@DTYPES
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_bit_equal_whatever_the_number_of_threads(threads, dtype):
    problem = make_problem(5000, 64, 33, dtype, **FORMS["bypass"])
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    expected = problem.run(ops.adapter)
    try:
        torch.set_num_threads(threads)
        for _ in range(2):
            assert_equal(problem.run(ops.adapter), expected)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("form", FORMS)
def test_only_the_gradients_asked_for(place, form):
    problem = make_problem(50, 64, 10, **FORMS[form]).on(place)
    expected = problem.run(ops.adapter)
    for wanted in problem.tensors:
        leaves = {name: t.clone().requires_grad_(name == wanted) for name, t in problem.tensors.items()}
        problem.call(ops.adapter, leaves).backward(problem.dout)
        assert torch.equal(leaves[wanted].grad, expected[f"d{wanted}"]), wanted
        assert all(t.grad is None for name, t in leaves.items() if name != wanted)


def test_residual_gradient_is_the_output_gradient_itself(place):
    problem = make_problem(50, 64, 10, residual="other").on(place)
    problem.tensors["residual"].requires_grad_()
    out = problem.call(ops.adapter)
    (gradient,) = torch.autograd.grad(out, problem.tensors["residual"], problem.dout)
    assert gradient.data_ptr() == problem.dout.data_ptr()


def test_residual_that_is_x_or_a_copy_of_it_makes_no_difference(place):
    given = make_problem(50, 64, 10, norm=True, residual="input").on(place)
    copied = replace(given.change(residual=given.tensors["x"].clone()), residual_is_input=False)
    ours, theirs = given.run(ops.adapter), copied.run(ops.adapter)
    torch.testing.assert_close(ours.pop("dx"), theirs.pop("dx") + theirs.pop("dresidual"))
    assert_equal(ours, theirs)


def test_float64_runs_the_reference():
    problem = make_problem(20, 64, 10, torch.float64, **FORMS["bypass"])
    assert_equal(problem.run(ops.adapter), problem.run(ops.adapter_reference))


@pytest.mark.parametrize("activation", ["relu", "gelu", "silu"])
def test_reference_is_the_published_formula(activation):
    """adapter_reference against modules of torch.nn, in float64."""
    problem = make_problem(20, 16, 6, torch.float64, norm=True, residual="other", scale=4.0, activation=activation)
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
def test_nothing_is_saved_for_backward_but_inputs(form):
    problem = make_problem(1920, 768, 96, **FORMS[form])
    leaves = {name: t.requires_grad_() for name, t in problem.tensors.items()}
    saved = {}

    def pack(tensor):
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        problem.call(ops.adapter, leaves)
    inputs = {t.untyped_storage().data_ptr() for t in leaves.values()}
    assert saved and set(saved) <= inputs


@pytest.mark.parametrize("place", DEVICE_PLACES, ids=str, indirect=True)
@pytest.mark.parametrize("form", FORMS)
def test_opcheck(place, form):
    problem = make_problem(30, 64, 10, **FORMS[form]).on(place)
    torch.library.opcheck(torch.ops.petl_ext.adapter_forward.default, problem.raw())
    for needs in ((True, True, True), (False, True, False), (True, False, False)):
        torch.library.opcheck(torch.ops.petl_ext.adapter_backward.default, problem.raw(needs))


@pytest.mark.parametrize("place", DEVICE_PLACES, ids=str, indirect=True)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_as_one_graph(place, dynamic, form):
    torch._dynamo.reset()
    compiled = torch.compile(ops.adapter, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for rows in (30, 47):
        problem = make_problem(rows, 64, 10, **FORMS[form]).on(place)
        assert_equal(problem.run(compiled), problem.run(ops.adapter))


EVERYTHING = {"norm": True, "gain": True, "residual": "other"}
TENSORS = tuple(make_problem(1, 8, 2, **EVERYTHING).tensors)


def with_wrong_shape(problem, name):
    tensor = problem.tensors[name]
    # A longer gain, since half of it is empty; of x the other's axis, since its width is what others are held against.
    return problem.change(**{name: torch.cat([tensor] * 2) if name in ("gain", "x") else tensor[..., :-1]})


@pytest.mark.parametrize("name", TENSORS)
def test_wrong_arguments_are_named(place, name):
    problem = make_problem(30, 64, 10, **EVERYTHING).on(place)
    blamed = {"residual": "must have the dtype of x", "x": "must be float32, bfloat16 or float16, got Int"}
    expected = blamed.get(name, "must be float32, bfloat16 or float16, got Int")
    with pytest.raises(RuntimeError, match=f"adapter: {name} {expected}"):
        problem.change(**{name: problem.tensors[name].int()}).call(ops.adapter)
    # x and the residual disagree.
    place = "residual" if name == "x" else name
    with pytest.raises(RuntimeError, match=rf"adapter: {place} must have shape \[.*\].*, got \[.*\]"):
        with_wrong_shape(problem, name).call(ops.adapter)


@pytest.mark.parametrize("name", TENSORS)
def test_wrong_shapes_in_float64_and_under_compile(name):
    problem = with_wrong_shape(make_problem(30, 64, 10, **EVERYTHING), name)
    message = rf"adapter: {'residual' if name == 'x' else name} must have shape \[.*\], got \[.*\]"
    with pytest.raises(RuntimeError, match=message):
        problem.double().call(ops.adapter)
    with pytest.raises(RuntimeError, match=message):
        problem.change(**{name: t.to("meta") for name, t in problem.tensors.items()}).call(ops.adapter)


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_other_wrong_arguments(dtype, device):
    problem = make_problem(30, 64, 10, dtype, norm=True)
    problem = problem.change(**{name: t.to(device) for name, t in problem.tensors.items()})
    wrong = {
        "activation must be relu, gelu or silu, got tanh": replace(problem, options={"activation": "tanh"}),
        "norm_weight and norm_bias must be given both or neither": problem.change(norm_bias=None),
        r"x must have shape \[..., D\] with a width D above zero, got \[\]": problem.change(
            x=torch.zeros((), dtype=dtype, device=device)
        ),
        r"down must have shape \[B, 64\], got \[0, 64\]": problem.change(down=problem.tensors["down"][:0]),
    }
    for message, case in wrong.items():
        with pytest.raises(RuntimeError, match=f"adapter: {message}"):
            case.call(ops.adapter)


def test_residual_in_another_dtype(place):
    problem = make_problem(30, 64, 10, residual="other").on(place)
    residual = problem.tensors["residual"].bfloat16().requires_grad_()
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
    with pytest.raises(RuntimeError, match="residual must have the dtype of x"):
        weights = [problem.tensors.get(name) for name in ("down", "down_bias", "up", "up_bias")]
        torch.ops.petl_ext.adapter_forward(
            problem.tensors["x"], residual, None, None, *weights, None, 1.0, 1e-5, "relu"
        )


def test_autocast_multiplies_in_its_dtype_and_leaves_the_stream_alone(place):
    problem = make_problem(30, 64, 10, **FORMS["bypass"]).on(place)
    x, apart = problem.tensors["x"], replace(problem, residual_is_input=False)
    with torch.autocast(x.device.type, torch.bfloat16):
        out, reference = problem.call(ops.adapter), problem.call(ops.adapter_reference)
        alone = apart.call(ops.adapter)
    assert (out.dtype, reference.dtype, alone.dtype) == (torch.float32, torch.float32, torch.bfloat16)
    assert torch.equal(out, x + apart.change(x=x.bfloat16()).call(ops.adapter))
    exact = problem.call(ops.adapter)
    torch.testing.assert_close(out, exact, rtol=0.02, atol=0.02 * exact.abs().max().item())
    torch.testing.assert_close(reference, exact, rtol=0.02, atol=0.02 * exact.abs().max().item())


def test_tensors_on_two_devices():
    problem = make_problem(3, 64, 10, norm=True)
    with pytest.raises(RuntimeError, match="all arguments must be on one device, got cpu, meta"):
        problem.change(up=problem.tensors["up"].to("meta")).call(ops.adapter)


def test_backward_op_takes_dout_in_the_dtype_of_x_only():
    problem = make_problem(30, 64, 10)
    problem = replace(problem, dout=problem.dout.bfloat16())
    with pytest.raises(RuntimeError, match="adapter: dout must have the dtype of x"):
        torch.ops.petl_ext.adapter_backward(*problem.raw((True, True, False)))


def test_several_python_threads_at_once(place):
    problems = [make_problem(300, 64, 10 + i, seed=i, **FORMS["bypass"]).on(place) for i in range(4)]
    expected = [problem.run(ops.adapter) for problem in problems]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            for result, wanted in zip(pool.map(lambda p: p.run(ops.adapter), problems), expected, strict=True):
                assert_equal(result, wanted)


def test_works_after_an_error(place):
    problem = make_problem(30, 64, 10, **FORMS["bypass"]).on(place)
    expected = problem.run(ops.adapter)
    with pytest.raises(RuntimeError):
        problem.change(x=problem.tensors["x"][:, :5]).call(ops.adapter)
    assert_equal(problem.run(ops.adapter), expected)


def test_device_without_kernel():
    problem = make_problem(3, 64, 10)
    problem = problem.change(**{name: t.to("meta") for name, t in problem.tensors.items()})
    with pytest.raises(NotImplementedError, match=r"no kernel for meta.*adapter_reference"):
        torch.ops.petl_ext.adapter_forward.default.redispatch(
            torch._C.DispatchKeySet(torch._C.DispatchKey.XPU), *problem.raw()
        )
