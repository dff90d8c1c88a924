"""Searches of recipes, and models other than ViLT, made small and random."""

import json

import pytest
import torch
from small_recipes import small_recipe
from transformers import BertConfig, BertModel, CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

from petl_ext import DepthSearch
from petl_ext.cli import main
from petl_ext.models import MeterConfig, MeterModel
from petl_ext.recipes.data import Splits
from petl_ext.recipes.evaluating import evaluate
from petl_ext.recipes.recipe import read_recipe
from petl_ext.recipes.searching import search
from petl_ext.recipes.training import Experiment, StepClock, train

SEARCH = (
    "search.training={steps: 12, evaluate_every: null, checkpoint_every: 4}",
    "search.constants={interval: 2, warmup_steps: 4, search_steps: 12}",
    "training.batch_size=4",
    "training.log_every=1",
)


@pytest.fixture(scope="module")
def random_models(digits, tmp_path_factory):
    """A BERT and a CLIP's vision model, and a METER, for the words of the digits."""
    folder = tmp_path_factory.mktemp("models")
    tokenizer = Splits(read_recipe("digits-vqa-apt"), digits).processor.tokenizer
    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    text = {**sizes, "vocab_size": len(tokenizer), "max_position_embeddings": 64}
    vision = {**sizes, "image_size": 32, "patch_size": 16}
    torch.manual_seed(0)
    BertModel(BertConfig(**text)).save_pretrained(folder / "bert")
    CLIPVisionModel(CLIPVisionConfig(**vision)).save_pretrained(folder / "clip")
    meter = MeterConfig(
        text_config=text, vision_config=vision, hidden_size=16, num_fusion_layers=2, num_attention_heads=2
    )
    MeterModel(meter).save_pretrained(folder / "meter")
    images = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    for name in ("bert", "meter"):
        tokenizer.save_pretrained(folder / name)
    for name in ("clip", "meter"):
        images.save_pretrained(folder / name)
    return folder


def test_layers_are_searched_and_a_training_goes_without_them(digits, tmp_path, capsys):
    given = ["--data", str(digits), "--no-progress", "--set", "training.steps=2", "--set", "training.micro_batch=4"]
    settings = [part for setting in SEARCH for part in ("--set", setting)]
    main(["search", "digits-vqa-das-search", *given, *settings, "--output", str(tmp_path / "search")])
    printed = capsys.readouterr().out
    assert printed.startswith('{"method.skip": [')
    layer = int(printed.partition("[")[2].partition("]")[0])
    assert (tmp_path / "search" / "search.png").read_bytes().startswith(b"\x89PNG")
    recipe = small_recipe("digits-vqa-das", f"method.skip=[{layer}]", "training.steps=2")
    model = Experiment.of(read_recipe("digits-vqa-das-search"), digits).prepared.model
    assert DepthSearch.load(tmp_path / "search" / "search.json", model).selection() == (layer,)
    run = train(recipe, digits, tmp_path / "run", progress=False)
    apt = train(small_recipe("digits-vqa-apt", "training.steps=2"), digits, tmp_path / "apt", progress=False)
    assert run.training()["all_macs"] < apt.training()["all_macs"]
    with pytest.raises(SystemExit) as refused:
        main(["eval", str(tmp_path / "search"), "--data", str(digits), "--no-progress"])
    assert refused.value.code == 2 and "is that of a search" in capsys.readouterr().err


def test_an_interrupted_search_goes_on_as_if_it_had_not_been(digits, tmp_path, monkeypatch):
    recipe = read_recipe("digits-vqa-das-search", [*SEARCH, "training.micro_batch=4"])
    whole = search(recipe, digits, tmp_path / "whole", progress=False)
    ends = []

    def interrupted(*_, **__):
        ends.append(True)
        if len(ends) == 10:
            raise KeyboardInterrupt

    monkeypatch.setattr(StepClock, "on_step_end", interrupted)
    with pytest.raises(KeyboardInterrupt):
        search(recipe, digits, tmp_path / "search", progress=False)
    monkeypatch.undo()
    assert search(recipe, digits, tmp_path / "search", progress=False) == whole
    found, expected = (json.loads((tmp_path / name / "search.json").read_text()) for name in ("search", "whole"))
    assert found == expected and len(found["history"]) > 3


def test_where_a_prompt_enters_is_searched(digits, random_models, tmp_path):
    settings = [f"model.name={random_models / 'bert'}", f"model.vision_model={random_models / 'clip'}"]
    recipe = read_recipe(
        "bert-vqa-dvp-adapters", [*settings, *FILES, *SEARCH, "training.micro_batch=2", "search.warmup_epochs=null"]
    )
    found = search(recipe, digits, tmp_path / "search", progress=False)
    assert found.keys() == {"method.insert_layer"} and found["method.insert_layer"] in (0, 1)
    settings += [*FILES, "training.precision=fp32", f"method.insert_layer={found['method.insert_layer']}"]
    small = ["training.epochs=null", "training.steps=2", "training.batch_size=4", "training.micro_batch=2"]
    recipe = read_recipe("bert-vqa-dvp-adapters", [*settings, *small, "training.log_every=1"])
    run = train(recipe, digits, tmp_path / "run", progress=False)
    assert evaluate(run.folder, digits, progress=False)["test"]["samples"] == 80


# The digits in place of the official files of VQA.
FILES = (
    "data={train: [{questions: digits_train_questions.json, annotations: digits_train_annotations.json, images: train, "
    'image_name: "digits_train_{image_id:012d}.png"}], held_out: 30, test: [{questions: digits_test_questions.json, '
    'annotations: digits_test_annotations.json, images: test, image_name: "digits_test_{image_id:012d}.png"}], '
    "answers: {files: [digits_train_annotations.json]}}",
    "training.precision=fp32",
)


@pytest.mark.parametrize("method", ["apt", "das", "lora", "full"])
def test_meter_trains(method, digits, random_models, tmp_path):
    model = f"model={{family: meter, name: {random_models / 'meter'}, image_size: 32}}"
    small = ["training.epochs=null", "training.steps=2", "training.batch_size=4", "training.micro_batch=2"]
    recipe = read_recipe(f"meter-vqa-{method}", [model, *FILES, *small, "training.log_every=1", "search=null"])
    run = train(recipe, digits, tmp_path / "run", progress=False)
    assert evaluate(run.folder, digits, progress=False)["test"]["samples"] == 80


def test_nlvr2_of_meter_and_vilt_begins_with_the_first_image_s_type(digits, random_models):
    meter = f"model={{family: meter, name: {random_models / 'meter'}, image_size: 32}}"
    for settings, name in (([meter], "meter"), ([], "vilt")):
        keep = ["keep=[classifier]"]
        model = Experiment.of(
            read_recipe("digits-nlvr2-apt", [*settings, *keep, "training.rates={}"]), digits
        ).prepared.model
        types = {"meter": lambda m: m.meter, "vilt": lambda m: m.vilt.embeddings}[name](model).token_type_embeddings
        assert len(types.weight) == 3 and torch.equal(types.weight[1], types.weight[2])
        assert not torch.equal(types.weight[0], types.weight[1])
