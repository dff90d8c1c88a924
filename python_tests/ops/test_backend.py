"""Who computes an op: the choice, in threads, in compiled code and in backward, and backends that are added."""

import gc
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from ops_called import OpsCalled
from original_modules import Adapter
from tolerance import assert_as_good_as_torch
from torch import nn

import petl_ext
from petl_ext import ops
from petl_ext.ops import backends, kernels

DIM = 16


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


WEIGHTS = (normal(6, DIM, seed=1), normal(6, seed=2), normal(DIM, 6, seed=3), normal(DIM, seed=4))
PROMPTS, KEYS, LOG_SCALE = normal(5, DIM, seed=1), normal(5, DIM, seed=2), normal(1)
QUERY = normal(2, 3, DIM, seed=1)
# Each op as a function of its first argument.
CALLS = {
    "apt": lambda x: ops.apt(x, 2 * x, PROMPTS, KEYS, LOG_SCALE),
    "adapter": lambda x: ops.adapter(x, *WEIGHTS, activation="gelu"),
    "attention_pool": lambda x: ops.attention_pool(x, QUERY, scale=0.3),
}
every_op = pytest.mark.parametrize("op", CALLS)


def stream():
    return normal(2, 7, DIM, seed=9)


def called(function, *arguments):
    """(the names of our ops that ran, what the function returns)."""
    with OpsCalled() as found:
        out = function(*arguments)
    return found.names, out


def test_every_op_is_tried():
    assert CALLS.keys() == kernels.OPS.keys()


@every_op
def test_the_reference_computes_where_it_was_chosen(op):
    names, ours = called(CALLS[op], stream())
    assert names == [op] and ops.backend() == "auto"
    with ops.backend("reference"):
        assert ops.backend() == "reference"
        names, plain = called(CALLS[op], stream())
        assert names == []
        with ops.backend("native"):
            assert called(CALLS[op], stream())[0] == [op]
        assert ops.backend() == "reference"
    assert ops.backend() == "auto"
    assert_as_good_as_torch(op, ours, plain, CALLS[op](stream().double()))


@every_op
def test_backward_uses_the_backend_of_its_forward(op):

    def gradient(x, choice, other):
        with ops.backend(choice):
            out = CALLS[op](x.requires_grad_())
        with ops.backend(other), torch.profiler.profile() as profile:
            out.sum().backward()
        return x.grad, {event.name for event in profile.events() if event.name.startswith("petl_ext::")}

    ours, called_by_ours = gradient(stream(), "native", "reference")
    plain, called_by_plain = gradient(stream(), "reference", "native")
    assert (called_by_ours, called_by_plain) == ({f"petl_ext::{op}_backward"}, set())
    assert_as_good_as_torch("dx", ours, plain, gradient(stream().double(), "auto", "auto")[0])


@every_op
def test_compiled_code_follows_the_choice(op):
    torch._dynamo.reset()
    compiled = torch.compile(CALLS[op], backend="aot_eager", fullgraph=True)

    def run():
        return compiled(stream().requires_grad_())

    run()
    for choice in ("reference", "native", "reference"):
        with ops.backend(choice):
            run()
            assert called(run)[0] == ([] if choice == "reference" else [op])
    assert called(run)[0] == [op]


@pytest.mark.parametrize("fullgraph", [False, True])
def test_a_choice_within_compiled_code(fullgraph):
    def function(x):
        with ops.backend("reference"):
            plain = CALLS["adapter"](x)
        return plain, CALLS["adapter"](x)

    torch._dynamo.reset()
    compiled = torch.compile(function, backend="aot_eager", fullgraph=fullgraph)
    compiled(stream())
    assert called(compiled, stream())[0] == ["adapter"]
    assert ops.backend() == "auto"


def test_threads_see_the_choice_and_contexts_may_overlap():
    entered, leave, seen = threading.Event(), threading.Event(), []

    def other():
        seen.append(ops.backend())
        with ops.backend("native"):
            entered.set()
            assert leave.wait(30)
            seen.append(ops.backend())

    thread = threading.Thread(target=other)
    with ops.backend("reference"):
        thread.start()
        assert entered.wait(30)
        assert ops.backend() == "native"  # the last to be entered
    leave.set()
    thread.join()
    assert seen == ["reference", "native"] and ops.backend() == "auto"


def test_a_choice_ends_with_an_error():
    with pytest.raises(RuntimeError, match="user"), ops.backend("reference"):
        raise RuntimeError("user")
    assert ops.backend() == "auto"


def test_a_context_is_entered_once():
    with ops.backend("reference") as nothing, ops.backend("native"), ops.backend("reference") as context:
        assert nothing is context is None and ops.backend() == "reference"
    context = ops.backend("reference")
    with context, pytest.raises(RuntimeError, match="has been entered; make another"), context:
        pass
    assert ops.backend() == "auto"


def test_many_threads_choose_at_once():
    def choose(_):
        for _ in range(200):
            with ops.backend("reference"), ops.backend("native"):
                assert ops.backend() in ("reference", "native")

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(choose, range(8)))
    assert ops.backend() == "auto"


@pytest.mark.parametrize("choice", ["cuda", "", "Native", 1, ["native"]])
def test_a_wrong_choice_is_refused(choice):
    with pytest.raises(ValueError, match=r'choice must be "auto", "native", "triton" or "reference", got'):
        ops.backend(choice)


def test_a_choice_without_with_is_told():
    with pytest.warns(RuntimeWarning, match="chooses nothing by itself: write `with`"):
        ops.backend("reference")
        gc.collect()
    assert ops.backend() == "auto"


def in_environment(value, code):
    environment = {**os.environ, "PETL_BACKEND": value}
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)


