"""What is special to the backend in Triton; that it computes what the others do is in the tests of the ops."""

import importlib.machinery
import json
import subprocess
import sys

import pytest
import torch
from devices import TRITON
from op_problems import TESTED
from problems import OPS

from petl_ext import cli, ops
from petl_ext.ops import backends, kernels, preferred
from petl_ext.ops import triton as backend

every_op = pytest.mark.parametrize("tested", TESTED.values(), ids=str)
INNER = {"apt": "P", "adapter": "B", "attention_pool": "H"}
interpreted = pytest.mark.skipif(not TRITON.is_interpreted, reason="a GPU is there")


def test_it_holds_every_op():
    assert backend.LIMITS.keys() == OPS.keys() and "triton" in backends.choices()
    for op in OPS:
        held = kernels.held_kernels(op)
        assert {("triton", "cuda"), ("triton", "xpu")} <= set(held)
        assert held.index(("triton", "cuda")) > 0, "the kernels in C++ come first"


@every_op
def test_widths_of_any_number_and_limits_that_are_named(tested):
    op = tested.op
    *leading, width, inner = tested.small
    limits = backend.LIMITS[op.name]
    with TRITON.entered():
        kernel_for = kernels.kernel_for(
            op.name, TRITON.torch_device, torch.float32, sizes=(limits.max_width + 1, inner)
        )
        assert kernel_for == ("none", f"the triton kernel does not take a width of {limits.max_width + 1} with {inner}")
        for sizes in ((limits.max_width + 1, inner), (width, limits.max_inner + 1)):
            problem = tested.problem(*leading, *sizes).to(TRITON.torch_device)
            expected = (
                f"{op}: the Triton kernels take a width D up to 8192 and an inner size up to .*, got {sizes[0]} and"
            )
            with pytest.raises(RuntimeError, match=expected):
                problem.call(op.ours)
        odd = tested.problem(*leading, 33, inner).to(TRITON.torch_device)
        torch.testing.assert_close(odd.call(op.ours), odd.call(op.reference))


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("signs", ["positive weights", "mixed weights"])
@pytest.mark.parametrize("name", ["apt", "adapter"])
def test_infinities_are_where_they_are_in_float64(name, signs, weight_dtype):
    """Beside weights of which rounding leaves something out, too, and of scores that are divided by their gate."""
    tested = TESTED[name]
    for infinity in (torch.inf, -torch.inf):
        sizes, dtypes = (*tested.small[:-1], 7), {"dtype": torch.bfloat16, "weight_dtype": weight_dtype}
        problem = tested.problem(*sizes, form=tested.usual[0], **dtypes).to(TRITON.torch_device)
        problem["x"][1] = infinity
        for matrix in ("prompts", "keys", "down", "up"):
            if matrix in problem.tensors and signs == "positive weights":
                problem[matrix].abs_()
        with TRITON.entered():
            results = problem.run(tested.op.ours)
        expected = problem.double().run(tested.op.reference)
        for result in ("out", "dx"):
            wanted = expected[result].float()
            assert torch.equal(results[result].isnan(), wanted.isnan()), (infinity, result)
            assert torch.equal(results[result].isinf(), wanted.isinf()), (infinity, result)


def spec_of(path, text):
    path.write_text(text)
    return importlib.machinery.ModuleSpec("triton", None, origin=str(path))


def test_a_triton_that_is_missing_or_too_old_is_named(tmp_path):
    assert backend.missing_because(None) == "Triton is not installed: pip install 'petl_ext[triton]'"
    assert "not installed" in backend.missing_because(importlib.machinery.ModuleSpec("triton", None))
    path = tmp_path / "__init__.py"
    old = backend.missing_because(spec_of(path, "__version__ = '3.5.1'\n"))
    assert old == "Triton must be 3.6 or later, got 3.5: pip install 'petl_ext[triton]'"
    assert "got one without a version" in backend.missing_because(spec_of(path, "import this\n"))
    for version in ("3.6.0", "3.10.1", "4.0.0+git"):
        assert backend.missing_because(spec_of(path, f'"""Triton."""\n__version__ = "{version}"\n')) == ""


@interpreted
def test_a_driver_that_does_not_work_is_named():
    with pytest.raises(
        RuntimeError, match=r"backend triton was to compute, but Triton finds no working GPU driver: .+"
    ):
        backend._check_driver()


@pytest.fixture
def forget_backends():
    before = dict(backends.BACKENDS), set(kernels._HELD)
    yield
    for registry, entries in zip((backends.BACKENDS, kernels._HELD), before, strict=True):
        registry.clear()
        registry.update(entries)


