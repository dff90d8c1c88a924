"""Triton and CuPy as contenders of `make gpu`, as far as a CPU can tell."""

import importlib.util
import json
import sys

import pytest
import torch
from gpu import cupy_contender, preferred, speed, summary
from results import RESULTS

from petl_ext.ops.preferred import read_preferences

HAS_CUPY = importlib.util.find_spec("cupy") is not None and torch.cuda.is_available()


def compared(rows, direction, ratio):
    return {
        "topic": "comparison",
        "op": "apt",
        "direction": direction,
        "rows": rows,
        "dim": 768,
        "inner": 50,
        "weights": "float32",
        "speed_up": {"vs triton": {"median": ratio, "p10": ratio - 0.02, "p90": ratio + 0.02}},
    }


def test_triton_runs_beside_ours(monkeypatch):
    monkeypatch.setattr(speed, "compiled", lambda function: function)
    contenders = speed.contenders_of(next(case for case in speed.cases() if case.op.name == "attention_pool"))
    assert contenders.keys() == {"ours", "eager", "compile", "triton"}
    x = torch.ones(1, 2, 8)
    x = x.cuda() if torch.cuda.is_available() else x
    assert torch.allclose(contenders["triton"](x, x), contenders["eager"](x, x))


def test_where_triton_wins_the_result_says_so():
    assert summary.triton_in_words(compared(10, "forward", 0.8)) == "Triton is faster, 1.25 times"
    assert summary.triton_in_words(compared(10, "forward", 1.2)) == "" == summary.triton_in_words({"failures": {}})


def test_preferences_are_ranges_in_which_triton_won_both_directions():
    won = [compared(rows, direction, 0.9) for rows in (100, 200) for direction in ("forward", "forward backward")]
    lost = [compared(300, "forward", 0.9), compared(300, "forward backward", 1.1)]
    near = [compared(400, direction, 0.99) for direction in ("forward", "forward backward")]
    document = {"steps": [{"records": [*near, *lost, *won, {"topic": "summary"}]}]}
    (found,) = preferred.preferences_of(document, "Made-up GPU", "made-up.json")
    assert (found["least_rows"], found["most_rows"], found["backend"]) == (100, 200, "triton")
    assert found["device_name"] == "Made-up GPU" and found["source"] == "made-up.json"


def test_the_table_of_preferences_is_what_ops_read(tmp_path, monkeypatch):
    won = [compared(rows, direction, 0.9) for rows in (100, 200) for direction in ("forward", "forward backward")]
    measured = tmp_path / "made-up-gpu" / "run.json"
    measured.parent.mkdir()
    measured.write_text(json.dumps({"steps": [{"records": won}]}))
    monkeypatch.setattr(preferred, "PATH", tmp_path / "preferred.json")
    monkeypatch.setattr(sys, "argv", ["preferred", str(measured), "--device-name", "Made-up GPU"])
    preferred.main()
    (found,) = read_preferences(tmp_path / "preferred.json")
    assert found.covers("apt", "Made-up GPU", 150, 768, 50, "float32") and found.source == "made-up-gpu/run.json"
    assert not found.covers("apt", "Made-up GPU", 201, 768, 50, "float32")


def test_nothing_is_preferred_without_a_file_that_was_measured():
    sources = {RESULTS / preference.source for preference in read_preferences()}
    assert sources <= set(RESULTS.glob("*/*.json"))


@pytest.mark.skipif(HAS_CUPY, reason="CuPy can run here")
def test_cupy_is_left_out_with_the_reason(capsys, monkeypatch):
    monkeypatch.delenv("PETL_RECORDS", raising=False)
    assert cupy_contender.main() == 0
    assert '"left out: ' in capsys.readouterr().out
