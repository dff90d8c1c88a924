"""The commands of docs/recipes.md, as they stand, with few steps."""

import re
import shlex
import shutil
from pathlib import Path

import pytest

from petl_ext.cli import _parser, _with_recipe, main
from petl_ext.recipes.recipe import read_recipe
from petl_ext.recipes.training import train

PAGE = (Path(__file__).parents[2] / "docs" / "recipes.md").read_text(encoding="utf-8")


def commands(text):
    """Of petl-ext, in blocks of a page, without their comments."""
    for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if "petl_ext" in words:
                words = words[words.index("petl_ext") :]
            if words:
                yield words[1:]


def test_the_first_commands_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for words in commands(PAGE.partition("## A paper's experiment")[0]):
        few = ["--set", "training.steps=2", "--set", "training.evaluate_every=null"] if words[0] == "train" else []
        main([*words, *few, *([] if words[0] == "compare" else ["--no-progress"])])
    assert "| classifier only | vilt backbone | 0 |" in capsys.readouterr().out
    assert {path.name for path in Path("table").iterdir()} == {"table.md", "table.png"}


@pytest.mark.parametrize("words", list(commands(PAGE)), ids=" ".join)
def test_every_command_is_one(words):
    options = _parser().parse_args(_with_recipe(words))
    if hasattr(options, "recipe") and not options.recipe.endswith(".yaml"):
        read_recipe(options.recipe, options.settings)


def test_the_recipe_of_own_images_runs(digits, tmp_path):
    (text,) = (block for block in re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL) if "family: image" in block)
    (tmp_path / "own.yaml").write_text(text)
    for split in ("train", "val", "test"):
        shutil.copytree(digits / f"digits_{split}_images", tmp_path / split)
    shutil.copytree(digits / "clip", tmp_path / "clip")
    settings = ["model.name='{data}/clip'", "training.epochs=null", "training.steps=1", "data.workers=0"]
    run = train(read_recipe(tmp_path / "own.yaml", settings), tmp_path, tmp_path / "run", progress=False)
    assert run.training()["new_parameters"] > 0


def test_recipes_and_settings_that_the_page_names_are_there():
    for like in re.findall(r"^like: (\S+)$|`petl-ext recipes (\S+)`", PAGE, re.MULTILINE):
        read_recipe("".join(like))
    read_recipe("vilt-vqa-apt", ["training.seed=1", "method={name: adapter, bottleneck: 48}"])
    read_recipe("vilt-flickr30k-apt", ["data.train.0.own_captions=true"])
