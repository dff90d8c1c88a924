"""Recipes of digits that train in a second."""

import torch

from petl_ext.recipes.recipe import read_recipe

SMALL = (
    "training.steps=6",
    "training.batch_size=8",
    "training.micro_batch=4",
    "training.checkpoint_every=2",
    "training.evaluate_every=null",
    "training.log_every=1",
)


def small_recipe(name, *settings):
    """A shipped recipe with few steps, each logged, and two micro-batches for a step."""
    return read_recipe(name, [*SMALL, *settings])


def losses_of(run):
    """{step: loss} of a finished run."""
    return {entry["step"]: entry["loss"] for entry in run.training()["log"] if "loss" in entry}


def tensors_of(run):
    """What a finished run has trained by `petl_ext.attach`."""
    from safetensors.torch import load_file

    return load_file(run.trained / "petl_weights.safetensors")


def assert_same_training(run, other):
    assert losses_of(run) == losses_of(other)
    ours, theirs = tensors_of(run), tensors_of(other)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
