"""Recipes of image folders: shots, held-out images, predictions, and every method on an image encoder."""

import json
import shutil
from collections import Counter

import pytest
from small_recipes import small_recipe

from petl_ext.demo.digits.images import CLASSES
from petl_ext.recipes.data import Splits
from petl_ext.recipes.evaluating import evaluate
from petl_ext.recipes.searching import search
from petl_ext.recipes.training import train

NAME = "digits-images-apt"


def test_shots_are_of_every_class_and_follow_their_seed(digits):
    drawn = []
    for seed in (0, 0, 1):
        splits = Splits(small_recipe(NAME, "data.train.0.shots=3", f"data.train.0.seed={seed}"), digits)
        assert Counter(image.class_name for image in splits.train.images) == dict.fromkeys(CLASSES, 3)
        assert splits.vocabulary.answers == tuple(sorted(CLASSES)) and splits.num_labels == 10
        drawn.append([image.path for image in splits.train.images])
    assert drawn[0] == drawn[1] != drawn[2]


def test_held_out_images_are_not_trained_on_and_keep_their_pixels(digits):
    whole = Splits(small_recipe(NAME), digits).train
    expected = {image.path: whole[index]["pixel_values"] for index, image in enumerate(whole.images)}
    splits = Splits(small_recipe(NAME, "data.validation=[]", "data.held_out=30"), digits)
    parts = (splits.train, splits.validation)
    paths = [{image.path for image in part.images} for part in parts]
    assert len(paths[1]) == 30 and not paths[0] & paths[1] and paths[0] | paths[1] == expected.keys()
    for part in parts:
        for index, image in enumerate(part.images):
            item = part[index]
            assert item["pixel_values"].equal(expected[image.path])
            assert splits.vocabulary.answers[item["labels"]] == image.class_name


@pytest.mark.parametrize("method", ["classifier", "adapter", "das", "lora"])
def test_every_method_trains_and_is_measured(method, digits, tmp_path):
    settings = ["training.steps=20", "training.evaluate_every=20", "training.checkpoint_every=null"]
    run = train(small_recipe(f"digits-images-{method}", *settings), digits, tmp_path / "run", progress=False)
    costs = run.training()
    assert (costs["new_parameters"] == 0) == (method == "classifier")
    (before,) = (entry["eval_accuracy"] for entry in costs["log"] if "eval_accuracy" in entry)
    (after,) = evaluate(run.folder, digits, "validation", progress=False).values()
    assert after["accuracy"] == pytest.approx(before) and set(CLASSES) <= after.keys() and after["samples"] == 300
    written = run.results("validation") / "image_classification_predictions.json"
    predicted = json.loads(written.read_text())
    right = sum(f"/{name}/" in path for path, name in predicted.items())
    assert len(predicted) == 300 and right / 300 == pytest.approx(after["accuracy"])


def test_a_search_skips_one_of_the_three_layers(digits, tmp_path):
    settings = ["search.training={steps: 4, evaluate_every: null, checkpoint_every: null}"]
    settings.append("search.constants={interval: 2, warmup_steps: 2, search_steps: 4}")
    found = search(small_recipe("digits-images-das-search", *settings), digits, tmp_path / "run", progress=False)
    assert len(found["method.skip"]) == 1 and set(found["method.skip"]) <= {0, 1, 2}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["model.checkpoint=x.ckpt"], r"model\.checkpoint must be null for the family image, got x\.ckpt"),
        (["model.image_size=384"], r"model\.image_size must be null for the family image, got 384"),
        (["data.train.0.shots=0"], "shots must be at least 1, got 0"),
        (["data.train.0.images=none"], "none must be a folder of one folder per class, got no such folder"),
        (["data.answers.min_count=100000"], "must be of one of the 0 classes"),
        (["data.train.0.shot=3"], "shot"),
        (["task=vqa"], "task must be one of"),
    ],
)
def test_what_is_wrong_is_told_before_anything_is_written(settings, message, digits, tmp_path):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        train(small_recipe(NAME, *settings), digits, tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()


def test_an_image_that_cannot_be_decoded_is_named(digits, tmp_path):
    folder = tmp_path / "digits_train_images"
    shutil.copytree(digits / folder.name, folder)
    broken = next((folder / "seven").iterdir())
    broken.write_bytes(b"no image")
    splits = Splits(small_recipe(NAME, "data.train.0.shots=null", "data.validation=[]"), tmp_path)
    shutil.copytree(digits / "clip", tmp_path / "clip")
    with pytest.raises(ValueError, match=rf"{broken.name} must be an image \(class 'seven'\).*\(1 of 1197 images"):
        splits.check_images(progress=False)
