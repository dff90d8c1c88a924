"""Depth searches of a small stack of layers, and losses for them."""

import random

from searched_models import attached

from petl_ext import DepthSearch
from petl_ext.attaching import LayerCosts


def make_search(num_skip=2, model=None, **arguments):
    return DepthSearch(attached()[0] if model is None else model, num_skip, **arguments)


def costs_that_save(*savings, backbone=10):
    return LayerCosts(backbone, backbone, {f"layers.{index}": [saved, 0] for index, saved in enumerate(savings)})


def losses_of(search, seed=0):
    """A compute_loss that depends on the skipped layers and on how often it has been called."""
    generator = random.Random(seed)
    return lambda: 0.1 + 0.2 * sum(search.attachment.skipped) + generator.random()


def run_search(search, steps, compute_loss):
    drawn = []
    for _ in range(steps):
        drawn.append(search.sample())
        if search.is_due:
            search.update(compute_loss)
    return drawn
