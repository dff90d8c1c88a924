"""The locked environments: nothing is installed that no lock names, and what a user reads where one cannot be made."""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import cuda_toolkit
import install
import pytest

ROOT = Path(__file__).parents[2]


MADE_BY_MAKE = (Path(sys.prefix) / "made-from").exists()


@pytest.mark.skipif(not MADE_BY_MAKE, reason="this environment was not made from the locks")
def test_nothing_is_installed_that_no_lock_names():
    environment = install.Environment(sys.prefix, *install.ENVIRONMENT_LOCKS)
    for folder in (environment.site_packages, environment.folder / "adapters"):
        assert len(list(Path(folder).glob("*.dist-info"))) > 10
        assert install.unlocked_packages(folder, *install.ENVIRONMENT_LOCKS, install.LOCK) == []


def add_package(folder, name, version):
    information = folder / f"{name}-{version}.dist-info"
    information.mkdir(parents=True)
    (information / "METADATA").write_text(f"Name: {name}\nVersion: {version}\n")


def test_a_package_or_version_that_no_lock_names_is_found(tmp_path):
    lock = tmp_path / "some.txt"
    lock.write_text(
        "torch==2.13.0\n    # via x\nnumpy==2.2.6 ; python_full_version < '3.11'\nnumpy==2.4.6\nruamel-yaml==1.0\n"
    )
    for name, version in [("torch", "2.13.0+cpu"), ("numpy", "2.4.6"), ("ruamel.yaml", "1.0"), ("petl_ext", "0.1.0")]:
        add_package(tmp_path / "site", name, version)
    assert install.unlocked_packages(tmp_path / "site", lock) == []
    add_package(tmp_path / "site", "numpy", "2.3.0")
    add_package(tmp_path / "site", "Unknown_Thing", "1")
    assert install.unlocked_packages(tmp_path / "site", lock) == ["numpy==2.3.0", "unknown-thing==1"]


def test_the_build_finds_its_compiler_in_the_lock(monkeypatch):
    (torch_cuda,) = set(re.findall(r"^cuda-toolkit==(\d+\.\d+)\.", install.DEVELOP.read_text(), re.MULTILINE))
    monkeypatch.setenv("PETL_CUDA", "1")
    monkeypatch.delenv("PETL_CUDA_HOME", raising=False)
    monkeypatch.setattr(cuda_toolkit, "torch_release", lambda: cuda_toolkit.release_in(torch_cuda))
    monkeypatch.setattr(cuda_toolkit, "find", lambda release: (None, []))
    versions = install.locked_versions(install.BUILD)
    asked = [requirement.partition("==") for requirement in cuda_toolkit.packages()]
    assert len(asked) == 5
    for name, _, wanted in asked:
        (version,) = versions[name]
        assert version.startswith(wanted.removesuffix("*"))


@pytest.fixture
def checkout(tmp_path):
    """What the Makefile reads, without kernels."""
    folder = tmp_path / "checkout"
    shutil.copytree(ROOT / "locks", folder / "locks", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("Makefile", "pyproject.toml", "setup.py"):
        shutil.copy(ROOT / name, folder / name)
    (folder / "csrc").mkdir()
    return folder


def refused(checkout, *options, **env):
    """The last lines of what `make lint` prints there, where it fails."""
    command = ["make", "-C", checkout, "lint", f"PYTHON={sys.executable}", *options]
    ran = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **env})
    assert ran.returncode != 0 and "Traceback" not in ran.stderr
    lines = [line for line in ran.stderr.splitlines() if line.startswith("*** ")]
    assert len(lines) == 3, ran.stderr
    return "\n".join(lines)


WITHOUT_INDEX = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": "", "PIP_CONFIG_FILE": os.devnull}


def test_a_python_without_a_lock_is_named(checkout):
    script = (checkout / "locks" / "install.py").read_text()
    (checkout / "locks" / "install.py").write_text(script.replace("PYTHONS = (", 'PYTHONS = ("2.7",)\nUNUSED = ('))
    said = refused(checkout)
    assert f"locks for Python 2.7; {sys.executable} is 3." in said and "make PYTHON=python2.7" in said
    assert not (checkout / ".venv").exists()


def test_a_version_that_the_index_lacks_is_named_and_nothing_counts_as_installed(checkout):
    pip = re.search(r"^pip==\S+", (checkout / "locks" / "lock.txt").read_text(), re.MULTILINE)[0]
    for _ in range(2):
        said = refused(checkout, **WITHOUT_INDEX)
        assert re.search(rf"lock.txt, for Python 3.*: the package index has no {re.escape(pip)}\.", said)
        assert "PIP_INDEX_URL" in said and "Nothing counts as installed" in said
        assert (checkout / ".venv" / "made-from").read_text() == "incomplete\n"
        assert not list((checkout / ".venv").glob("installed*"))
        assert pip in (checkout / ".venv" / "install.log").read_text()


def test_a_lock_that_cannot_be_satisfied_is_named(tmp_path):
    for name, version, requires in [
        ("ours", "1", "Requires-Dist: theirs==2\n"),
        ("theirs", "1", ""),
        ("theirs", "2", ""),
    ]:
        with zipfile.ZipFile(tmp_path / f"{name}-{version}-py3-none-any.whl", "w") as wheel:
            folder, metadata = f"{name}-{version}.dist-info", f"Name: {name}\nVersion: {version}\n{requires}"
            wheel.writestr(f"{folder}/METADATA", f"Metadata-Version: 2.1\n{metadata}")
            wheel.writestr(f"{folder}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
            wheel.writestr(f"{folder}/RECORD", "")
    lock = tmp_path / "some.txt"
    lock.write_text("theirs==1\n")
    environment = install.Environment(sys.prefix, lock)
    environment.log = tmp_path / "install.log"
    options = ["--dry-run", "--no-index", "--find-links", tmp_path]
    with pytest.raises(
        install.Refused,
        match=r"some.txt, for Python 3.*: cannot be satisfied \(ours 1 depends on theirs==2; .*theirs==1\)",
    ):
        environment.install(lock, *options, "ours")
    assert "ResolutionImpossible" in environment.log.read_text()


def test_an_environment_of_the_users_own_is_left_alone(checkout):
    (checkout / ".venv" / "mine").mkdir(parents=True)
    said = refused(checkout)
    assert "no environment that was made from the locks" in said and "make VENV=folder" in said
    assert [path.name for path in (checkout / ".venv").iterdir()] == ["mine"]
