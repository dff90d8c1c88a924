"""Runs a notebook's code without Jupyter: python python_tests/support/notebooks.py examples/apt_on_vilt.ipynb

That writes what each cell prints into the notebook, as Jupyter would.
"""

import contextlib
import io
import json
import sys
from pathlib import Path


def read(path):
    return json.loads(Path(path).read_text(encoding="utf-8"))


def printed_by(notebook):
    """What each code cell prints, run in order in one namespace."""
    names, found = {"__name__": "__main__"}, []
    for number, cell in enumerate(code_cells(notebook), start=1):
        with contextlib.redirect_stdout(io.StringIO()) as text:
            exec(compile("".join(cell["source"]), f"cell {number}", "exec"), names)
        found.append(text.getvalue())
    return found


def code_cells(notebook):
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def kept(cell):
    """What the notebook shows that the cell printed."""
    return "".join(line for output in cell["outputs"] for line in output["text"])


def write_outputs(path):
    notebook = read(path)
    for number, (cell, text) in enumerate(zip(code_cells(notebook), printed_by(notebook), strict=True), start=1):
        output = {"name": "stdout", "output_type": "stream", "text": text.splitlines(keepends=True)}
        cell |= {"execution_count": number, "outputs": [output] if text else []}
    Path(path).write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    write_outputs(sys.argv[1])
