"""The Hopper path, which PETL_HOPPER=1 switches on, on the emulator."""

import itertools
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from devices import emulated_module, emulation
from op_problems import TESTED, assert_equal, check
from problems import draw

from petl_ext import ops
from petl_ext.ops.adapter import packed_adapter
from petl_ext.ops.apt import packed_apt

ROWS = 1600  # more than are few
# Sizes for every shape of its blocks, by their widest inner size and others.
INNER = (50, 64, 96, 100, 161, 200, 208, 256)
HALF = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)


@contextmanager
def hopper(choice="1", **settings):
    with emulation(**settings):
        module = emulated_module()
        module.choose_hopper(choice)
        try:
            yield
        finally:
            module.choose_hopper("0")


class OnEmulator:
    torch_device = torch.device("cpu")


def problem_of(name, *sizes, dtype=torch.bfloat16, form=None, **options):
    tested = TESTED[name]
    return draw(tested.op, *sizes, **tested.op.forms[form or tested.usual[-1]], dtype=dtype, **options)


@HALF
@pytest.mark.parametrize("activation", ["relu", "softmax"])
@pytest.mark.parametrize("inner", INNER)
def test_apt(inner, activation, dtype):
    with hopper():
        check(OnEmulator, problem_of("apt", ROWS, 64, inner, dtype=dtype, activation=activation))


@HALF
@pytest.mark.parametrize("inner", INNER)
@pytest.mark.parametrize("form", ["parallel", "bare", "bypass", "sequential", "other residual"])
def test_adapter(form, inner, dtype):
    # One activation for each form is enough: what differs is compiled from the same lines.
    activation = {"parallel": "gelu", "bare": "silu"}.get(form, "relu")
    with hopper():
        check(OnEmulator, problem_of("adapter", ROWS, 64, inner, dtype=dtype, form=form, activation=activation))


def error_of_forward(problem, **settings):
    oracle = problem.double().call(problem.op.reference)
    return (outputs(problem, **settings).double() - oracle).abs().max()


@HALF
@pytest.mark.parametrize("mean", [0, 30, 300])
def test_a_mean_of_many_deviations(mean, dtype):
    problem = problem_of("adapter", ROWS, 128, 96, dtype=dtype, form="parallel", activation="gelu")
    problem = problem.change(x=problem["x"] + mean)
    assert error_of_forward(problem) <= 1.1 * error_of_forward(problem, choice="0")


@HALF
def test_first_columns_far_from_the_mean(dtype):
    """The statistics are deviations from the mean of a row's first 64 columns."""
    problem = problem_of("adapter", ROWS, 512, 96, dtype=dtype, form="parallel", activation="gelu")
    x = problem["x"].clone()
    x[:, :64] += 1000
    assert error_of_forward(problem.change(x=x)) <= 1.1 * error_of_forward(problem.change(x=x), choice="0")


@HALF
def test_float32_weights_beside_half_activations(dtype):
    problem = problem_of("apt", ROWS, 128, 100, dtype=dtype)
    weights = {name: problem[name].float() + 1e-3 for name in ("prompts", "keys")}
    with hopper():
        check(OnEmulator, problem.change(**weights))


def outputs(problem, **settings):
    with hopper(**settings):
        return problem.call(problem.op.ours)


def results(problem, **settings):
    """The output and all gradients."""
    with hopper(**settings):
        return problem.run(problem.op.ours)


FORMS = pytest.mark.parametrize(
    ("name", "options"),
    [
        ("apt", {"activation": "relu"}),
        ("apt", {"activation": "softmax"}),
        ("adapter", {"form": "bypass"}),
        ("adapter", {"form": "bare"}),
    ],
)


@FORMS
def test_results_depend_neither_on_order_nor_on_copies(name, options):
    problem = problem_of(name, ROWS, 128, 200, **options)
    first, *others = [
        results(problem, order=order, copies=copies)
        for order, copies in itertools.product(("forward", "reverse"), ("lazy", "eager"))
    ]
    for other in others:
        assert_equal(other, first)


@FORMS
def test_backward_is_the_path_s_own(name, options):
    """It adds in another order than the lean path: somewhere the gradients differ in their last bit."""
    problem = problem_of(name, ROWS, 128, 200, **options)
    assert not torch.equal(results(problem)["dx"], results(problem, choice="0")["dx"])


@pytest.mark.parametrize(
    ("rows", "width", "inner", "dtype"),
    [
        (1536, 64, 50, torch.bfloat16),
        (ROWS, 72, 50, torch.bfloat16),
        (ROWS, 64, 257, torch.bfloat16),
        (ROWS, 64, 50, torch.float32),
    ],
)
@pytest.mark.parametrize("name", ["apt", "adapter"])
def test_what_it_does_not_take_is_the_lean_path_s(name, rows, width, inner, dtype):
    problem = problem_of(name, rows, width, inner, dtype=dtype)
    assert_equal(results(problem), results(problem, choice="0"))


@pytest.mark.parametrize("name", ["apt", "adapter"])
def test_dropout_is_the_lean_path_s(name):
    problem = problem_of(name, ROWS, 64, 50)
    drawn = {"dropout": 0.3, "seeds": torch.tensor([3, 4])}
    dropped = replace(problem, options={**problem.options, **drawn})
    assert_equal(results(dropped), results(dropped, choice="0"))
    assert not torch.equal(outputs(dropped), outputs(problem))


