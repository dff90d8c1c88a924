"""Tables of measurements: the newest value of every case, and the commit in each row."""

import json
import re

import pytest
from results import CASE, RESULTS, keep, machine_name

PROCESSOR = "Intel(R) Xeon(R) Processor @ 2.80GHz"
COUNTED = ("cuda-", "hopper-", "triton-")  # not measured
TABLES = [path for path in sorted(RESULTS.glob("*.json")) if not path.stem.startswith(COUNTED)]


def row(name, commit, milliseconds, cpu_path="avx512", **case):
    measured = {"date": "2026-11-30", "commit": commit, "milliseconds": milliseconds}
    return {"name": name, "cpu_path": cpu_path, "onednn_isa_limit": None, "threads": 1} | case | measured


def test_a_newer_value_takes_the_place_of_the_same_case_only(tmp_path):
    first = [row("apt forward", "a", 1.0), row("apt forward", "a", 2.0, "avx2"), row("adapter forward", "a", 3.0)]
    keep(PROCESSOR, first, tmp_path)
    path = keep(PROCESSOR, [row("apt forward", "b", 0.5), row("apt forward", "b", 4.0, threads=2)], tmp_path)
    table = json.loads(path.read_text())
    assert path.name == "intel-xeon-processor-2.80ghz.json" and table["machine"] == PROCESSOR
    assert [(kept["commit"], kept["milliseconds"]) for kept in table["comparisons"]] == [
        ("b", 0.5),
        ("a", 2.0),
        ("a", 3.0),
        ("b", 4.0),
    ]


def test_there_are_tables():
    assert TABLES


@pytest.mark.parametrize("path", TABLES, ids=lambda path: path.stem)
def test_every_row_says_where_it_comes_from_and_no_case_comes_twice(path):
    table = json.loads(path.read_text(encoding="utf-8"))
    rows = table["comparisons"]
    assert path.stem == machine_name(table["machine"])
    assert all(re.fullmatch(r"\d{4}-\d\d-\d\d", kept["date"]) and kept["commit"] and kept["torch"] for kept in rows)
    assert len({tuple(kept[name] for name in CASE) for kept in rows}) == len(rows) > 0
