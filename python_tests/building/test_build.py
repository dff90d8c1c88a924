"""The build: what it asks pip for, and what a user reads where it cannot be made."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def run(*command, env=None, cwd=ROOT):
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env={**os.environ, **(env or {})})


@pytest.fixture(scope="module")
def bare_python(tmp_path_factory):
    """An environment without any package."""
    folder = tmp_path_factory.mktemp("bare")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    return str(folder / "bin" / "python")


# Whatever CUDA the machine and the user's variables have to offer, none is seen.
WITHOUT_CUDA = dict.fromkeys(("PETL_CUDA", "PETL_CUDA_HOME", "CUDA_HOME", "CUDA_PATH", "PATH"), "")


def ask_backend(python, **env):
    code = (
        "import sys; sys.path.insert(0, 'build_backend'); import petl_build;"
        "petl_build.cuda_toolkit.USUAL_NVCC = '/nowhere/nvcc';"
        "print(petl_build.get_requires_for_build_wheel())"
    )
    return run(python, "-c", code, env=WITHOUT_CUDA | env)


def test_without_torch(bare_python):
    result = ask_backend(bare_python)
    assert result.returncode == 1
    assert "petl_ext is compiled against the PyTorch (>= 2.10)" in result.stderr
    assert "Install PyTorch there first" in result.stderr
    assert "Traceback" not in result.stderr and len(result.stderr.strip().splitlines()) <= 5


def make_torch(folder, version, cuda=None):
    (folder / "torch").mkdir()
    (folder / "torch" / "__init__.py").touch()
    (folder / "torch" / "version.py").write_text(f"cuda = {cuda!r}\n")
    (folder / f"torch-{version}.dist-info").mkdir()
    (folder / f"torch-{version}.dist-info" / "METADATA").write_text(f"Name: torch\nVersion: {version}\n")
    return str(folder)


def test_with_an_old_torch(bare_python, tmp_path):
    result = ask_backend(bare_python, PETL_TORCH_SITE=make_torch(tmp_path, "2.9.1"))
    assert result.returncode == 1
    assert "petl_ext needs PyTorch >= 2.10, found 2.9.1" in result.stderr
    assert "Traceback" not in result.stderr and len(result.stderr.strip().splitlines()) <= 5


def test_asks_for_setuptools_only_where_there_is_none(bare_python, tmp_path):
    result = ask_backend(bare_python, PETL_TORCH_SITE=make_torch(tmp_path, "2.10.0+cu130"))
    assert result.stdout.strip() == "['setuptools>=70.1']", result.stderr
    assert ask_backend(sys.executable).stdout.strip() == "[]"


def make_nvcc(folder, release):
    """A toolkit that says what it is and compiles nothing."""
    (folder / "bin").mkdir(parents=True)
    (folder / "lib64").mkdir()
    (folder / "lib64" / "libcudart_static.a").touch()
    nvcc = folder / "bin" / "nvcc"
    nvcc.write_text(
        f"#!/bin/sh\necho 'Cuda compilation tools, release {release}, V{release}.1'\necho '#$ TOP={folder}'\n"
    )
    nvcc.chmod(0o755)
    return str(folder)


COMPILER_13_0 = [
    *("nvidia-cuda-nvcc==13.0.*", "nvidia-nvvm==13.0.*", "nvidia-cuda-crt==13.0.*", "nvidia-cuda-runtime==13.0.*"),
    "nvidia-cuda-cccl==13.*",
]


@pytest.mark.parametrize(
    ("torch_cuda", "nvcc_on_path", "settings", "asked"),
    [
        ("13.0", None, {}, COMPILER_13_0),
        ("13.0", "12.8", {}, COMPILER_13_0),
        ("13.0", "13.1", {}, []),
        ("13.0", "13.0", {"PETL_CUDA_HOME": "pip"}, COMPILER_13_0),
        ("13.0", None, {"PETL_CUDA": "0"}, []),
        ("12.8", "12.6", {}, []),
        (None, None, {}, []),
        (None, None, {"PETL_CUDA": "1"}, COMPILER_13_0),
        (None, "12.8", {"PETL_CUDA": "1"}, []),
    ],
)
def test_asks_for_the_cuda_compiler_that_torch_needs(bare_python, tmp_path, torch_cuda, nvcc_on_path, settings, asked):
    settings = {"PETL_TORCH_SITE": make_torch(tmp_path, "2.11.0", torch_cuda)} | settings
    if nvcc_on_path:
        settings["PATH"] = make_nvcc(tmp_path / "toolkit", nvcc_on_path) + "/bin"
    result = ask_backend(bare_python, **settings)
    assert result.returncode == 0, result.stderr
    assert [name for name in ast.literal_eval(result.stdout) if name.startswith("nvidia")] == asked


@pytest.mark.parametrize(
    ("torch_cuda", "toolkit", "expected"),
    [
        (
            "12.8",
            None,
            [
                "an nvcc from CUDA 12.4 on and before 13.0",
                "found /nowhere/nvcc: no nvcc that runs",
                "from CUDA 13.0 on",
            ],
        ),
        ("12.8", "12.1", ["toolkit/bin/nvcc: is CUDA 12.1"]),
        ("13.0", "12.8", ["an nvcc from CUDA 13.0 on and before 14.0", "toolkit/bin/nvcc: is CUDA 12.8"]),
    ],
)
def test_where_pip_cannot_help(bare_python, tmp_path, torch_cuda, toolkit, expected):
    named = {"PETL_CUDA_HOME": make_nvcc(tmp_path / "toolkit", toolkit)} if toolkit else {}
    result = ask_backend(bare_python, PETL_TORCH_SITE=make_torch(tmp_path, "2.11.0", torch_cuda), **named)
    assert result.returncode == 1
    for text in [*expected, f"since torch is built for CUDA {torch_cuda}", "PETL_CUDA_HOME", "PETL_CUDA=0"]:
        assert text in result.stderr
    assert "Traceback" not in result.stderr and len(result.stderr.strip().splitlines()) <= 5


def test_unknown_cuda_setting(bare_python, tmp_path):
    result = ask_backend(bare_python, PETL_TORCH_SITE=make_torch(tmp_path, "2.11.0"), PETL_CUDA="yes")
    assert result.returncode == 1
    assert "0, 1 or auto" in result.stderr and "found PETL_CUDA=yes" in result.stderr
    assert "Traceback" not in result.stderr


def test_offers_its_hooks_before_there_is_a_setuptools(bare_python):
    code = "import sys; sys.path.insert(0, 'build_backend'); import petl_build; petl_build.build_editable('.')"
    assert "No module named 'setuptools'" in run(bare_python, "-c", code).stderr


def test_without_compiler(tmp_path):
    result = run(sys.executable, "setup.py", "build_ext", "--build-lib", tmp_path, env={"PATH": "", "CXX": ""})
    assert result.returncode == 1
    assert "no C++ compiler was found" in result.stderr and "apt-get install g++" in result.stderr
    assert "Traceback" not in result.stderr


def run_setup(code, **env):
    """Python that has read setup.py without building anything."""
    begin = "import sys; sys.argv = ['setup.py', 'egg_info']; import setuptools; "
    begin += "setuptools.setup = lambda **_: None; import runpy; names = runpy.run_path('setup.py'); "
    return run(sys.executable, "-c", begin + code, env=env)


@pytest.mark.parametrize(
    ("name", "given", "kept"),
    [
        ("CXXFLAGS", "-O3 -ffast-math -g", "-O3  -g"),
        ("CFLAGS", "-Ofast", ""),
        ("CXX", "ccache g++ -funsafe-math-optimizations", "ccache g++"),
        ("LDFLAGS", "-ffast-math -Wl,-O1", "-Wl,-O1"),
        ("CFLAGS", "-ffinite-math-only -fassociative-math -freciprocal-math", ""),
    ],
)
def test_flags_that_change_results_are_left_out(name, given, kept):
    code = f"names['leave_out_flags_that_change_results'](); import os; print('kept:' + os.environ[{name!r}])"
    result = run_setup(code, **{name: given})
    assert result.returncode == 0, result.stderr
    assert f"of {name} is left out" in result.stdout
    assert result.stdout.strip().splitlines()[-1] == f"kept:{kept}"


def test_other_flags_stay():
    code = "names['leave_out_flags_that_change_results'](); import os; print(os.environ['CXXFLAGS'])"
    assert run_setup(code, CXXFLAGS="-O2 -march=native -fno-fast-math").stdout == "-O2 -march=native -fno-fast-math\n"


def three_lines(result):
    assert result.returncode == 1 and "Traceback" not in result.stderr
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 3 and all(line.startswith("*** ") for line in lines), result.stderr
    return result.stderr


def ask(code, **env):
    return run(sys.executable, "-c", f"import sys; sys.path.insert(0, 'build_backend'); {code}", env=env)


def test_an_old_setuptools_without_isolation():
    said = three_lines(
        ask("import petl_build; petl_build._release = lambda package: (65, 5); petl_build.require_setuptools()")
    )
    assert "setuptools 70.1 or later, found 65.5" in said and "--no-build-isolation" in said


def test_a_source_folder_that_cannot_be_written_to():
    said = three_lines(ask("import os, petl_build; os.access = lambda *_: False; petl_build.build_wheel('wheels')"))
    assert "cannot be written to" in said and "cp -r" in said


@pytest.mark.parametrize("flags", ["--use_fast_math", "-lineinfo -use_fast_math", "-ftz=true", "--prec-div=false"])
def test_flags_of_nvcc_that_change_results_are_refused(flags):
    code = "import cuda_kernels; cuda_kernels.refuse_flags_that_change_results()"
    assert flags.split()[-1] in three_lines(ask(code, NVCC_APPEND_FLAGS=flags))
    assert ask(code, NVCC_APPEND_FLAGS="-lineinfo").returncode == 0
