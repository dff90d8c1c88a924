"""States, JSON files and pictures of the depth search: what they hold, and what is refused."""

import json
import math
import sys

import pytest
from depth_searches import costs_that_save, losses_of, make_search, run_search
from searched_models import DIM, LAYERS, attached, json_copy

from petl_ext import DepthSearch


def damaged_states(state):
    """What a file can be that is no state, beside words that the refusal says."""
    entry = state["history"][0]
    yield {name: value for name, value in state.items() if name != "history"}, "must have a valid history"
    for name, value in (
        ("history", [{**entry, "preferences": None}]),
        ("history", [{**entry, "subsets": [[99]]}]),
        ("history", [{"step": 1}]),
        ("step", "3"),
        ("since_update", -1),
        ("finished", None),
        ("selection", [0, 99]),
        ("selection", None),
    ):
        yield {**state, name: value}, f"must have a valid {name}"
    for name, value in (("draws", None), ("preferences", ["a"] * LAYERS), ("preferences", [math.nan] * LAYERS)):
        yield {**state, "bandit": {**state["bandit"], name: value}}, f"Bandit: {name} must be"
    yield {**state, "bandit": []}, "Bandit: state must be a dict"
    yield {**state, "costs": []}, "costs must be None"
    yield {**state, "constants": {**state["constants"], "probability": []}}, "constants must be"
    yield [], "state must be a dict"


def test_a_damaged_state_is_refused_and_changes_nothing(tmp_path):
    search, other = make_search(), make_search()
    run_search(search, 30, losses_of(search))
    run_search(other, 10, losses_of(other, seed=1))
    before = other.state_dict()
    for state, message in damaged_states(json_copy(search.state_dict())):
        with pytest.raises(ValueError, match=message):
            other.load_state_dict(state)
        assert other.state_dict() == before
        (tmp_path / "search.json").write_text(json.dumps(state))
        with pytest.raises(ValueError):
            DepthSearch.load(tmp_path / "search.json", attached()[0])


def test_pictures_say_what_to_install(tmp_path, monkeypatch):
    search = make_search()
    run_search(search, 10, losses_of(search))
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"DepthSearch\.plot needs matplotlib: pip install matplotlib"):
        search.plot(tmp_path / "gates.png")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_skip": 3}, "num_skip must be 3, got 2"),
        ({"interval": 5}, "constants must be .*'interval': 5.*got .*'interval': 10"),
        ({"seed": 1}, "'seed': 1.*got.*'seed': 0"),
        ({"inputs": costs_that_save(*[1] * LAYERS)}, "costs must be .*got None"),
        ({"model": attached(hidden=(DIM,) * 7)[0]}, "layers must be"),
    ],
    ids=lambda value: "" if isinstance(value, str) else next(iter(value)),
)
def test_the_state_of_another_search_is_refused(changes, message):
    search = make_search()
    run_search(search, 20, losses_of(search))
    other = make_search(**changes)
    before = other.state_dict()
    with pytest.raises(ValueError, match=message):
        other.load_state_dict(json_copy(search.state_dict()))
    assert other.state_dict() == before
    with pytest.raises(ValueError, match="state must be of format 1, got None"):
        other.load_state_dict({})


def test_the_json_file_says_what_was_found(tmp_path):
    search = make_search()
    run_search(search, 30, losses_of(search))
    (tmp_path / "search.json").write_text("before")
    search.save(tmp_path / "search.json")
    read = json.loads((tmp_path / "search.json").read_text())
    assert read["layers"] == [f"layers.{index}" for index in range(LAYERS)]
    assert read["selection"] == list(search.selection())
    assert read["selected_layers"] == [f"layers.{index}" for index in search.selection()]
    assert read["constants"]["num_subsets"] == 3 and read["num_skip"] == 2
    assert read["bandit"]["preferences"] == search.bandit.preferences
    assert read["history"] == search.history and len(read["history"]) == 3
    assert [path.name for path in tmp_path.iterdir()] == ["search.json"]
    search.history[0]["losses"] = [math.nan]
    with pytest.raises(ValueError, match="not JSON compliant"):
        search.save(tmp_path / "search.json")
    assert json.loads((tmp_path / "search.json").read_text()) == read
    assert [path.name for path in tmp_path.iterdir()] == ["search.json"]


@pytest.mark.parametrize("text", ["", "[]", '{"format": 1}', '{"num_skip": 2, "max_macs": null}'])
def test_another_json_file_is_refused(text, tmp_path):
    (tmp_path / "other.json").write_text(text)
    with pytest.raises(ValueError, match=r"other\.json: not what DepthSearch\.save writes"):
        DepthSearch.load(tmp_path / "other.json", attached()[0])


def test_the_picture_is_drawn(tmp_path):
    search = make_search(num_skip=3)
    with pytest.raises(ValueError, match="nothing to plot"):
        search.plot(tmp_path / "gates.png")
    run_search(search, 60, losses_of(search))
    search.plot(tmp_path / "gates.svg")
    search.plot(tmp_path / "gates.png")
    drawn = (tmp_path / "gates.svg").read_text()
    assert all(f"layers.{index}" in drawn for index in range(LAYERS)) and "3 of 8 layers" in drawn
    assert (tmp_path / "gates.png").read_bytes().startswith(b"\x89PNG")
