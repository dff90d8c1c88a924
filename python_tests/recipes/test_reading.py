"""Recipes as files: lines, nearest keys, settings, and recipes that begin as another."""

import pytest

from petl_ext.recipes.recipe import read_recipe, recipe_file

COMPLETE = """\
label: APT
task: snli_ve
model:
  family: vilt
  name: backbone
method: {name: apt, num_prompts: 5}
keep: [classifier]
data:
  train: [{pairs: train.jsonl, images: images}]
training:
  epochs: 1
  batch_size: 8
  micro_batch: 8
  learning_rate: 5e-4
"""


@pytest.fixture
def written(tmp_path):
    """Writes a recipe, with some of its text replaced."""

    def write(old="", new="", name="mine.yaml", text=COMPLETE):
        assert old in text
        (tmp_path / name).write_text(text.replace(old, new), encoding="utf-8")
        return tmp_path / name

    return write


def test_a_complete_recipe(written):
    recipe = read_recipe(written())
    assert (recipe.label, recipe.task, recipe.keep, recipe.method.num_prompts) == ("APT", "snli_ve", ("classifier",), 5)
    assert recipe.training.learning_rate == 5e-4 and recipe.training.epochs == 1.0 and recipe.search is None
    written(name="again.yaml", text=recipe.as_yaml())
    assert read_recipe(written(name="again.yaml", text=recipe.as_yaml())) == recipe


@pytest.mark.parametrize(
    ("old", "new", "line", "message"),
    [
        ("  learning_rate", "  lerning_rate", 14, "lerning_rate must be one of the keys .*, such as learning_rate"),
        ("num_prompts", "num_promts", 6, "method.num_promts must be one of the keys .*, such as num_prompts"),
        ("images: images", "imgs: images", 9, "data.train.0.imgs must be one of the keys .*, such as images"),
        ("task: snli_ve", "tusk: snli_ve", 2, "tusk must be one of the keys .*, such as task"),
        ("batch_size: 8", "batch_size: eight", 12, "training.batch_size must be an integer, got 'eight'"),
        ("batch_size: 8", "batch_size: true", 12, "training.batch_size must be an integer, got True"),
        ("5e-4", "-5e-4x", 14, "training.learning_rate must be a number, got '-5e-4x'"),
        ("[classifier]", "classifier", 7, "keep must be a list, got 'classifier'"),
        ("{name: apt, num_prompts: 5}", "{name: atp}", 6, "method.name must be one of .*, got 'atp'"),
        ("num_prompts: 5", "num_prompts: 0", 6, "method: .*num_prompts must be a positive integer, got 0"),
        ("epochs: 1", "epochs: 1\n  epochs: 2", 12, "a key must be a word that comes once, got 'epochs'"),
        ("  epochs: 1\n", "", 10, "training: epochs or steps must be given, got None and None"),
        ("  learning_rate: 5e-4\n", "", 10, "training must have the key 'learning_rate', got"),
        ("epochs: 1", "epochs: 1\n  checkpoint_every: 15", 10, "checkpoint_every must be a multiple of log_every=10"),
        ("family: vilt", "family: vit", 3, 'model: family must be "vilt", .*, got \'vit\''),
        ("apt, num_prompts: 5", "dvp", 1, "method must be another than dvp for a vilt, got dvp"),
        ("[{pairs", "{pairs", 9, "must be YAML, got"),
        ("snli_ve", "vqa", 9, "data.train.0.pairs must be one of the keys"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named_with_file_line_and_key(old, new, line, message, written):
    path = written(old, new)
    with pytest.raises(ValueError, match=message) as refusal:
        read_recipe(path)
    assert str(refusal.value).startswith(f"{path}: line {line}")


@pytest.mark.parametrize(
    ("text", "message"),
    [("", "must be YAML with keys"), ("- a", "must be YAML with keys"), ("\ufeffa: 1", "line 1 must be UTF-8 without")],
)
def test_no_recipe_at_all(text, message, written):
    with pytest.raises(ValueError, match=message):
        read_recipe(written(text=text))


def test_a_vocabulary_belongs_to_tasks_without_their_own(written):
    text = COMPLETE.replace("snli_ve", "gqa").replace("pairs", "questions")
    with pytest.raises(ValueError, match=r"data\.answers must be a section with files for gqa"):
        read_recipe(written(text=text))
    answers = "data:\n  answers: {files: [train.json]}"
    assert read_recipe(written("data:", answers, text=text)).data.answers.files == ("train.json",)
    with pytest.raises(ValueError, match=r"line 9: data\.answers must be null for snli_ve"):
        read_recipe(written("data:", answers))


def test_settings(written):
    given = ["training.learning_rate=1e-3", "method={name: adapter, kind: parallel}", "data.train.0.images=other"]
    das = read_recipe(written(), ["method={name: das, skip: [2, 1], sites: fusion}"]).method
    assert (das.skip, das.sites) == ((1, 2), ("fusion",))
    assert read_recipe(written(), ["method={name: das, sites: [a, b]}"]).method.sites == ("a", "b")
    recipe = read_recipe(written(), [*given, "training.rates.classifier=2", "model.image_size=32"])
    assert recipe.training.learning_rate == 1e-3 and recipe.method.kind == "parallel"
    assert recipe.data.train == ({"pairs": "train.jsonl", "images": "other"},)
    assert recipe.training.rates == {"classifier": 2.0} and recipe.model.image_size == 32


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("training.seed", "--set must be key=value, got 'training.seed'"),
        ("training.sed=1", "--set training.sed: training.sed must be one of the keys .*, such as seed, got 'sed'"),
        ("training.seed=a", "--set training.seed: training.seed must be an integer, got 'a'"),
        ("data.train.3.images=a", "--set data.train.3.images must lead to a value .*, got 3"),
        ("label.a=1", "--set label.a must lead to a value"),
        ("training={epochs: [}", "--set training must be YAML, got"),
    ],
)
def test_a_setting_is_named_when_it_is_wrong(setting, message, written):
    with pytest.raises(ValueError, match=message):
        read_recipe(written(), [setting])


def test_a_recipe_like_another(written):
    base = written()
    other = written(name="other.yaml", text="like: mine.yaml\nlabel: adapter\nmethod: {name: adapter}\n")
    recipe, first = read_recipe(other), read_recipe(base)
    assert recipe.label == "adapter" and recipe.method.kind == "sequential"
    assert (recipe.data, recipe.training, recipe.keep) == (first.data, first.training, first.keep)
    written("micro_batch", "micro_bach")
    with pytest.raises(ValueError, match=rf"{base}: line 13: training\.micro_bach must be"):
        read_recipe(other)
    written(name="mine.yaml", text="like: other.yaml\n")
    with pytest.raises(ValueError, match="like must be another recipe, at most 5 deep"):
        read_recipe(other)


def test_a_name_that_no_recipe_has():
    assert recipe_file("digits-vqa-apt").is_file()
    with pytest.raises(FileNotFoundError, match=r"such as digits-vqa-apt, .*, got digits-vqa-atp"):
        read_recipe("digits-vqa-atp")
