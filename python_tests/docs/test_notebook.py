"""The notebook: its code runs, and prints what it shows."""

import re
from pathlib import Path

import notebooks

PATH = Path(__file__).parents[2] / "examples" / "apt_on_vilt.ipynb"
# Of what is trained and of the processor at hand a machine may say something else.
VARIES = re.compile(r"\d+%|^answers: .*|apt \(cpu, \w+\)", re.MULTILINE)


def what_stays(texts):
    return [re.sub(" +", " ", VARIES.sub("-", text)) for text in texts]


def test_the_notebook_prints_what_it_shows():
    notebook = notebooks.read(PATH)
    shown = [notebooks.kept(cell) for cell in notebooks.code_cells(notebook)]
    printed = notebooks.printed_by(notebook)
    assert what_stays(printed) == what_stays(shown)
    scores = dict(re.findall(r"(\S.*\S) +VQA score (\d+)%", "".join(printed)))
    assert int(scores["with APT"]) > int(scores["classifier alone"])
