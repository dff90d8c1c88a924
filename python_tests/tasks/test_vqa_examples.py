"""The examples on VQAv2's format, on a few pictures of digits."""

import sys

import pytest
from example_scripts import EXAMPLES, load_example

import petl_ext


@pytest.fixture
def example(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    yield load_example
    sys.modules.pop("vqa_apt", None)


def arguments(folder, *more):
    return ["--digits", "--scenes", "40", "--output", str(folder), *more]


def test_apt(example, tmp_path, capsys):
    script = example("vqa_apt")
    result = script.main(arguments(tmp_path, "--steps", "3", "--num-prompts", "5"))
    printed = capsys.readouterr().out
    assert 0 <= result["score"] <= 1 and f"VQA score {result['score']:.1%} with 5 prompts" in printed
    trained = dict(result["attachment"].named_parameters())
    fresh = type(result["attachment"].model)(result["attachment"].model.config)
    again = petl_ext.load(fresh, tmp_path / "apt")
    assert all((parameter == trained[name]).all() for name, parameter in again.named_parameters())


def test_das(example, tmp_path, capsys):
    result = example("das_search").main(arguments(tmp_path, "--steps", "30", "--num-skip", "1"))
    assert len(result["skipped"]) == 1 and result["attachment"].skipped == result["skipped"]
    assert (tmp_path / "gates.png").stat().st_size > 10_000 and (tmp_path / "search.json").exists()
    assert f"without layers {result['skipped'][0]}" in capsys.readouterr().out


def test_files_must_be_named(example, capsys):
    with pytest.raises(SystemExit):
        example("vqa_apt").main([])
    assert "--train and --test must be given, or --digits" in capsys.readouterr().err
