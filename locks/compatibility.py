"""make compat: the tests of the doors with the oldest and the newest versions that pyproject.toml allows.

    python locks/compatibility.py .venv/bin/python

Each set of versions has an environment of its own; into both goes the one wheel that the given interpreter builds.
Writes docs/compatibility.md; fails where a test failed.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections import Counter
from datetime import date
from importlib import metadata
from typing import NamedTuple

from install import LOCK, ROOT, Environment, require_locked_python

FOLDER = ROOT / "build" / "compatibility"
PAGE = ROOT / "docs" / "compatibility.md"
TESTS = ROOT / "python_tests"
RESOLUTIONS = {"oldest": "lowest-direct", "newest": "highest"}
LIBRARIES = ("torch", "transformers", "peft", "diffusers", "accelerate", "safetensors", "numpy")

PAGE_TEXT = """\
# Which versions fit each other

Written by `make compat` on DATE with INTERPRETER, on the CPU: the tests of all that touches other people's libraries,
with the oldest and the newest versions that `pyproject.toml` allows and pip could get. Between them, `make test` runs
all tests with the versions of `locks/develop.txt`.

TABLE

## Libraries that refuse each other

REFUSALS

## What was skipped

SKIPPED

## What failed

FAILED
"""


class Found(NamedTuple):
    """Of one set of versions."""

    versions: list
    refusals: list
    counts: Counter  # of outcomes
    failed: list
    skipped: Counter  # of reasons


def door_tests():
    """The test files that import a library which petl_ext has a door to, themselves or through a module of support/, or
    run an example."""
    paths = {path.stem: path for path in TESTS.rglob("*.py")}
    texts = {name: path.read_text(encoding="utf-8") for name, path in paths.items()}

    def importing(names):
        pattern = re.compile(rf"^\s*(?:import|from) (?:{'|'.join(names)})\b", re.MULTILINE)
        return {name for name, text in texts.items() if pattern.search(text)}

    direct = importing(["transformers", "peft", "diffusers", "accelerate", "example_scripts"])
    return [paths[name] for name in sorted(direct | importing(direct)) if name.startswith("test_")]


def output_of(*command, check=True):
    return subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=check).stdout


def tools_environment():
    tools = Environment(FOLDER / "tools", LOCK)
    if not tools.is_complete():
        tools.begin()
        tools.install(LOCK, "uv")
        tools.end()
    return tools


def resolve(tools, edge):
    """A lock for this interpreter. What the user's own pip is told to constrain is constrained here too."""
    lock = FOLDER / f"{edge}.txt"
    own = re.findall(r"\.constraint='(.*)'", output_of(tools.programs / "python", "-m", "pip", "config", "list"))
    constraints = [argument for files in own for file in files.split() for argument in ("--constraint", file)]
    choice = ["--upgrade", "--resolution", RESOLUTIONS[edge], "--python", sys.executable, *constraints]
    output_of(tools.programs / "uv", "pip", "compile", "-q", *choice, "pyproject.toml", "--extra", "test", "-o", lock)
    return lock


def build_wheel(python):
    folder = FOLDER / "wheel"
    shutil.rmtree(folder, ignore_errors=True)
    output_of(python, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", folder, ".")
    (wheel,) = folder.glob("*.whl")
    return wheel


def make_environment(edge, lock, wheel):
    environment = Environment(FOLDER / edge, lock)
    if not environment.is_complete():
        environment.begin()
        environment.install(lock, "torch", "setuptools")
        environment.install(lock, "--only-deps", ".[test]")
        environment.end()
    environment.install(lock, "--no-deps", "--force-reinstall", wheel)
    return environment


def run_tests(environment, edge):
    """Every test's outcome, as the elements of a JUnit report."""
    report = FOLDER / f"{edge}.xml"
    report.unlink(missing_ok=True)
    command = [
        environment.programs / "pytest",
        "-n",
        "auto",
        "--dist",
        "loadfile",
        f"--junitxml={report}",
        *door_tests(),
    ]
    # The wheel is to be imported, not the checkout around the tests.
    subprocess.run(command, cwd=ROOT, env={**os.environ, "PYTHONSAFEPATH": "1"})
    return list(ElementTree.parse(report).getroot().iter("testcase"))


def refusals(environment):
    """What the libraries say of each other, and what pip finds that their requirements forbid."""
    python = environment.programs / "python"
    asked = json.loads(output_of(python, TESTS / "support" / "refusals.py"))
    broken = output_of(python, "-m", "pip", "check", check=False).splitlines()
    return [*asked, *(line for line in broken if not line.startswith("No broken"))]


def try_versions(edge, lock, wheel):
    environment = make_environment(edge, lock, wheel)
    cases = run_tests(environment, edge)
    failed = [f"{case.get('classname')}::{case.get('name')}" for case in cases if {"failure", "error"} & tags(case)]
    skipped = Counter(case.find("skipped").get("message") for case in cases if "skipped" in tags(case))
    counts = Counter(passed=len(cases) - len(failed) - skipped.total(), skipped=skipped.total(), failed=len(failed))
    installed = {d.metadata["Name"]: d.version for d in metadata.distributions(path=[environment.site_packages])}
    return Found([installed[name] for name in LIBRARIES], refusals(environment), counts, failed, skipped)


def tags(case):
    return {child.tag for child in case}


def page(found):
    """The text of docs/compatibility.md, of {edge: Found}."""

    def listed(per_edge):
        lines = [f"- {edge}: {line}" for edge, entry in found.items() for line in per_edge(entry)]
        return "\n".join(lines) or "Nothing."

    rows = dict(zip(LIBRARIES, zip(*(entry.versions for entry in found.values()), strict=True), strict=True))
    rows |= {
        f"tests {name}": [entry.counts[name] for entry in found.values()] for name in ("passed", "skipped", "failed")
    }
    parts = {
        "INTERPRETER": f"Python {sys.version.split()[0]}",
        "DATE": str(date.today()),
        "TABLE": "\n".join(
            [
                f"| | {' | '.join(found)} |",
                f"|---|{'---|' * len(found)}",
                *(f"| {name} | {' | '.join(map(str, values))} |" for name, values in rows.items()),
            ]
        ),
        "REFUSALS": listed(lambda entry: entry.refusals),
        "SKIPPED": listed(lambda entry: [f"{count} times: {reason}" for reason, count in entry.skipped.items()]),
        "FAILED": listed(lambda entry: entry.failed),
    }
    return re.sub("|".join(parts), lambda match: parts[match[0]], PAGE_TEXT)


def main(python):
    require_locked_python()
    os.environ["PETL_CUDA"] = "0"  # a CUDA torch would have kernels compiled that nothing here can run
    FOLDER.mkdir(parents=True, exist_ok=True)
    tools, wheel = tools_environment(), build_wheel(python)
    found = {edge: try_versions(edge, resolve(tools, edge), wheel) for edge in RESOLUTIONS}
    PAGE.write_text(page(found), encoding="utf-8")
    return int(any(entry.failed for entry in found.values()))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
