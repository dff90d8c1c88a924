"""Trains the recipes of handwritten digits, and writes one table of them.

    python bench/recipes_digits.py                                  # all, with three seeds: one to two hours of a core
    python bench/recipes_digits.py --tasks vqa nlvr2 --seeds 0      # some

Writes table.md and table.png to bench/results/recipes. What --output holds already is not trained again, and what was
interrupted goes on.
"""

import argparse
import time
from pathlib import Path

import torch
from transformers.utils import logging

from petl_ext.demo.digits.for_recipes import write_for_recipes
from petl_ext.recipes.comparing import compare
from petl_ext.recipes.evaluating import evaluate
from petl_ext.recipes.recipe import read_recipe
from petl_ext.recipes.runs import open_run
from petl_ext.recipes.searching import search
from petl_ext.recipes.training import train

RESULTS = Path(__file__).parent / "results" / "recipes"
TASKS = ("vqa", "gqa", "snli-ve", "nlvr2", "scienceqa", "retrieval", "images")
METHODS = ("classifier", "lora", "apt", "adapter", "das")
# Every caption meets every image: of 500 images that takes minutes, of the test split's 1000 four times as long.
SETTINGS = {"retrieval": ["data.test.0.splits=[val]", "data.validation=[]", "training.evaluate_every=null"]}


def run(task, method, seed, data, folder):
    """The folder of the run, trained and measured, for DAS after its search."""
    output = folder / f"{task}-{method}-seed{seed}"
    settings = [f"training.seed={seed}", *SETTINGS.get(task, [])]
    if method == "das":
        settings.append(f"method.skip={list(skipped(task, seed, data, folder))}")
    if not finished(output):
        train(read_recipe(f"digits-{task}-{method}", settings), data, output, progress=False)
    if not open_run(output).metrics("test"):
        evaluate(output, data, progress=False)
    return output


def skipped(task, seed, data, folder):
    """The layers that the search for this task found with this seed."""
    output = folder / f"{task}-das-search-seed{seed}"
    if not finished(output):
        recipe = read_recipe(f"digits-{task}-das-search", [f"training.seed={seed}"])
        search(recipe, data, output, progress=False)
    return open_run(output).training()["found"]["method.skip"]


def finished(output):
    return (output / "training.json").is_file()


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=TASKS)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--output", type=Path, default=Path("recipes_out"))
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)  # on matrices of this size several are slower
    data = options.output / "digits"
    if not data.exists():
        print(write_for_recipes(data), flush=True)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    folders = []
    for seed in options.seeds:
        for task in options.tasks:
            for method in options.methods:
                begun = time.perf_counter()
                folders.append(run(task, method, seed, data, options.output))
                metrics = open_run(folders[-1]).metrics("test")
                print(f"{folders[-1].name}: {metrics}, {time.perf_counter() - begun:.0f} s", flush=True)
    comparison = compare(folders)
    comparison.save(options.results)
    print(comparison.markdown())


if __name__ == "__main__":
    main()
