"""The command line of recipes: `petl-ext recipes`, `train`, `search`, `eval` and `compare`.

What needs more than Python is imported when a command runs.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

PACKAGES = {
    "transformers": "transformers",
    "accelerate": "accelerate",
    "safetensors": "safetensors",
    "yaml": "PyYAML",
    "PIL": "Pillow",
    "tqdm": "tqdm",
}
PICTURE_PACKAGES = {**PACKAGES, "matplotlib": "matplotlib"}
GOES_ON = "; the same command goes on from the last checkpoint"


def add_commands(commands: Any) -> None:
    """Adds the parsers of `recipes`, `train`, `eval` and `compare` to those of a command line."""
    recipes = commands.add_parser("recipes", help="list the recipes, or show one, complete")
    recipes.add_argument("recipe", nargs="?", help="to show")
    _add_settings(recipes)
    recipes.set_defaults(run=_list, packages=PACKAGES)
    training = commands.add_parser("train", help="train what a recipe says, on the official files of its task")
    _add_recipe(training)
    training.add_argument("--dry-run", action="store_true", help="only tell parameters, MACs, steps and memory")
    training.set_defaults(run=_train, packages=PACKAGES, after_interrupt=GOES_ON)
    measuring = commands.add_parser("eval", help="measure a finished run and write the task's official file")
    measuring.add_argument("folder", metavar="RUN")
    measuring.add_argument("--data", required=True, metavar="DIR", help="folder of the official files")
    measuring.add_argument("--split", default="test", choices=["validation", "test"], help="default: %(default)s")
    measuring.add_argument("--no-progress", action="store_true", help="without progress bars")
    measuring.set_defaults(run=_evaluate, packages=PACKAGES)
    comparing = commands.add_parser("compare", help="one table of runs, beside the published rows")
    comparing.add_argument("folders", metavar="RUN", nargs="+")
    comparing.add_argument("--split", default="test", choices=["validation", "test"], help="default: %(default)s")
    comparing.add_argument("--output", metavar="DIR", help="also write table.md and table.png there")
    comparing.set_defaults(run=_compare, packages=PICTURE_PACKAGES)


def add_search(searches: Any) -> None:
    """Adds the search of a recipe to the parsers of the searches."""
    summary = "what the method of a recipe needs: layers to skip, or where a prompt enters"
    parser = searches.add_parser("recipe", help=summary, description=f"Finds {summary}. Prints one line of JSON.")
    _add_recipe(parser)
    parser.set_defaults(run=_search, packages=PICTURE_PACKAGES, after_interrupt=GOES_ON)


def _add_recipe(parser):
    parser.add_argument("recipe", help="a YAML file, or a name that `petl-ext recipes` lists")
    parser.add_argument("--data", required=True, metavar="DIR", help="folder of the official files")
    parser.add_argument("--output", metavar="DIR", help="folder of the run (default: runs/RECIPE)")
    parser.add_argument("--model", metavar="NAME", help="instead of the recipe's: on the hub, or a folder")
    parser.add_argument("--check-images", action="store_true", help="first decode all images, which takes a while")
    parser.add_argument("--overwrite", action="store_true", help="delete the run that the folder holds")
    parser.add_argument("--no-progress", action="store_true", help="without progress bars")
    _add_settings(parser)


def _add_settings(parser):
    parser.add_argument(
        "--set",
        dest="settings",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="another value, in YAML: --set training.seed=1; may come several times",
    )


def _refusing(run):
    """What is wrong with what the user gave is one line."""

    def command(options):
        try:
            run(options)
        except (ValueError, OSError) as error:
            print(f"petl-ext: {error}", file=sys.stderr)
            raise SystemExit(2) from error

    return command


def _recipe(options):
    from petl_ext.recipes.recipe import read_recipe

    model = getattr(options, "model", None)
    return read_recipe(options.recipe, [*options.settings, *([] if model is None else [f"model.name={model}"])])


def _check_images(recipe, options):
    """By each process, or one that waits would wait for one that has ended."""
    from petl_ext.recipes.data import Splits

    if options.check_images:
        Splits(recipe, Path(options.data)).check_images(_shows(options))


def _output(options):
    return Path(options.output or Path("runs") / Path(options.recipe).stem)


def _is_first():
    """Whether this is the only process, or the first that torchrun or accelerate has launched."""
    return os.environ.get("RANK", "0") == "0"


def _print(text):
    if _is_first():
        print(text)


@_refusing
def _list(options):
    from petl_ext.recipes.recipe import read_recipe, shipped

    if options.recipe is None:
        lines = [(name, read_recipe(name)) for name in shipped()]
        print("\n".join(f"{name:32} {recipe.label}" for name, recipe in lines))
    else:
        print(_recipe(options).as_yaml(), end="")


@_refusing
def _train(options):
    _quiet()
    recipe = _recipe(options)
    _check_images(recipe, options)
    if options.dry_run:
        from petl_ext.recipes.planning import plan

        _print(plan(recipe, options.data))
        return
    from petl_ext.recipes.training import train

    run = train(recipe, options.data, _output(options), options.overwrite, _shows(options))
    _print(f"trained: {run.folder}; petl-ext eval {run.folder} --data {options.data} measures it")


@_refusing
def _search(options):
    _quiet()
    from petl_ext.recipes.searching import search

    recipe = _recipe(options)
    _check_images(recipe, options)
    found = search(recipe, options.data, _output(options), options.overwrite, _shows(options))
    _print(json.dumps(found))


@_refusing
def _evaluate(options):
    _quiet()
    from petl_ext.recipes.evaluating import evaluate

    for name, metrics in evaluate(options.folder, options.data, options.split, _shows(options)).items():
        _print("\n".join([f"{name}:", *(f"  {metric} {value:.4f}" for metric, value in metrics.items())]))


@_refusing
def _compare(options):
    from petl_ext.recipes.comparing import compare

    comparison = compare(options.folders, options.split)
    if options.output is not None:
        comparison.save(options.output)
    print(comparison.markdown(), end="")


def _shows(options):
    return not options.no_progress and _is_first()


def _quiet():
    """That heads are new, and which weights of a checkpoint are left out, needs no table."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
