"""What the build makes: a wheel and, where there is an nvcc, the CUDA kernels in it. No GPU is needed."""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import cuda_kernels
import cuda_toolkit
import hopper_stalls
import pytest
import register_report
import torch
from compiled_kernels import compile_kernels
from counting import machine_code

ROOT = Path(__file__).parents[2]


def run(*command, env=None, cwd=ROOT):
    result = subprocess.run(command, capture_output=True, text=True, cwd=cwd, env={**os.environ, **(env or {})})
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout + result.stderr


@pytest.fixture(scope="module")
def compilation():
    toolkit, flaws = cuda_toolkit.find(None)
    if toolkit is None:
        pytest.skip(f"needs nvcc, 12.4 or later: {'; '.join(flaws)}")
    return register_report.every_architecture()


@pytest.fixture(scope="module")
def objects(compilation):
    return compile_kernels()[1]


@pytest.fixture(scope="module")
def disassembler(compilation):
    packaged = [path for entry in sys.path if entry for path in Path(entry).glob("nvidia/cu*/bin/cuobjdump")]
    for candidate in [compilation.toolkit.folder / "bin/cuobjdump", *packaged, shutil.which("cuobjdump")]:
        if candidate and os.access(candidate, os.X_OK):
            return str(candidate)
    pytest.skip("needs cuobjdump: pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm")


@pytest.mark.parametrize("of_hopper", [False, True])
def test_every_kernel_is_compiled_for_every_architecture_without_spills(objects, of_hopper):
    objects = [path for path in objects if cuda_kernels.is_for_hopper(path) == of_hopper]
    assert objects
    uses = register_report.uses_of(objects)
    kernels = {use.kernel for use in uses}
    architectures = [cuda_kernels.HOPPER] if of_hopper else cuda_kernels.DEFAULT_ARCHITECTURES
    assert {(use.kernel, use.architecture) for use in uses} == {(k, a) for k in kernels for a in architectures}
    assert all(use.registers > 0 for use in uses)
    assert not [use for use in uses if use.spilled or use.stack]


def test_what_sources_are_compiled():
    names = {
        architectures: {path.stem for path in cuda_kernels.sources_for(architectures)}
        for architectures in (("80", "90a"), ("80", "90", "100"))
    }
    with_hopper, without = names.values()
    assert with_hopper - without >= {"apt_hopper", "launch_hopper"} and without - with_hopper == {"without_hopper"}


def test_what_stands_in_for_the_hopper_path_has_all_its_functions():
    folder = ROOT / "csrc" / "kernels" / "cuda"
    headers = [folder / f"{op}_hopper.h" for op in ("apt", "adapter")]
    declared = {name for path in headers for name in re.findall(r"(\w+_hopper_\w+)\(", path.read_text())}
    defined = set(re.findall(r"^\w+ (\w+)\(", (folder / "without_hopper.cu").read_text(), re.MULTILINE))
    assert len(declared) == 12 and defined == declared | {"hopper_is_built"}


def test_products_of_the_hopper_path_run_side_by_side(objects, disassembler):
    """ptxas says in messages C7510 and on where it lets products wait for each other; no sum lies in memory."""
    for path in filter(cuda_kernels.is_for_hopper, objects):
        assert not re.search(r"\bC75\d\d\b", path.with_suffix(".ptxas").read_text())
        code = run(disassembler, "-sass", path)
        for kernel, body in zip(*[iter(re.split(r"\tFunction : (\w+)", code)[1:])] * 2, strict=True):
            assert not re.search(r" (STL|LDL)\b", body), kernel
            if "hopper_sandwich" in kernel:
                expected = ("HGMMA", "UTMALDG", "UBLKCP", "UTMASTG", "STSM", "USETMAXREG")
                assert [name for name in expected if f" {name}" not in body] == [], kernel


def test_register_report(objects, capsys):
    register_report.main()
    header, *rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert header == "| kernel | architecture | registers | static shared memory | stack | spilled |"
    assert len(rows) == 1 + len(register_report.uses_of(objects))


def instructions(disassembler, object_file):
    """Of every kernel its mangled name, its architecture and which of EXPECTED_INSTRUCTIONS it holds."""
    expected = set().union(*EXPECTED_INSTRUCTIONS.values())
    code = run(disassembler, "-sass", object_file)
    for architecture, part in zip(*[iter(re.split(r"\tcode for sm_(\w+)", code)[1:])] * 2, strict=True):
        for kernel, body in zip(*[iter(re.split(r"\tFunction : (\w+)", part)[1:])] * 2, strict=True):
            # A regular expression over all lines takes longer than the disassembler.
            yield kernel, architecture, {name for name in expected if f" {name}." in body or f" {name} " in body}