def test_the_environment_chooses():
    code = "import torch, petl_ext.cli as c; from petl_ext.ops.kernels import kernel_for as k;"
    result = in_environment("reference", f"{code} print(k('apt', 'cpu', torch.float32)); print(c.info())")
    assert "Kernel(name='reference', reason='the backend reference was chosen')" in result.stdout, result.stderr
    assert "backend: reference of auto native triton reference (PETL_BACKEND chooses)" in result.stdout


@pytest.mark.parametrize("value", ["gpu", ""])
def test_a_wrong_environment_is_an_error_of_the_first_use(value):
    assert in_environment(value, "import petl_ext").returncode == 0
    call = "import petl_ext, torch; x = torch.ones(2, 3, 4); petl_ext.ops.attention_pool(x, x)"
    result = in_environment(value, call)
    expected = f"variable PETL_BACKEND must be one of: auto, native, triton, reference; got {value!r}"
    assert result.returncode and expected in result.stderr
    result = in_environment(value, "from petl_ext.cli import main; main(['info'])")
    assert result.returncode == 2 and expected in result.stderr and "Traceback" not in result.stderr


def test_a_patched_module_runs_its_own_forward_where_the_reference_was_chosen():
    patched = petl_ext.patch(nn.Sequential(Adapter(DIM)))
    assert patched.report().fused == 1
    with ops.backend("reference"):
        assert patched.report().left_alone == {"the backend reference was chosen": 1}
        assert called(patched.model, normal(5000, DIM))[0] == []
    assert called(patched.model, normal(5000, DIM))[0] == ["adapter"]


# A backend in Python, for the CPU, of one op.
def toy_forward(x, residual, norm_weight, norm_bias, down, down_bias, up, up_bias, gain, scale, eps, activation):
    weights = (down, down_bias, up, up_bias)
    with ops.backend("reference"):
        out = ops.adapter(x, *weights, scale, activation, norm_weight, norm_bias, eps, residual) + 1
    return out, out.new_empty(0)


def toy_backward(dout, x, *rest):
    return torch.ops.petl_ext.adapter_backward(dout, x, *rest)


@pytest.fixture(scope="module")
def toy():
    """torch keeps the raw ops; our registries forget the backend."""
    before = dict(backends.BACKENDS), set(kernels._HELD)
    kernels.add_backend("toy", ["cpu"], {"adapter_forward": toy_forward, "adapter_backward": toy_backward})
    yield
    for registry, entries in zip((backends.BACKENDS, kernels._HELD), before, strict=True):
        registry.clear()
        registry.update(entries)


def test_an_added_backend_computes_where_it_was_chosen(toy):
    native = CALLS["adapter"](stream())
    held = kernels.held_kernels("adapter")
    assert held[0] == ("native", "cpu") and held[-1] == ("toy", "cpu")
    with ops.backend("toy"):
        assert kernels.kernel_for("adapter", "cpu", torch.float32) == ("adapter (cpu, toy)", "")
        x = stream().requires_grad_()
        names, out = called(CALLS["adapter"], x)
        assert names == [] and not torch.equal(out, native)
        assert torch.equal(out, toy_forward(stream(), None, None, None, *WEIGHTS, None, 1.0, 1e-5, "gelu")[0])
    with torch.profiler.profile() as profile:
        out.sum().backward()
    assert "petl_toy::adapter_backward" in {event.name for event in profile.events()}
    assert called(CALLS["adapter"], stream())[0] == ["adapter"]


def test_an_added_backend_compiles(toy):
    torch._dynamo.reset()
    compiled = torch.compile(CALLS["adapter"], backend="aot_eager", fullgraph=True)
    native = compiled(stream())
    with ops.backend("toy"):
        assert torch.equal(compiled(stream()), CALLS["adapter"](stream()))
    assert torch.equal(compiled(stream()), native)


def test_an_op_that_a_backend_lacks_is_refused(toy):
    with ops.backend("toy"):
        expected = r"petl_ext\.ops\.apt: the backend toy holds no kernel for cpu .*apt_reference runs on every device"
        with pytest.raises(NotImplementedError, match=expected):
            CALLS["apt"](stream())
        assert kernels.kernel_for("apt", "cpu", torch.float32) == ("none", "the backend toy holds no kernel for cpu")
        assert CALLS["apt"](stream().double()).dtype is torch.float64
        kernel = kernels.kernel_for("adapter", "cuda:1", torch.float32)
        assert kernel == ("none", "the backend toy holds no kernel for cuda")


def test_an_added_backend_multiplies_as_much(toy):
    layer = petl_ext.AdapterLayer(DIM, 6).requires_grad_(False)
    counted = []
    for choice in ("native", "toy"):
        with ops.backend(choice):
            counted.append(petl_ext.counting.count_macs(layer, stream()).total)
    assert counted[0] == counted[1] == 2 * 14 * DIM * 6


@pytest.mark.parametrize(
    ("name", "implementations", "message"),
    [
        ("native", {}, "name must be a new one, of letters and digits, got 'native'"),
        ("auto", {}, "name must be a new one, of letters and digits, got 'auto'"),
        ("my own", {}, "name must be a new one, of letters and digits, got 'my own'"),
        ("other", {"apt_forward": len}, "implementations must be apt_forward and apt_backward, got apt_forward"),
        ("other", {"conv_forward": len}, "implementations must be of adapter, apt, attention_pool, got conv_forward"),
    ],
)
def test_a_wrong_backend_is_refused(name, implementations, message):
    with pytest.raises(ValueError, match=message):
        kernels.add_backend(name, ["cpu"], implementations)
    assert ops.backend() == "auto" and "other" not in backends.BACKENDS
