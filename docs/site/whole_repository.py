"""mkdocs' hook: the site has docs/ at its root, README as its first page, and beside them whatever these link to.

So one set of links serves the site and those who read the files where they are.
"""

import re
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[2]
LINK = re.compile(r"(\]\()(?!https?:|#)([^)#\s]+)")


def _linked(page):
    """Paths below ROOT of what a page links to."""
    for _, target in LINK.findall(page.read_text(encoding="utf-8")):
        yield (page.parent / target).resolve().relative_to(ROOT)


def _path_in_site(path):
    """Where a file of the repository is in the site."""
    return (
        Path("index.md") if path == Path("README.md") else path.relative_to("docs") if path.parts[0] == "docs" else path
    )


def on_files(files, config):
    waiting, seen = [Path("README.md"), *(Path("docs", page.src_uri) for page in files.documentation_pages())], set()
    while waiting:
        path = waiting.pop()
        if path in seen:
            continue
        seen.add(path)
        if path.parts[0] != "docs":
            files.append(File.generated(config, _path_in_site(path).as_posix(), abs_src_path=str(ROOT / path)))
        if path.suffix == ".md":
            waiting += _linked(ROOT / path)
    return files


def on_page_markdown(markdown, page, **_):
    file = Path(page.file.abs_src_path).resolve()
    here = _path_in_site(file.relative_to(ROOT)).parent

    def moved(match):
        target = _path_in_site((file.parent / match[2]).resolve().relative_to(ROOT))
        return match[1] + "../" * len(here.parts) + target.as_posix()

    return LINK.sub(moved, markdown)