def test_a_backend_that_lacks_its_package_says_so(forget_backends):
    calls = {"apt_forward": len, "apt_backward": len}
    kernels.add_backend("lame", ["cpu"], calls, missing="Lame is not installed: pip install lame")
    assert ("lame", "cpu") not in kernels.held_kernels("apt")
    x = torch.ones(2, 4)
    expected = r"backend lame holds no kernel for cpu .*apt_reference runs on every device.*pip install lame\."
    with ops.backend("lame"), pytest.raises(NotImplementedError, match=expected):
        ops.apt(x, x, x, x, x[0, :1])
    assert ops.apt(x, x, x, x, x[0, :1]).shape == x.shape


@pytest.mark.parametrize("op", OPS)
def test_gpus_that_the_cuda_kernels_are_too_new_for(op, monkeypatch):
    monkeypatch.setattr(kernels, "_HELD", {("native", op, "cuda"), ("triton", op, "cuda")})
    assert kernels.kernel_for(op, "cuda", torch.float16).name == f"{op} (cuda)"
    monkeypatch.setattr(kernels, "_runs_cuda_kernels", lambda index: False)
    assert kernels.kernel_for(op, "cuda", torch.float16).name == f"{op} (cuda, triton)"
    with ops.backend("native"):
        assert kernels.kernel_for(op, "cuda", torch.float16) == ("none", "this build holds no kernel for cuda")
    assert "compute capability 8.0 or later" in kernels.no_kernel_text(op, {"cuda:0"})


def test_the_error_says_how_to_ask_for_the_reference():
    text = kernels.no_kernel_text("apt", {"mps:0"})
    assert 'by `with petl_ext.ops.backend("reference")` or by PETL_BACKEND=reference.' in text
    assert "this build holds no kernel for mps:0" in text


ENTRY = {
    "backend": "triton",
    "op": "apt",
    "device_name": "Made-up GPU",
    "width": 64,
    "inner": 10,
    "weights": "float32",
    "least_rows": 20,
    "most_rows": 40,
    "source": "made up for a test",
}


def test_auto_prefers_it_only_where_a_measured_file_says_so(tmp_path, monkeypatch):
    path = tmp_path / "preferred.json"
    path.write_text(json.dumps([ENTRY]))
    monkeypatch.setattr(kernels, "PREFERENCES", preferred.read_preferences(path))
    monkeypatch.setattr(preferred, "PREFERENCES", preferred.read_preferences(path))
    monkeypatch.setattr(cli, "PREFERENCES", preferred.read_preferences(path))
    monkeypatch.setattr(kernels, "_HELD", {("native", "apt", "cuda"), ("triton", "apt", "cuda")})
    monkeypatch.setattr(kernels, "_name_of", lambda index: "Made-up GPU")

    def chosen_for(rows, inner):
        with torch._subclasses.FakeTensorMode():
            x, prompts = (torch.empty(size, 64, device="cuda") for size in (rows, inner))
            return kernels.raw_ops_for("apt", (x, x, prompts, prompts, torch.empty(1, device="cuda")))

    assert chosen_for(30, 10) == "petl_triton" == chosen_for(40, 10)
    assert chosen_for(41, 10) == "petl_ext" == chosen_for(30, 11)
    assert kernels.kernel_for("apt", "cuda", torch.float32).name == "apt (cuda, triton at some sizes)"
    assert "auto prefers triton for apt on Made-up GPU: 20 to 40 rows, width 64, inner size 10" in cli.info()
    with ops.backend("native"):
        assert chosen_for(30, 10) == "petl_ext"
        assert kernels.kernel_for("apt", "cuda", torch.float32).name == "apt (cuda)"
    monkeypatch.setattr(kernels, "_name_of", lambda index: "Another GPU")
    assert chosen_for(30, 10) == "petl_ext"
    assert kernels.kernel_for("apt", "cuda", torch.float32).name == "apt (cuda)"


def test_nothing_is_preferred_that_was_not_measured(tmp_path):
    assert preferred.read_preferences(tmp_path / "preferred.json") == []
    (tmp_path / "preferred.json").write_text('[{"backend": "triton"}]')
    with pytest.raises(
        ValueError, match=r"preferred\.json must be a list of preferences, as bench/gpu/preferred\.py makes it"
    ):
        preferred.read_preferences(tmp_path / "preferred.json")


def test_importing_petl_ext_and_a_call_of_another_backend_import_no_triton():
    code = "import sys, torch, petl_ext; x = torch.ones(2, 3, 8); petl_ext.ops.attention_pool(x, x); "
    code += "print('triton' in sys.modules, 'cupy' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["False", "False"]
