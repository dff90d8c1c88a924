"""Searches for the prompt's layer of a small model, and scores for them."""

import random

from searched_models import Placed

from petl_ext import PlacementSearch


def make_search(model=None, **arguments):
    return PlacementSearch(Placed() if model is None else model, **arguments)


def scores_of(search, seed=0):
    """A compute_score that depends on the layer and on how often it has been called."""
    generator = random.Random(seed)
    return lambda: 40 + 3 * search.model.insert_layer + 20 * generator.random()


def run_search(search, steps, compute_score):
    drawn = []
    for _ in range(steps):
        drawn.append(search.sample())
        assert search.model.insert_layer == drawn[-1]
        if search.is_due:
            search.update(compute_score)
    return drawn
