"""Imports and includes go one way, and importing petl_ext stays light."""

import ast
import graphlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "petl_ext"

# From the bottom up; a module imports from its own entry and from lower lines. "" is petl_ext/__init__.py.
LEVELS = [
    {"_C"},
    {"printing", "checks", "composing"},
    {"saving", "counting"},
    {"tasks"},
    {"ops"},
    {"nn", "patching"},
    {"attaching"},
    {"models"},
    {"search"},
    {""},
    {"hf", "peft", "cupy"},
    {"recipes"},
    {"demo"},
    {"cli"},
    {"__main__"},
]
LEVEL = {name: level for level, names in enumerate(LEVELS) for name in names}


def entry_of(path):
    """The top-level entry of petl_ext that a file belongs to: "attaching" for petl_ext/attaching/report.py."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return "" if parts == ("__init__",) else parts[0]


def imported_entries(tree, package):
    """Entries of petl_ext that a module of the dotted `package` imports, anywhere in the file but where type checkers
    alone look."""
    unseen = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
        for statement in node.body
        for inner in ast.walk(statement)
    }
    for node in set(ast.walk(tree)) - unseen:
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            outer = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            module = ".".join([*outer, *filter(None, [node.module])])
            modules = [f"{module}.{alias.name}" for alias in node.names] if module == "petl_ext" else [module]
        else:
            continue
        for module in modules:
            first, *rest = module.split(".")
            if first == "petl_ext":
                yield rest[0] if rest and rest[0] in LEVEL else ""


def wrong_imports(source, path):
    importer = entry_of(path)
    assert importer in LEVEL, f"{path}: give {importer!r} a place in LEVELS"
    package = ".".join(("petl_ext", *path.relative_to(PACKAGE).parent.parts))
    imported = set(imported_entries(ast.parse(source), package)) - {importer}
    return sorted(entry for entry in imported if LEVEL[entry] >= LEVEL[importer])


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_python_imports_go_down(path):
    assert wrong_imports(path.read_text(encoding="utf-8"), path) == []


@pytest.mark.parametrize(
    ("file", "source", "wrong"),
    [
        ("ops/apt.py", "from petl_ext.nn import APTLayer", ["nn"]),
        ("nn/apt.py", "import petl_ext.attaching.report", ["attaching"]),
        ("attaching/report.py", "def late():\n    from petl_ext.search.bandit import Bandit", ["search"]),
        ("attaching/report.py", "from petl_ext import attach, APTLayer", [""]),
        ("attaching/report.py", "from ..search import bandit", ["search"]),
        ("attaching/report.py", "from .. import search", ["search"]),
        ("attaching/report.py", "from . import report", []),
        ("models/meter/model.py", "from petl_ext.search import bandit", ["search"]),
        ("attaching/report.py", "from petl_ext.models import MeterModel", ["models"]),
        ("tasks/vqa.py", "from petl_ext import APTLayer", [""]),
        ("tasks/vqa.py", "from petl_ext.demo.digits import scenes", ["demo"]),
        ("tasks/vqa.py", "from petl_ext import ops\nimport petl_ext.attaching", ["attaching", "ops"]),
        ("tasks/vqa.py", "from petl_ext.saving import written_whole\nfrom petl_ext.printing import listed", []),
        ("hf/callback.py", "from petl_ext import APTLayer\nfrom petl_ext.search import bandit", []),
    ],
)
def test_a_wrong_import_is_seen(file, source, wrong):
    assert wrong_imports(source, PACKAGE / file) == wrong


def imported_modules(tree, known):
    """Modules among `known` that are imported by their full names, anywhere in the file."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            inner = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if name in known else node.module for name in inner]
        else:
            continue
        yield from (name for name in names if name in known)


def first_circle(sources):
    """A circle of imports among {dotted module: source}, or None."""
    known = {module: set(imported_modules(ast.parse(source), sources)) for module, source in sources.items()}
    try:
        graphlib.TopologicalSorter({module: found - {module} for module, found in known.items()}).prepare()
    except graphlib.CycleError as error:
        return error.args[1]


def test_no_circle_of_imports():
    paths = {path.relative_to(ROOT).with_suffix(""): path.read_text(encoding="utf-8") for path in PACKAGE.rglob("*.py")}
    sources = {".".join(path.parts).removesuffix(".__init__"): source for path, source in paths.items()}
    assert first_circle(sources | {"petl_ext._C": ""}) is None


def test_a_circle_of_imports_is_seen():
    sources = {
        "petl_ext.demo.scenes": "def late():\n    from petl_ext.demo import gqa",
        "petl_ext.demo.gqa": "from petl_ext.demo.scenes import CELL",
        "petl_ext.demo": "",
    }
    assert {"petl_ext.demo.scenes", "petl_ext.demo.gqa"} == set(first_circle(sources))


def test_no_test_imports_a_test():
    for path in (ROOT / "python_tests").rglob("*.py"):
        assert not re.search(r"^\s*(?:from|import) test_", path.read_text(encoding="utf-8"), re.MULTILINE), path


def wrong_includes(source, folder):
    """Includes that a file under csrc/<folder> must not have."""
    included = re.findall(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', source, flags=re.MULTILINE)
    torch_headers = ("torch/", "ATen/", "c10/", "Python.h", "pybind11/")
    forbidden = {"kernels": (*torch_headers, "ops/", "../ops/", "emulator/"), "ops": ("ATen/", "c10/", "pybind11/")}
    return [header for header in included if header.startswith(forbidden.get(folder, ()))]


def test_kernels_include_neither_torch_nor_ops():
    sources = [path for path in (ROOT / "csrc").rglob("*.*") if path.suffix in (".h", ".inl", ".cpp", ".cu")]
    assert any(path.suffix == ".cpp" for path in sources)
    for path in sources:
        folder = path.relative_to(ROOT / "csrc").parts[0]
        assert wrong_includes(path.read_text(encoding="utf-8"), folder) == [], path


def test_a_wrong_include_is_seen():
    source = '#include <vector>\n#include "ops/check.h"\n  # include <torch/csrc/stable/tensor.h>\n// c10/x.h\n'
    assert wrong_includes(source, "kernels") == ["ops/check.h", "torch/csrc/stable/tensor.h"]
    assert wrong_includes(source, "ops") == []


def test_importing_petl_ext_loads_no_other_library():
    script = """
import sys, torch
before = set(sys.modules)
import petl_ext
print(*sorted({name.partition(".")[0] for name in set(sys.modules) - before}))
"""
    output = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    outside = set(output.split()) - sys.stdlib_module_names - {"petl_ext", "torch"}
    assert outside == set()


def test_parts_that_need_more_than_torch_are_there_on_demand():
    script = """
import sys
import petl_ext
assert "transformers" not in sys.modules
assert petl_ext.hf.SearchCallback and petl_ext.models.MeterModel and petl_ext.counting.count_macs
assert not hasattr(petl_ext, "nothing")
"""
    subprocess.run([sys.executable, "-c", script], check=True)