@pytest.mark.parametrize("name", ["apt", "adapter"])
def test_rows_that_overlap_are_the_lean_path_s(name):
    problem = problem_of(name, ROWS, 64, 50)
    problem = problem.change(x=problem["x"][:1].expand(ROWS, 64))
    assert torch.equal(outputs(problem), outputs(problem, choice="0"))


def test_gradients_that_overlap_are_the_lean_path_s():
    """Of the adapter, whose backward takes nothing from forward."""
    problem = problem_of("adapter", ROWS, 64, 50)
    problem = replace(problem, dout=problem.dout[:1].expand(ROWS, 64))
    ours, lean = (results(problem, choice=choice) for choice in "10")
    assert_equal({name: ours[name] for name in lean if name != "out"}, lean)


def apart(tensor):
    """The same with a row's width between its rows."""
    return torch.cat([tensor] * 2, 1)[:, :64]


@FORMS
def test_strides(name, options):
    problem = problem_of(name, ROWS, 64, 50, **options)
    spread = {key: apart(problem[key]) for key in TESTED[name].laid_out if key in problem.tensors}
    found = results(replace(problem.change(**spread), dout=apart(problem.dout)))
    assert_equal(found, results(problem))


@pytest.mark.parametrize("norm", [False, True])
def test_an_adapter_s_weights_are_packed_for_both_paths(norm):
    problem = problem_of("adapter", ROWS, 64, 50, form="parallel" if norm else "sequential")
    names = ("down", "down_bias", "up", "up_bias", "norm_weight", "norm_bias")
    weights = [problem.tensors.get(name) for name in names]
    with emulation():
        lean = packed_adapter(*weights, torch.bfloat16).data.numel()
    with hopper():
        packed = packed_adapter(*weights, torch.bfloat16)
        for rows in (ROWS, 100):
            some = problem.change(x=problem["x"][:rows])
            assert torch.equal(some.change(packed=packed).call(ops.adapter), some.call(ops.adapter))
        packed.data[lean:] = 0
        assert not torch.equal(problem.change(packed=packed).call(ops.adapter), problem.call(ops.adapter))


def test_weights_are_packed_for_both_paths():
    problem = problem_of("apt", ROWS, 64, 50)
    x, y, *weights = problem.tensors.values()
    with emulation():
        lean = packed_apt(*weights[:2], "relu", torch.bfloat16).data.numel()
    with hopper():
        packed = packed_apt(*weights[:2], "relu", torch.bfloat16)
        for rows in (ROWS, 100):
            expected = ops.apt(x[:rows], y[:rows], *weights)
            assert torch.equal(ops.apt(x[:rows], y[:rows], *weights, packed=packed), expected)
        few = ops.apt(x[:100], y[:100], *weights, packed=packed)
        packed.data[lean:] = 0
        assert torch.equal(ops.apt(x[:100], y[:100], *weights, packed=packed), few)
        assert not torch.equal(ops.apt(x, y, *weights, packed=packed), ops.apt(x, y, *weights))


@HALF
def test_a_nan_stays_in_its_row(dtype):
    problem = problem_of("apt", ROWS, 64, 50, dtype=dtype)
    x = problem["x"].clone()
    x[[5, 1599], [3, 60]] = float("nan")
    is_nan = outputs(problem.change(x=x)).isnan()
    assert is_nan[[5, 1599]].all() and is_nan.sum() == 2 * 64


@pytest.mark.parametrize("name", ["apt", "adapter"])
def test_a_nan_gradient_stays_in_its_row(name):
    problem = problem_of(name, ROWS, 64, 50)
    dout = problem.dout.clone()
    dout[[5, 1599], [3, 60]] = float("nan")
    is_nan = results(replace(problem, dout=dout))["dx"].isnan()
    assert is_nan[[5, 1599]].all() and is_nan.sum() == 2 * 64


@pytest.mark.parametrize("name", ["apt", "adapter"])
def test_gradients_that_nobody_asks_for_change_nothing(name):
    """Some tensors at a time are trained, as where a layer is the first, or its weights are frozen."""
    problem = problem_of(name, ROWS, 64, 50)
    everything = results(problem)
    names = list(problem.tensors)
    for some in (("x",), tuple(names[1:]), names[-1:]):
        tensors = {key: tensor.detach().requires_grad_(key in some) for key, tensor in problem.tensors.items()}
        with hopper():
            out = problem.call(problem.op.ours, tensors)
            gradients = torch.autograd.grad(out, [tensors[key] for key in some], problem.dout)
        for key, gradient in zip(some, gradients, strict=True):
            assert torch.equal(gradient, everything[f"d{key}"]), f"{key} of {some}"


def test_scores_are_kept_for_backward_in_full_rows():
    problem = problem_of("apt", ROWS, 64, 50, dtype=torch.float16)
    with hopper():
        _, gate, scores = torch.ops.petl_ext.apt_forward(*problem.tensors.values(), "relu", True)
    assert scores.shape == (ROWS, 56) and scores.dtype is torch.float32
    assert torch.equal(scores[:, 50:], torch.zeros(ROWS, 6))
    assert torch.equal(scores.amax(1), gate)


@pytest.mark.parametrize("name", ["apt", "adapter"])
def test_a_variable_that_says_nothing_known_is_refused(name):
    problem = problem_of(name, 30, 64, 50).trained()
    with emulation():
        out = problem.call(problem.op.ours)
    for call in (problem.call, lambda _: torch.autograd.grad(out, problem["x"], problem.dout)):
        with hopper("yes"), pytest.raises(RuntimeError, match="variable PETL_HOPPER must be 0 or 1"):
            call(problem.op.ours)
