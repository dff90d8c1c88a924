"""The pages of docs/: their Python runs as it stands, each page from top to bottom in an empty folder."""

import ast
import importlib
import inspect
import re
from pathlib import Path
from unittest import mock

import pytest

from petl_ext import ops
from petl_ext.attaching.families import FAMILIES
from petl_ext.ops.kernels import OPS, held_kernels

ROOT = Path(__file__).parents[2]
WRITTEN = {"compatibility"}  # by make compat
TOLD = {"api", "demo", "install", "recipes", "speed", "troubleshooting"}  # names, measurements, commands, messages
WITH_OTHER_FILES = {"vqa"}  # test_readme.py runs it
PAGES = sorted((ROOT / "docs").rglob("*.md"))
RUN_HERE = [page for page in PAGES if page.stem not in WRITTEN | TOLD | WITH_OTHER_FILES]
LINKING = [*PAGES, *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md", "csrc/README.md"))]


def python_of(page):
    """Its Python on the lines on which it stands in the page, so that an error names them."""
    lines = page.read_text(encoding="utf-8").split("\n")
    inside = False
    for number, line in enumerate(lines):
        is_fence = line.startswith("```")
        lines[number] = line if inside and not is_fence else ""
        inside = line.startswith("```python") if is_fence else inside
    return "\n".join(lines)


@pytest.mark.parametrize("page", RUN_HERE, ids=lambda page: page.stem)
def test_a_page_runs(page, tmp_path, monkeypatch):
    code = python_of(page)
    assert code.strip(), f"{page.name} holds no Python"
    monkeypatch.chdir(tmp_path)
    with mock.patch.dict(FAMILIES):
        exec(compile(code, page, "exec"), {"__name__": "__main__"})


def test_the_page_of_hardware_tells_who_computes():
    """The columns of its table are the ops; its rows, the devices of which kernels are held."""
    text = (ROOT / "docs" / "hardware.md").read_text(encoding="utf-8")
    header, _, *rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("|")]
    assert header[0] == "device" and set(header[1:-1]) == set(OPS)
    named = {"C++": ("native", "cpu"), "CUDA": ("native", "cuda"), "Triton": ("triton", "cuda")}
    for device, *of_ops, _ in rows:
        for op, whose in zip(header[1:-1], of_ops, strict=True):
            if whose == "CUDA":
                continue  # this build may have none
            assert whose == "on request" or named[whose] in held_kernels(op), (device, op)
    assert [row[0] for row in rows if row[1] == "on request"] == ["Apple GPU (`mps`), and all others"]


def test_what_is_told_holds_no_python():
    assert [name for name in TOLD if python_of(ROOT / "docs" / f"{name}.md").strip()] == []


def test_readme_names_every_page():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    linked = re.findall(r"\((docs/[\w/-]+\.md)[)#]", readme)
    assert PAGES and set(linked) == {page.relative_to(ROOT).as_posix() for page in PAGES}


def test_the_site_s_menu_names_every_page():
    named = re.findall(r": ([\w/-]+\.md)$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert {page.relative_to(ROOT / "docs").as_posix() for page in PAGES} - set(named) == set()


def anchors_of(page):
    """Of its headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", LINKING, ids=lambda page: page.stem)
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\((?!https?:)([^)#\s]*)#?([^)\s]*)\)", page.read_text(encoding="utf-8"))
    for path, anchor in links:
        target = page.parent / path if path else page
        assert target.exists(), f"{page.name} links to {path}"
        assert not anchor or anchor in anchors_of(target), f"{page.name} links to {path}#{anchor}"


def test_the_reference_names_every_public_name():
    """As mkdocstrings wants it; modules have sections of their own."""
    named = re.findall(r"^::: (\S+)$", (ROOT / "docs" / "api.md").read_text(encoding="utf-8"), flags=re.MULTILINE)
    modules = ("petl_ext", "petl_ext.ops", "petl_ext.models", "petl_ext.hf", "petl_ext.peft")
    public = [f"{module}.{name}" for module in modules for name in importlib.import_module(module).__all__]
    others = {name for name in named if name.startswith("petl_ext.counting.")}
    assert others and sorted(named) == sorted({*public, *others} - set(modules))


def messages_in(path):
    """The strings of a file's code, neighbors as one, "..." standing for what is put into them."""
    text = path.read_text(encoding="utf-8")
    if path.suffix != ".py":
        yield from re.findall(r'"((?:[^"\\]|\\.)*)"', text)
        return
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value
        elif isinstance(node, ast.JoinedStr):
            yield "".join(part.value if isinstance(part, ast.Constant) else "..." for part in node.values)


def test_messages_that_troubleshooting_explains_are_ours():
    """Its tables quote them, "..." standing for what changes."""
    files = [ROOT / "setup.py", *(ROOT / "build_backend").glob("*.py"), *(ROOT / "petl_ext").rglob("*.py")]
    messages = [message for file in [*files, *(ROOT / "csrc" / "ops").iterdir()] for message in messages_in(file)]
    rows = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8").splitlines()
    cells = [row.split(" | ")[0] for row in rows if row.startswith("| ") and not row.startswith("| message |")]
    quoted = [text for cell in cells for text in re.findall(r"`([^`]+)`", cell)]
    patterns = {text: ".*".join(re.escape(piece.strip()) for piece in text.split("...")) for text in quoted}
    assert len(quoted) > 40
    assert [text for text in quoted if not any(re.search(patterns[text], m, re.DOTALL) for m in messages)] == []


def test_signatures_of_the_ops_are_theirs():
    """The page leaves types out."""
    text = (ROOT / "docs" / "ops.md").read_text(encoding="utf-8")
    told = dict(re.findall(r"^    (\w+)\(([^)]*)\) -> ", text, flags=re.MULTILINE))
    assert told.keys() == OPS.keys()
    for name, arguments in told.items():
        signatures = inspect.signature(eval(f"(lambda {arguments}: None)")), inspect.signature(getattr(ops, name))
        ours, theirs = ([(p.name, p.default) for p in signature.parameters.values()] for signature in signatures)
        assert ours == theirs, name


@pytest.mark.parametrize("page", ["CONTRIBUTING.md", "csrc/README.md"])
def test_files_that_a_guide_names_are_there(page):
    """`<op>` stands for each op."""
    named = re.findall(r"`((?:\w+/)+[\w<>.]*)`", (ROOT / page).read_text(encoding="utf-8"))
    named = [name for name in named if "<" not in name.replace("<op>", "")]
    assert len(named) > 10
    for name in named:
        for op in OPS if "<op>" in name else [""]:
            file = name.replace("<op>", op)
            assert any((folder / file).exists() for folder in ((ROOT / page).parent, ROOT)), file


def test_what_contributing_names_is_there():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    paths = [path for path in re.findall(r"`([\w./]+/[\w./]+\.\w+)`", text) if "<" not in path]
    names = re.findall(r"`(files|inputs|labels)\.(\w+)`", text)
    assert len(paths) > 3 and len(names) > 4
    assert [path for path in paths if not (ROOT / path).is_file()] == []
    modules = {module: importlib.import_module(f"petl_ext.tasks.{module}") for module, _ in names}
    assert [name for module, name in names if not hasattr(modules[module], name)] == []
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert set(re.findall(r"`make ([a-z-]+)`", text)) <= set(targets)
