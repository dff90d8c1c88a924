"""Trainings of recipes: every task, after a kill, on a full disk, and what a folder may hold."""

import json
import signal
import subprocess
import sys
import time

import pytest
import torch
from small_recipes import assert_same_training, losses_of, small_recipe, tensors_of

from petl_ext.recipes import training
from petl_ext.recipes.evaluating import evaluate
from petl_ext.recipes.runs import open_run
from petl_ext.recipes.training import parameter_groups, train
from petl_ext.tasks import vqa

# In a process of its own, killed where {where} is called for the {call}th time.
KILLED = """
import os, signal, sys
from transformers import Trainer
from petl_ext.recipes import training
from small_recipes import small_recipe
calls, target = 0, {where}
before = getattr(target, {name!r})
def killing(*arguments, **named):
    global calls
    calls += 1
    if calls == {call}:
        os.kill(os.getpid(), signal.SIGKILL)
    return before(*arguments, **named)
setattr(target, {name!r}, killing)
training.train(small_recipe(*sys.argv[3:]), sys.argv[1], sys.argv[2], progress=False)
"""
STEP = ("training.StepClock", "on_step_end")
SAVING = ("Trainer", "_save_optimizer_and_scheduler")  # when the model is already there
# Retrieval draws other captions in each epoch, which it is told; here a kill comes inside the second one.
RESUMED = {
    "digits-nlvr2-apt": ["training.steps=7"],
    "digits-retrieval-apt": [
        *("data.train.0.splits=[val]", "data.train.0.negatives=1"),
        *("training.steps=8", "training.batch_size=50", "training.micro_batch=25"),
    ],
}


