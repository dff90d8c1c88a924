"""No file, class or function is so long that one cannot see it whole, but for those that say why."""

import ast
import re
import subprocess
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MOST_LINES, MOST_OF_A_CLASS, MOST_OF_A_FUNCTION = 400, 200, 50  # without docstrings
SUFFIXES = (".py", ".cpp", ".cu", ".h", ".inl")
EXCUSE = r"\blonger than others\b"  # in the comment at a file's head


def lengths(source):
    """{(what, name): lines without docstrings} of the classes and functions of a Python file."""
    found = {}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            described = (inner for inner in ast.walk(node) if isinstance(inner, ast.ClassDef | ast.FunctionDef))
            docstrings = [inner.body[0] for inner in described if ast.get_docstring(inner) is not None]
            lines = node.end_lineno - node.lineno + 1
            what = "class" if isinstance(node, ast.ClassDef) else "function"
            found[what, node.name] = lines - sum(d.end_lineno - d.lineno + 1 for d in docstrings)
    return found


def too_long(source, is_python):
    """What of a file is too long, in words."""
    head = "\n".join(source.split("\n")[:5])
    lines = source.count("\n")
    if lines > MOST_LINES and not re.search(EXCUSE, head):
        yield f"{lines} lines"
    for (what, name), length in (lengths(source) if is_python else {}).items():
        if length > (MOST_OF_A_CLASS if what == "class" else MOST_OF_A_FUNCTION):
            yield f"the {what} {name}, {length} lines"


def sources():
    names = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\n")
    return [name for name in names if name.endswith(SUFFIXES) and (ROOT / name).exists()]


def test_nothing_is_too_long():
    files = sources()
    assert len(files) > 200
    texts = {name: (ROOT / name).read_text(encoding="utf-8") for name in files}
    assert [f"{name}: {what}" for name, text in texts.items() for what in too_long(text, name.endswith(".py"))] == []


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("x = 1\n" * 401, ["401 lines"]),
        ("# Longer than others, since\n" + "x = 1\n" * 401, ["402 lines"]),
        ("# It is longer than others, since\n" + "x = 1\n" * 401, []),
        ("def f():\n" + "    x = 1\n" * 51, ["the function f, 52 lines"]),
        ('def f():\n    """One\n    two."""\n' + "    x = 1\n" * 49, []),
        ("class C:\n" + "    x = 1\n" * 200, ["the class C, 201 lines"]),
    ],
)
def test_what_is_too_long_is_seen(source, found):
    assert list(too_long(source, is_python=True)) == found


def test_no_two_test_files_have_one_name():
    """pytest would collect only the first."""
    names = Counter(path.name for path in (ROOT / "python_tests").rglob("test_*.py"))
    assert [name for name, count in names.items() if count > 1] == []