# By what they do: the products' later names are Hopper's and Blackwell's. Hopper's load their matrices themselves.
EXPECTED_INSTRUCTIONS = {
    "a product on the tensor cores": {"HMMA", "HGMMA", "UTCHMMA"},
    "a load of matrices for it": {"LDSM", "HGMMA"},
    "copies to shared memory past the registers": {"LDGSTS", "UTMALDG"},
}


# These multiply nothing: they pack weights, and add up what others have left.
WITHOUT_PRODUCTS = "pack_weights|pool_prepare|pool_round|pool_finish"


def test_half_precision_runs_on_the_tensor_cores(objects, disassembler):
    found = [kernel for path in objects for kernel in instructions(disassembler, path)]
    assert {architecture for _, architecture, _ in found} == set(cuda_kernels.DEFAULT_ARCHITECTURES)
    half_precision = [
        kernel
        for kernel in found
        if re.search("Bfloat16|Float16", kernel[0]) and not re.search(WITHOUT_PRODUCTS, kernel[0])
    ]
    assert half_precision
    missing = [
        f"sm_{architecture} {name}: {purpose}"
        for name, architecture, names in half_precision
        for purpose, any_of in EXPECTED_INSTRUCTIONS.items()
        if not names & any_of
    ]
    assert not missing, "\n".join(missing)


def test_stalls_of_the_hopper_path_are_as_the_table_says(objects, compilation, disassembler):
    found = hopper_stalls.all_stalls(filter(cuda_kernels.is_for_hopper, objects), compilation.toolkit)
    of_tile = {(stalls.name, stalls.inner): stalls.of_tile for stalls in found}
    assert of_tile["apt relu Bfloat16", 208] <= 10_500 and of_tile["adapter gelu norm Bfloat16", 192] <= 19_000
    assert of_tile["apt backward relu Bfloat16", 208] <= 14_500
    assert of_tile["adapter backward gelu norm Bfloat16", 192] <= 29_000
    told = (ROOT / "bench" / "results" / "hopper-stalls.md").read_text()
    if machine_code.version(compilation) not in told:
        pytest.skip("the table is another compiler's")
    assert hopper_stalls.table(found) in told


def copy_of_the_tree(folder):
    """Without what git ignores, but with the compiled kernels, which must not be compiled again."""
    for name in run("git", "ls-files", "--cached", "--others", "--exclude-standard").splitlines():
        if (ROOT / name).exists():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    if (ROOT / "build" / "cuda").exists():
        shutil.copytree(ROOT / "build" / "cuda", folder / "build" / "cuda")
    return folder


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The folder to which a wheel was unpacked that pip built in isolation and without an index, and pip's words."""
    folder = tmp_path_factory.mktemp("wheel")
    settings = {"PIP_NO_INDEX": "1", "PETL_CUDA": "0"}
    if cuda_toolkit.find(None)[0]:
        compile_kernels()
        settings |= {"PETL_CUDA": "1", "PETL_CUDA_ARCHS": " ".join(cuda_kernels.DEFAULT_ARCHITECTURES)}
    source = copy_of_the_tree(folder / "source")
    output = run(sys.executable, "-m", "pip", "wheel", "-v", "--no-deps", "-w", folder, source, env=settings)
    (wheel,) = folder.glob("*.whl")
    assert "-cp310-abi3-" in wheel.name
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site")
    return folder / "site", output


def test_a_wheel_holds_the_package_alone_and_runs(installed):
    site, _ = installed
    names = [str(path.relative_to(site)) for path in site.rglob("*")]
    assert "petl_ext/_C.abi3.so" in names and "petl_ext/demo/digits/backbone/model.safetensors" in names
    assert not [name for name in names if name.startswith(("python_tests", "bench", "csrc", "locks"))]
    code = "import petl_ext, sys; print(petl_ext.__file__); import torch; print(petl_ext.ops.cpu_path())"
    assert run(sys.executable, "-c", code, env={"PYTHONPATH": str(site)}, cwd=site).startswith(str(site))


@pytest.fixture(scope="module")
def extension(objects, installed):
    site, output = installed
    assert "CUDA kernels, since PETL_CUDA=1: for sm_80, sm_90a, sm_100 (PETL_CUDA_ARCHS)" in output
    assert "-c csrc/kernels/cuda" not in output
    return site / "petl_ext" / "_C.abi3.so"


def test_extension_holds_all_architectures(extension, disassembler):
    assert set(re.findall(r"\.sm_(\w+)\.cubin", run(disassembler, "-lelf", extension))) == {"80", "90a", "100"}
    assert set(re.findall(r"\.sm_(\w+)\.ptx", run(disassembler, "-lptx", extension))) == {"100"}


