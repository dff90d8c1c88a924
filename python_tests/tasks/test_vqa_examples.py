"""The examples on VQAv2's format, on a few pictures of digits."""

import sys

import pytest
import torch
from example_scripts import EXAMPLES, load_example
from PIL import Image

import petl_ext
from petl_ext.models import DVPBert


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


def test_dvp(example, tmp_path, capsys):
    script = example("dvp_bert")
    result = script.main(arguments(tmp_path, "--steps", "12", "--adapters"))
    assert 0 <= result["layer"] < 6 and result["model"].insert_layer == result["layer"]
    assert f"with the prompt at layer {result['layer']}" in capsys.readouterr().out
    assert (tmp_path / "layers.png").stat().st_size > 10_000 and (tmp_path / "search.json").exists()
    again = DVPBert.load(tmp_path / "dvp", script.read_language_model(), script.DigitsEncoder())
    trained = result["model"].state_dict()
    assert all(torch.equal(tensor, trained[name]) for name, tensor in again.state_dict().items())


def test_digits_look_as_the_image_encoder_saw_them_in_its_training(example):
    script = example("dvp_bert")
    image = Image.effect_noise((32, 32), 80).convert("RGB")
    vilts = script.ViltProcessor.from_pretrained(script.BACKBONE).image_processor
    ours, expected = (of(image, return_tensors="pt") for of in (script.digits_processor().image_processor, vilts))
    assert torch.equal(ours["pixel_values"], expected["pixel_values"]) and "pixel_mask" not in ours


def test_files_must_be_named(example, capsys):
    with pytest.raises(SystemExit):
        example("vqa_apt").main([])
    assert "--train and --test must be given, or --digits" in capsys.readouterr().err
