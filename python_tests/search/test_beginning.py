"""What a search may begin with, and that it does."""

import copy
import math

import depth_searches
import placement_searches
import pytest
import torch

from petl_ext.search import block_influence, one_by_one


def test_each_layer_is_skipped_alone_and_everything_is_as_it_was():
    search = depth_searches.make_search(num_skip=2)
    seen = []
    before, state = copy.deepcopy(search.state_dict()), torch.get_rng_state()

    def compute():
        seen.append(search.attachment.skipped)
        return 0.1 * sum(search.attachment.skipped) + torch.rand(()).item() * 0

    rewards = one_by_one(search, compute)
    assert seen == [(layer,) for layer in range(len(search.layers))]
    assert rewards == pytest.approx([math.exp(-0.1 * layer) for layer in range(len(search.layers))])
    assert search.state_dict() == before and torch.equal(torch.get_rng_state(), state)
    assert search.attachment.skipped == ()


def test_each_layer_is_scored_alone():
    search = placement_searches.make_search()
    assert one_by_one(search, lambda: 3.0 * search.model.insert_layer) == [3.0 * k for k in range(search.num_layers)]


def test_block_influence_is_the_cosine_of_what_goes_in_and_comes_out():
    search = depth_searches.make_search(num_skip=2)
    layers = [search.model.get_submodule(name) for name in search.layers]
    states, expected = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0)), []

    def compute():
        expected.clear()
        x = states
        with torch.no_grad():
            for layer in layers:
                y = layer(x)
                expected.append(torch.cosine_similarity(x, y, dim=-1).mean().item())
                x = y

    assert block_influence(search, compute) == pytest.approx(expected)
    assert not any(layer._forward_hooks for layer in layers)


def test_a_layer_that_does_not_run_is_named():
    search = depth_searches.make_search(num_skip=2)
    with pytest.raises(RuntimeError, match=r"compute must run all \d+ layers, got 0"):
        block_influence(search, lambda: None)


@pytest.mark.parametrize("function", [one_by_one, block_influence])
def test_what_cannot_be_called_is_refused(function):
    with pytest.raises(TypeError, match="compute must be a function"):
        function(depth_searches.make_search(), 1.0)


def test_a_search_begins_with_what_is_known():
    search = depth_searches.make_search(num_skip=1)
    count = len(search.layers)
    search.warm_start([float(layer == 1) for layer in range(count)], spread=2.0)
    preferences = search.bandit.preferences
    assert search.selection() == (1,)
    assert sum(preferences) == pytest.approx(0) and sum(g * g for g in preferences) / count == pytest.approx(4.0)
    restored = depth_searches.make_search(num_skip=1)
    restored.load_state_dict(search.state_dict())
    assert restored.bandit.preferences == preferences
    search.sample()
    with pytest.raises(ValueError, match=r"warm_start must come before the first step, got 1 steps"):
        search.warm_start([0.0] * count)


def test_equal_values_say_nothing():
    search = placement_searches.make_search()
    search.warm_start([0.1] * search.num_layers)
    assert search.bandit.preferences == [0.0] * search.num_layers


@pytest.mark.parametrize(
    ("values", "spread", "complaint"),
    [
        ([1.0], 1.0, r"values must be \d+ finite numbers"),
        ([math.nan], 1.0, r"values must be \d+ finite numbers"),
        (None, -1.0, r"spread must be a finite number of 0 or more, got -1.0"),
        (None, math.inf, r"spread must be a finite number of 0 or more, got inf"),
    ],
)
def test_refusals_change_nothing(values, spread, complaint):
    search = placement_searches.make_search()
    values = [1.0] * search.num_layers if values is None else values
    if any(map(math.isnan, values)):
        values = values * search.num_layers
    with pytest.raises(ValueError, match=complaint):
        search.warm_start(values, spread)
    assert search.bandit.preferences == [0.0] * search.num_layers