def test_extension_finds_the_current_stream_where_torch_has_cuda(extension):
    needed = re.findall(r"\(NEEDED\).*\[(.*)\]", run("readelf", "-d", extension))
    assert "libtorch.so" in needed and not [name for name in needed if "cuda" in name]
    assert re.search(r"^\s+w aoti_torch_get_current_cuda_stream$", run("nm", "-D", extension), re.MULTILINE)
    code = f"import torch; torch.ops.load_library({str(extension)!r}); print(torch.ops.petl_ext.has_cuda_stream())"
    assert run(sys.executable, "-W", "ignore", "-c", code).split() == [str(torch.version.cuda is not None)]


@pytest.fixture
def small_tree(tmp_path, monkeypatch):
    """The folder of a single kernel, in place of all kernels of this tree."""
    folder = tmp_path / "csrc" / "kernels" / "cuda"
    folder.mkdir(parents=True)
    monkeypatch.setattr(cuda_kernels, "ROOT", tmp_path)
    (folder / "one.h").write_text("constexpr int kOne = 1;\n")
    (folder / "one.cu").write_text('#include "kernels/cuda/one.h"\n__global__ void one(int* x) { *x = kOne; }\n')
    return folder


def test_an_object_is_compiled_again_only_where_something_changed(compilation, small_tree):
    compilation = compilation._replace(architectures=("80",))
    (first,) = cuda_kernels.compile_all(compilation)
    before = first.stat().st_mtime_ns
    (small_tree / "unrelated.h").touch()
    cuda_kernels.compile_all(compilation)
    assert first.stat().st_mtime_ns == before
    (small_tree / "one.h").write_text("constexpr int kOne = 2 - 1;\n")
    assert not cuda_kernels.is_current(first, compilation)
    cuda_kernels.compile_all(compilation)
    assert first.stat().st_mtime_ns > before
    assert not cuda_kernels.is_current(first, compilation._replace(host_compiler="another"))
    (small_tree / "one.h").unlink()
    assert not cuda_kernels.is_current(first, compilation)


def test_a_failing_compilation_says_what_nvcc_said(compilation, small_tree):
    (small_tree / "one.h").write_text("#error here\n")
    with pytest.raises(SystemExit, match=r"nvcc failed on csrc/kernels/cuda/one.cu:\n(.|\n)*#error here"):
        cuda_kernels.compile_all(compilation)


@pytest.mark.parametrize(
    ("asked", "gpus", "chosen"),
    [
        ("", [], (("80", "90a", "100"), "the default")),
        ("", [(9, 0), (9, 0)], (("90a",), "the GPUs of this machine")),
        ("", [(8, 6), (7, 5)], (("86",), "the GPUs of this machine")),
        ("", [(7, 5)], (("80", "90a", "100"), "the default")),
        ("100, 80;90a", [(9, 0)], (("80", "90a", "100"), "PETL_CUDA_ARCHS")),
    ],
)
def test_architectures(compilation, monkeypatch, asked, gpus, chosen):
    monkeypatch.setenv("PETL_CUDA_ARCHS", asked)
    assert cuda_kernels.choose_architectures(compilation.toolkit, gpus) == chosen


def test_unknown_architectures(compilation, monkeypatch):
    monkeypatch.setenv("PETL_CUDA_ARCHS", "80 sm_90 42")
    with pytest.raises(SystemExit, match=r"PETL_CUDA_ARCHS='80 90a'.*\n.*found sm_90 42, and this nvcc knows"):
        cuda_kernels.choose_architectures(compilation.toolkit, [])


@pytest.fixture
def too_new_compiler(tmp_path):
    compiler = tmp_path / "c++"
    compiler.write_text('#!/bin/sh\nexec g++ -U__GNUC__ -D__GNUC__=99 "$@"\n')
    compiler.chmod(0o755)
    return compiler


def test_host_compiler_is_one_that_nvcc_takes(compilation, too_new_compiler, monkeypatch):
    monkeypatch.setenv("CXX", str(too_new_compiler))
    monkeypatch.delenv("CUDAHOSTCXX", raising=False)
    assert cuda_kernels.choose_host_compiler(compilation.toolkit) != str(too_new_compiler)
    monkeypatch.setenv("CUDAHOSTCXX", str(too_new_compiler))
    with pytest.raises(SystemExit, match=r"a C\+\+ compiler that it takes.*\n.*c\+\+: unsupported GNU version!"):
        cuda_kernels.choose_host_compiler(compilation.toolkit)
