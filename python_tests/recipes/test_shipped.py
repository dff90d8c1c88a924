"""The recipes that come with petl_ext: complete, alike where they should be, and as large as published."""

import functools

import original_checkpoints as originals
import pytest
import tiny_meter
import tiny_vilt
import torch
from checkpoint_checks import assert_equal
from transformers import ViltConfig

from petl_ext.demo.digits import gqa, nlvr2, retrieval, scienceqa, snli_ve
from petl_ext.models import MeterConfig, MeterForImageAndTextRetrieval, ViltForImageAndTextRetrieval
from petl_ext.recipes.comparing import PUBLISHED
from petl_ext.recipes.data import SPLITS, Splits
from petl_ext.recipes.methods import prepare
from petl_ext.recipes.models import FAMILIES
from petl_ext.recipes.reading import read_document
from petl_ext.recipes.recipe import SHIPPED, Model, parsed, read_recipe, shipped

PAPERS = [name for name in shipped() if not name.startswith("digits-")]
read = functools.cache(read_recipe)


@pytest.mark.parametrize("name", shipped())
def test_a_shipped_recipe_is_complete(name, tmp_path):
    recipe = read(name)
    (tmp_path / "again.yaml").write_text(recipe.as_yaml(), encoding="utf-8")
    assert parsed(read_document(tmp_path / "again.yaml")) == recipe
    if recipe.published is not None:
        assert read_document(PUBLISHED).values[recipe.published.table]["rows"][recipe.published.row]
    if recipe.search is not None:
        assert recipe.for_search().training.batch_size >= recipe.training.micro_batch


def named(models, tasks, methods):
    return {f"{model}-{task}-{method}" for model in models for task in tasks for method in methods}


def test_the_papers_methods_models_and_tasks():
    methods = ("apt", "adapter", "parallel-adapter", "lora", "classifier", "full", "das")
    expected = named(("vilt", "meter"), ("vqa", "nlvr2", "flickr30k"), methods)
    expected |= named(("vilt",), ("vqa", "nlvr2", "flickr30k"), ("deep-prompts",))
    expected |= named(("bert", "t5", "llama"), ("vqa", "gqa", "snli-ve"), ("dvp-adapters",))
    assert expected | named(("bert", "t5"), ("vqa", "gqa", "snli-ve"), ("dvp",)) == set(PAPERS)


def test_digits_have_all_tasks():
    tasks = ("vqa", "gqa", "snli-ve", "nlvr2", "retrieval", "scienceqa", "images")
    methods = ("apt", "adapter", "das", "das-search", "lora", "classifier")
    assert named(("digits",), tasks, methods) == set(shipped()) - set(PAPERS)


@pytest.mark.parametrize("name", [name for name in PAPERS if read(name).published])
def test_a_published_row_is_of_the_same_experiment(name):
    recipe, apt = read(name), read(f"{'-'.join(name.split('-')[:2])}-apt")
    assert (recipe.model, recipe.data, recipe.keep) == (apt.model, apt.data, apt.keep)
    if recipe.label != "full tuning":
        assert recipe.training == apt.training
    assert SHIPPED.joinpath(f"{name}.yaml").stat().st_size < 3000


def empty_model(family):
    """For VQA, of published size, its weights never written."""
    config = {"vilt": ViltConfig, "meter": MeterConfig}[family](num_labels=3129)
    with torch.device("meta"):
        made = FAMILIES[family].tasks["vqa"](config)
    return made.to_empty(device="cpu")


@pytest.mark.parametrize(
    "name", [name for name in PAPERS if "-vqa-" in name and read(name).published and not name.endswith("-full")]
)
def test_new_parameters_are_those_of_the_published_table(name):
    recipe = read(name)
    row = read_document(PUBLISHED).values[recipe.published.table]["rows"][recipe.published.row]
    model = empty_model(recipe.model.family)
    found = prepare(model, recipe.method, recipe.keep).new_parameters(recipe.keep)
    if getattr(recipe.method, "class_token", False):
        found -= model.config.hidden_size  # which the table does not count
    assert (f"{found / 1e6:.2f}M" if found else "0") == row["parameters"]


@pytest.mark.parametrize("task", ["vqa", "gqa", "snli-ve", "nlvr2", "retrieval", "scienceqa"])
def test_digits_are_read_without_unknown_words(task, digits):
    splits = Splits(read(f"digits-{task}-apt"), digits)
    tokenizer = splits.processor.tokenizer
    for split in SPLITS:
        (data,) = splits.parts(split)
        texts = [splits.collator([data[index]])["input_ids"] for index in range(0, len(data), 7)]
        ids = {token for text in texts for token in text.flatten().tolist()}
        assert tokenizer.unk_token_id not in ids and len(ids) > 10


def test_words_of_all_formats_are_known_once(digits):
    tokenizer = Splits(read("digits-vqa-apt"), digits).processor.tokenizer
    words = {word for module in (gqa, nlvr2, retrieval, scienceqa, snli_ve) for word in module.WORDS}
    assert words <= tokenizer.get_vocab().keys()


@pytest.mark.parametrize(
    ("family", "tiny", "model_class", "checkpoint"),
    [
        ("vilt", tiny_vilt, ViltForImageAndTextRetrieval, originals.vilt_checkpoint),
        ("meter", tiny_meter, MeterForImageAndTextRetrieval, originals.meter_checkpoint),
    ],
    ids=["vilt", "meter"],
)
def test_the_authors_files_are_where_a_model_begins(family, tiny, model_class, checkpoint, tmp_path):
    trained = tiny.make_model(model_class, seed=1)
    trained.config.save_pretrained(tmp_path / "sizes")
    torch.save(originals.lightning(checkpoint(trained, "rank_output")), tmp_path / "authors.ckpt")
    given = Model(family, name=str(tmp_path / "sizes"), checkpoint="{data}/authors.ckpt").below(tmp_path)
    made = FAMILIES[family].make(given, FAMILIES[family].tasks["retrieval"], 0, None, False)
    assert_equal(made, trained)