def train_killed(digits, output, where, call, name, *settings):
    code = KILLED.format(where=where[0], name=where[1], call=call)
    command = [sys.executable, "-c", code, str(digits), str(output), name, *settings]
    path = ":".join(path for path in sys.path if path)
    killed = subprocess.run(command, env={"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr


@pytest.mark.parametrize("name", ["vqa", "gqa", "snli-ve", "nlvr2", "retrieval", "scienceqa", "images"])
def test_every_task_trains_and_is_measured(name, digits, tmp_path):
    settings = ["training.steps=2", "training.batch_size=4"]
    run = train(small_recipe(f"digits-{name}-apt", *settings), digits, tmp_path / "run", progress=False)
    assert not run.checkpoints.exists() and set(losses_of(run)) == {1, 2}
    before = tensors_of(run)
    (metrics,) = evaluate(run.folder, digits, "validation", progress=False).values()
    assert metrics["samples"] > 0 and metrics["inference_seconds"] > 0
    assert metrics == json.loads((run.results("validation") / "metrics.json").read_text())
    assert all(torch.equal(before[key], tensor) for key, tensor in tensors_of(run).items())


@pytest.mark.parametrize("method", ["classifier", "adapter", "das", "lora"])
def test_every_method_trains_and_is_measured_as_it_was(method, digits, tmp_path):
    settings = ["training.steps=20", "training.evaluate_every=20", "training.checkpoint_every=null"]
    run = train(small_recipe(f"digits-vqa-{method}", *settings), digits, tmp_path / "run", progress=False)
    costs = run.training()
    assert (costs["new_parameters"] == 0) == (method == "classifier")
    assert costs["trained_parameters"] < costs["all_parameters"]
    (before,) = (entry["eval_vqa_score"] for entry in run.training()["log"] if "eval_vqa_score" in entry)
    after = evaluate(run.folder, digits, "validation", progress=False)["validation"]
    assert after["accuracy"] == pytest.approx(before) and after["samples"] == 80 and before > 0


@pytest.mark.parametrize(
    ("name", "where", "call", "last"),
    [("digits-nlvr2-apt", STEP, 5, 4), ("digits-nlvr2-apt", SAVING, 2, 2), ("digits-retrieval-apt", STEP, 7, 6)],
    ids=["in a step", "in a checkpoint", "in a later epoch"],
)
def test_a_killed_training_goes_on_as_if_it_had_not_been(name, where, call, last, digits, tmp_path, capsys):
    whole = train(small_recipe(name, *RESUMED[name]), digits, tmp_path / "whole", progress=False)
    train_killed(digits, tmp_path / "run", where, call, name, *RESUMED[name])
    newest = max(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert (newest == f"checkpoint-{last}") == (where is STEP)
    run = train(small_recipe(name, *RESUMED[name]), digits, tmp_path / "run", progress=False)
    assert f"goes on from {run.checkpoints / f'checkpoint-{last}'}\n" in capsys.readouterr().err
    assert_same_training(run, whole)


def test_a_full_disk_leaves_a_checkpoint_to_go_on_from(digits, tmp_path, monkeypatch):
    recipe = small_recipe("digits-vqa-apt")
    whole = train(recipe, digits, tmp_path / "whole", progress=False)
    written, save = [], torch.save

    def full(what, path, *arguments, **named):
        written.append(path)
        if len(written) > 4:  # of the second checkpoint
            raise OSError(28, "No space left on device")
        save(what, path, *arguments, **named)

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="No space left on device"):
        train(recipe, digits, tmp_path / "run", progress=False)
    monkeypatch.undo()
    assert (tmp_path / "run" / "checkpoints" / "checkpoint-4").exists()
    assert open_run(tmp_path / "run").checkpoint.name == "checkpoint-2"
    assert_same_training(train(recipe, digits, tmp_path / "run", progress=False), whole)


def test_another_run_is_not_overwritten(digits, tmp_path):
    output = tmp_path / "run"
    train(small_recipe("digits-vqa-apt", "training.steps=1"), digits, output, progress=False)
    with pytest.raises(ValueError, match="holds this run, finished; --overwrite deletes it"):
        train(small_recipe("digits-vqa-apt", "training.steps=1"), digits, output, progress=False)
    other = small_recipe("digits-vqa-apt", "training.steps=1", "training.seed=1")
    with pytest.raises(ValueError, match=r"holds another run: its training\.seed must be 1, got 0 \(1 keys differ\)"):
        train(other, digits, output, progress=False)
    before = losses_of(open_run(output))
    assert losses_of(train(other, digits, output, overwrite=True, progress=False)) != before


@pytest.mark.parametrize("overwrite", [False, True])
def test_other_files_are_never_deleted(overwrite, digits, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="must be a new folder or that of a run"):
        train(small_recipe("digits-vqa-apt"), digits, tmp_path, overwrite, progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            ["training.batch_size=6"],
            "training.batch_size must be a multiple of 4, 4 samples in each of 1 processes, got 6",
        ),
        (["training.rates={clasifier: 1e-3}"], "training.rates must be in names of what trains, got clasifier"),
        (["data.train.0.questions=no.json"], "no.json"),
        (["data.train=[{images: train}]"], "must have the key 'questions', got {'images': 'train'}"),
        (["training.evaluate_every=2", "data.validation=[]"], "must be given with training.evaluate_every"),
    ],
)
def test_what_is_wrong_is_told_before_anything_is_written(settings, message, digits, tmp_path):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        train(small_recipe("digits-vqa-apt", *settings), digits, tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU has it")
def test_half_precision_needs_a_gpu(digits, tmp_path):
    with pytest.raises(ValueError, match=r"training\.precision must be fp32 or bf16 without a GPU, got fp16"):
        train(small_recipe("digits-vqa-apt", "training.precision=fp16"), digits, tmp_path / "run", progress=False)


def test_a_step_that_waits_for_its_data_says_so(digits, tmp_path, monkeypatch):
    quick = train(small_recipe("digits-vqa-apt"), digits, tmp_path / "quick", progress=False).training()
    read = vqa.VQADataset.__getitem__

    def slowly(dataset, index):
        time.sleep(0.05)
        return read(dataset, index)

    monkeypatch.setattr(vqa.VQADataset, "__getitem__", slowly)
    slow = train(small_recipe("digits-vqa-apt"), digits, tmp_path / "slow", progress=False).training()
    assert slow["wait_seconds"] >= 0.05 * 8 and quick["wait_seconds"] > 0


def test_accumulated_batches_train_as_one(digits, tmp_path):
    accumulated = train(small_recipe("digits-vqa-apt"), digits, tmp_path / "accumulated", progress=False)
    at_once = small_recipe("digits-vqa-apt", "training.micro_batch=8")
    expected = losses_of(train(at_once, digits, tmp_path / "at-once", progress=False))
    assert losses_of(accumulated) == pytest.approx(expected, rel=1e-4)


def test_mixed_precision_and_checkpointing_train(digits, tmp_path):
    settings = ["training.steps=2", "training.precision=bf16", "training.gradient_checkpointing=true"]
    low = train(small_recipe("digits-vqa-apt", *settings), digits, tmp_path / "low", progress=False)
    full = train(small_recipe("digits-vqa-apt", settings[0]), digits, tmp_path / "full", progress=False)
    assert losses_of(low) != losses_of(full)
    assert losses_of(low) == pytest.approx(losses_of(full), rel=0.05)


def test_the_best_checkpoint_is_kept_and_training_stops_early(digits, tmp_path):
    settings = ["training.steps=40", "training.evaluate_every=2", "training.patience=2", "training.learning_rate=0.0"]
    settings += ["training.rates={}", "training.weight_decay=0.0"]  # so that nothing gets better
    run = train(small_recipe("digits-vqa-apt", *settings), digits, tmp_path / "run", progress=False)
    scores = {entry["step"]: entry["eval_vqa_score"] for entry in run.training()["log"] if "eval_vqa_score" in entry}
    assert list(scores) == [2, 4, 6] and run.training()["best_step"] == 2
    (metrics,) = evaluate(run.folder, digits, "validation", progress=False).values()
    assert metrics["accuracy"] == pytest.approx(scores[2])


def test_groups_have_rates_and_decays(digits):
    recipe = small_recipe("digits-vqa-apt")
    model = training.Experiment.of(recipe, digits).prepared.model
    groups = {
        (group["lr"], group["weight_decay"]): group["params"] for group in parameter_groups(model, recipe.training)
    }
    sizes = {key: sum(parameter.numel() for parameter in found) for key, found in groups.items()}
    head = {name: p for name, p in model.named_parameters() if name.startswith("classifier")}
    # The LayerNorm in the head is called classifier.1, and decays, as in the authors' code.
    assert sizes[5e-3, 0.01] == sum(p.numel() for name, p in head.items() if name.endswith("weight"))
    assert sizes[5e-3, 0.0] == sum(p.numel() for name, p in head.items() if name.endswith("bias"))
    assert sizes[4e-3, 0.01] == 4 * (50 * 128 + 2 * 4 * 128 + 1)
    assert sum(sizes.values()) == sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_held_out_images_are_not_trained_on(digits):
    recipe = small_recipe("digits-vqa-apt", "data.validation=[]", "data.held_out=20")
    splits = training.Experiment.of(recipe, digits).splits
    trained, held = ({entry.image_id for entry in data.entries} for data in (splits.train, splits.validation))
    assert len(held) == 20 and len(trained) == 140 and not trained & held
    assert [one.question_id for one in splits.train.annotations] == [one.question_id for one in splits.train.questions]
    assert len(splits.train) + len(splits.validation) == 320
