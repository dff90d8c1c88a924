"""The tables of bench/search_quality.py."""

import json

import search_quality

MEASURED = {
    "0": {"accuracies": [0.2, 0.6, 0.9, 0.7], "seconds": 50.0},
    "1": {"accuracies": [0.4, 0.6, 0.8, 1.0], "seconds": 50.0},
}
CHOICES = {way: [2, 10.0] for way in search_quality.WAYS[1:]} | {"the last": [3, 0.0]}
KEPT = {seed: measured | {"choices": CHOICES} for seed, measured in MEASURED.items()}


def rows_of(table):
    return {row[0].strip(): [cell.strip() for cell in row[1:]] for row in (line.split("|")[1:-1] for line in table)}


def test_regrets_and_their_cost():
    table = rows_of(search_quality.table(KEPT).splitlines())
    assert list(table)[2:] == list(search_quality.WAYS)
    assert table["a random one"] == ["30.0", "30.0", "30.0 ± 0.0", "0%"]
    assert table["the last"] == ["20.0", "0.0", "10.0 ± 10.0", "0%"]
    assert table["DAS's search"] == ["0.0", "20.0", "10.0 ± 10.0", "20%"]


def test_what_is_measured_is_not_measured_again(tmp_path, monkeypatch, capsys):
    measured = []

    def measure(run):
        measured.append(run.seed)
        return KEPT["0"]

    monkeypatch.setattr(search_quality, "measure", measure)
    monkeypatch.setattr(search_quality.ViltRun, "prepare", lambda output, size, seed, progress: Prepared(seed))
    arguments = ["--quick", "--results", str(tmp_path), "--seeds"]
    search_quality.main([*arguments, "0", "1"])
    search_quality.main([*arguments, "1", "2"])
    assert measured == [0, 1, 2]
    kept = json.loads((tmp_path / "search-quality.json").read_text())
    assert list(kept["quick"]) == ["0", "1", "2"] and kept["quick"]["2"] == KEPT["0"]
    written = (tmp_path / "search-quality.md").read_text()
    assert written in capsys.readouterr().out and "steps of 32 questions" in written


class Prepared:
    def __init__(self, seed):
        self.seed = seed


def test_one_seed_has_no_standard_error():
    assert rows_of(search_quality.table({"0": KEPT["0"]}).splitlines())["the last"] == ["20.0", "20.0", "0%"]
