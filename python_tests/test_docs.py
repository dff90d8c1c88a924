"""The pages of docs/: their Python runs as it stands, each page from top to bottom in an empty folder."""

import re
from pathlib import Path
from unittest import mock

import pytest

from petl_ext.attaching.families import FAMILIES

ROOT = Path(__file__).parent.parent
WRITTEN = {"compatibility"}  # by make compat
PAGES = sorted(page for page in (ROOT / "docs").glob("*.md") if page.stem not in WRITTEN)


def python_of(page):
    """Its Python on the lines on which it stands in the page, so that an error names them."""
    lines = page.read_text(encoding="utf-8").split("\n")
    inside = False
    for number, line in enumerate(lines):
        is_fence = line.startswith("```")
        lines[number] = line if inside and not is_fence else ""
        inside = line.startswith("```python") if is_fence else inside
    return "\n".join(lines)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_page_runs(page, tmp_path, monkeypatch):
    code = python_of(page)
    assert code.strip(), f"{page.name} holds no Python"
    monkeypatch.chdir(tmp_path)
    with mock.patch.dict(FAMILIES):
        exec(compile(code, page, "exec"), {"__name__": "__main__"})


def test_readme_names_every_page():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    linked = re.findall(r"\(docs/([\w-]+\.md)\)", readme)
    assert PAGES and set(linked) == {page.name for page in PAGES} | {f"{name}.md" for name in WRITTEN}
