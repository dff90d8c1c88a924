"""The same command under torchrun: as one process, with the same batches."""

import json
import os
import re
import subprocess
import sys

import pytest
from small_recipes import SMALL, losses_of, small_recipe

from petl_ext.recipes.evaluating import evaluate
from petl_ext.recipes.recipe import read_recipe
from petl_ext.recipes.runs import open_run
from petl_ext.recipes.searching import search
from petl_ext.recipes.training import train

NAME = "digits-nlvr2-apt"
STEPS = "training.steps=4"


def torchrun(*arguments):
    """What two processes of petl-ext print."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "petl_ext"]
    paths = ":".join(path for path in sys.path if path)
    environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([*command, *map(str, arguments)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_two_processes_train_and_measure_as_one(digits, tmp_path):
    one = train(small_recipe(NAME, STEPS), digits, tmp_path / "one", progress=False)
    settings = [part for setting in (*SMALL, STEPS) for part in ("--set", setting)]
    printed = torchrun(*("train", NAME, "--data", digits, "--output", tmp_path / "two", "--no-progress"), *settings)
    assert printed.count("trained: ") == 1
    two = open_run(tmp_path / "two")
    assert two.training()["processes"] == 2
    assert losses_of(two) == pytest.approx(losses_of(one), rel=1e-4)
    # 38 samples of this split are no multiple of two processes' batches of 4.
    expected = evaluate(two.folder, digits, "validation", progress=False)["validation"]
    lines = (two.results("validation") / "nlvr2_predictions.csv").read_text()
    printed = torchrun("eval", two.folder, "--data", digits, "--split", "validation", "--no-progress")
    found = json.loads((two.results("validation") / "metrics.json").read_text())
    assert {**found, "inference_seconds": 0} == {**expected, "inference_seconds": 0}
    assert (two.results("validation") / "nlvr2_predictions.csv").read_text() == lines
    assert lines.count("\n") == found["samples"]
    assert re.findall(r"accuracy (\S+)", printed) == [f"{found['accuracy']:.4f}"]


def test_two_processes_search_as_one(digits, tmp_path):
    """Each step has one draw, and the validation batches of both processes together are those of the one."""
    settings = [
        *("training.steps=null", "training.epochs=1", "training.batch_size=8", "training.log_every=1"),
        "search.training={steps: 8, epochs: null, evaluate_every: null, checkpoint_every: null}",
        "search.constants={interval: 2, warmup_steps: 2, search_steps: 8}",
    ]
    recipe = read_recipe("digits-vqa-das-search", [*settings, "training.micro_batch=8"])
    one = search(recipe, digits, tmp_path / "one", progress=False)
    given = [part for setting in (*settings, "training.micro_batch=4") for part in ("--set", setting)]
    printed = torchrun(
        *("search", "digits-vqa-das-search", "--data", digits, "--output", tmp_path / "two", "--no-progress"), *given
    )
    assert json.loads(printed) == one
    histories = [json.loads((tmp_path / name / "search.json").read_text())["history"] for name in ("one", "two")]
    assert [update["subsets"] for update in histories[0]] == [update["subsets"] for update in histories[1]]
    for update, other in zip(*histories, strict=True):
        assert update["losses"] == pytest.approx(other["losses"], rel=1e-4)
