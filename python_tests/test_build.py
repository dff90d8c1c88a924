"""The build: what a wheel holds, and what a user reads where it cannot be made."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def run(*command, env=None, cwd=ROOT):
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env={**os.environ, **(env or {})})


@pytest.fixture(scope="module")
def bare_python(tmp_path_factory):
    """An environment without any package."""
    folder = tmp_path_factory.mktemp("bare")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    return str(folder / "bin" / "python")


def ask_backend(python, **env):
    code = (
        "import sys; sys.path.insert(0, 'build_backend'); import petl_build;"
        "print(petl_build.get_requires_for_build_wheel())"
    )
    return run(python, "-c", code, env=env)


def test_without_torch(bare_python):
    result = ask_backend(bare_python)
    assert result.returncode == 1
    assert "petl_ext is compiled against the PyTorch (>= 2.10)" in result.stderr
    assert "Install PyTorch there first" in result.stderr
    assert "Traceback" not in result.stderr and len(result.stderr.strip().splitlines()) <= 5


def make_torch(folder, version):
    (folder / "torch").mkdir()
    (folder / "torch" / "__init__.py").touch()
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


def test_without_compiler(tmp_path):
    result = run(sys.executable, "setup.py", "build_ext", "--build-lib", tmp_path, env={"PATH": "", "CXX": ""})
    assert result.returncode == 1
    assert "no C++ compiler was found" in result.stderr and "apt-get install g++" in result.stderr
    assert "Traceback" not in result.stderr


def test_wheel_built_in_isolation_without_an_index(tmp_path):
    source = tmp_path / "source"
    tracked = run("git", "ls-files", "--cached", "--others", "--exclude-standard").stdout.splitlines()
    for name in tracked:
        if (ROOT / name).exists():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, source / name)
    build = run(
        *(sys.executable, "-m", "pip", "wheel", "--no-deps", "--wheel-dir", tmp_path, source),
        env={"PIP_NO_INDEX": "1"},
    )
    assert build.returncode == 0, build.stdout + build.stderr
    (wheel,) = tmp_path.glob("*.whl")
    assert "-cp310-abi3-" in wheel.name
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
        names = archive.namelist()
    assert "petl_ext/_C.abi3.so" in names and "petl_ext/tasks/digits_backbone/model.safetensors" in names
    assert not [name for name in names if name.startswith(("python_tests", "bench", "csrc"))]
    code = "import petl_ext, sys; print(petl_ext.__file__); import torch; print(petl_ext.ops.cpu_path())"
    used = run(sys.executable, "-c", code, env={"PYTHONPATH": str(tmp_path / "site")}, cwd=tmp_path)
    assert used.stdout.startswith(str(tmp_path / "site")), used.stderr
