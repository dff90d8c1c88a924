"""The table of several seeds of the demo on easy-VQA."""

import json

import pytest

from petl_ext.demo.easy_vqa.seeds import main


def numbers(chosen, best, accuracy):
    return {
        "chosen": chosen,
        "best": best,
        "accuracy": accuracy,
        "other pictures": 0.5,
        "search seconds": 10.0,
        "seconds": 40.0,
    }


def test_rows_at_the_choice_are_one_row(tmp_path, capsys):
    runs = [
        numbers(1, 2, {"text only, layer 1": 0.6, "DVP, layer 1": 0.7, "DVP, layer 2": 0.8}),
        numbers(2, 2, {"text only, layer 2": 0.5, "DVP, layer 1": 0.7, "DVP, layer 2": 0.9}),
    ]
    for seed, run in enumerate(runs):
        (tmp_path / f"easy-vqa-minilm-seed{seed}.json").write_text(json.dumps(run))
    main(["--output", str(tmp_path)])
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in capsys.readouterr().out.splitlines()]
    table = {row[0]: row[1:] for row in rows}
    assert table["layer that the search chose"] == ["1", "2", ""]
    assert table["time of the search, of that of the fine-tuning"] == ["25%", "25%", ""]
    assert table["text only"] == ["60.0", "50.0", "55.0 ± 5.0"]
    assert table["DVP"] == ["70.0", "90.0", "80.0 ± 10.0"]
    assert table["DVP at the best layer"][:2] == ["80.0", "90.0"]
    assert table["regret of the search"] == ["10.0", "0.0", "5.0 ± 5.0"]


def test_a_folder_without_runs_is_refused(tmp_path):
    with pytest.raises(SystemExit, match=r"must hold what petl-ext demo dvp has written, got no easy-vqa-minilm-seed"):
        main(["--output", str(tmp_path)])
