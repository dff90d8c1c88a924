"""The DVP demo and the search for its layer, on little data and for few steps."""

import json
import re

import pytest
import torch

from petl_ext.cli import main
from petl_ext.demo import dvp, dvp_models, dvp_training
from petl_ext.demo.dvp_report import CHOICE
from petl_ext.search import PlacementSearch

SIZE = dvp_training.DVPSize(
    steps=2, search_steps=6, batch=4, questions_per_scene=2, scenes={"train": 12, "val": 6, "test": 6}
)


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setattr(dvp, "DVP_QUICK", SIZE)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("dvp")


@pytest.fixture(scope="module")
def prepared(folder):
    return dvp_training.DVPRun.prepare(folder, SIZE, seed=0, progress=False)


def tables_of(report):
    """{task: {method: cells after the name}} of the tables with accuracies and their errors."""
    tables = {}
    for part in report.split("\n## ")[1:]:
        rows = [line.split("|")[1:-1] for line in part.splitlines() if "±" in line]
        tables[part.splitlines()[0]] = {name.strip(): [cell.strip() for cell in cells] for name, *cells in rows}
    return {task: rows for task, rows in tables.items() if rows}


def test_report(tiny, folder, prepared, capsys):
    threads = torch.get_num_threads()
    main(["demo", "dvp", "--quick", "--no-progress", "--output", str(folder)])
    report = (folder / "dvp-report.md").read_text()
    assert report in capsys.readouterr().out
    assert torch.get_num_threads() == threads
