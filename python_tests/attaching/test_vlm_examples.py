"""The examples on a language model that sees, on tiny models with random weights."""

import sys

import pytest
import torch
from example_scripts import EXAMPLES, load_example

import petl_ext


@pytest.fixture
def example(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    yield load_example
    sys.modules.pop("vlm_vision_apt", None)


def test_apt_on_the_vision_tower(example, tmp_path, capsys):
    script = example("vlm_vision_apt")
    result = script.main(["--steps", "2", "--num-prompts", "5", "--output", str(tmp_path / "apt")])
    assert all(name.startswith("model.vision_tower") for name, _ in result["attachment"].named_parameters())
    assert f"{result['after']:.1%} after training" in capsys.readouterr().out
    again = script.tiny_model()
    petl_ext.load(again, tmp_path / "apt")
    assert script.accuracy(again, seed=1) == result["after"]


def test_das_on_the_language_model(example, capsys):
    result = example("vlm_language_das").main(["--steps", "12", "--num-skip", "2"])
    assert len(result["skipped"]) == 2 and torch.equal(result["cached"], result["plain"])
    assert "skipped: model.language_model.layers." in capsys.readouterr().out
