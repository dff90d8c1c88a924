"""The depth search by a budget of MACs: counted costs of the layers, and subsets that meet the budget."""

import itertools
import json

import pytest
import torch
from depth_searches import costs_that_save, losses_of, make_search, run_search
from searched_models import DIM, LAYERS, attached, json_copy

from petl_ext import DepthSearch
from petl_ext.attaching import LayerCosts
from petl_ext.search.goal import MacBudget


def test_costs_follow_the_names_of_the_layers(unequal, tmp_path):
    model, _, costs = unequal
    turned = LayerCosts(costs.backbone, costs.unskipped, dict(reversed(costs.layers.items())))
    search = DepthSearch(model, 2, inputs=turned)
    assert tuple(search.costs.layers) == search.layers and search.costs.savings == costs.savings
    state = json.loads(json.dumps(search.state_dict(), sort_keys=True))
    state["costs"]["layers"] = dict(reversed(state["costs"]["layers"].items()))
    (tmp_path / "search.json").write_text(json.dumps(state))
    read = DepthSearch.load(tmp_path / "search.json", attached(hidden=SIZES)[0])
    assert read.costs.savings == costs.savings
    for layers in ({}, {**costs.layers, "more": [1, 0]}, list(costs.layers.values())):
        with pytest.raises(ValueError, match=r"must be costs of the layers \['layers\.0', "):
            DepthSearch(model, 2, inputs=LayerCosts(1, 1, layers))
    with pytest.raises(ValueError, match="costs must be integers, two for each layer"):
        DepthSearch(model, 2, inputs=LayerCosts("1", 1, costs.layers))


def test_macs_are_of_different_layers(unequal):
    model, _, costs = unequal
    search = DepthSearch(model, 2, inputs=costs)
    for selection in ([1, 1], [-1], [99], [True], "12", 3):
        with pytest.raises(ValueError, match="selection must be different indices from 0 to 7, got"):
            search.macs(selection)


SIZES = (12, 16, 16, 24, 24, 40, 2, 1)


def block_macs(hidden):
    return 2 * DIM * hidden


@pytest.fixture
def unequal():
    """Layers of several sizes, and what they and a bypass of width 2 multiply for one row."""
    model, _ = attached(hidden=SIZES)
    backbone = sum(map(block_macs, SIZES)) + DIM * DIM
    layers = {f"layers.{index}": [block_macs(size), block_macs(2)] for index, size in enumerate(SIZES)}
    return model, {"x": torch.randn(1, DIM)}, LayerCosts(backbone, backbone, layers)


def test_costs_are_counted_on_the_model(unequal):
    model, inputs, expected = unequal
    model.petl_attachment.skip([2])
    search = make_search(model=model, inputs=inputs)
    assert search.costs == expected
    assert search.attachment.skipped == (2,)
    assert search.macs([5, 0]) == pytest.approx(1 - (block_macs(38) + block_macs(10)) / expected.backbone)
    assert search.macs(()) == 1
    assert search.macs() == search.macs(search.selection())


def test_subsets_of_a_budget_meet_it_and_no_layer_in_them_is_spare(unequal):
    model, inputs, costs = unequal
    search = make_search(None, model=model, inputs=inputs, max_macs=0.7)
    drawn = {search.sample() for _ in range(200)}
    assert len(drawn) > 5 and len({len(subset) for subset in drawn}) > 1
    for subset in drawn:
        assert search.macs(subset) <= 0.7
        assert all(search.macs(set(subset) - {layer}) > 0.7 for layer in subset)
        assert not {6, 7} & set(subset)  # which save nothing
    reachable = {
        subset
        for size in range(9)
        for subset in itertools.combinations(range(LAYERS), size)
        if search.macs(subset) <= 0.7 and all(search.macs(set(subset) - {layer}) > 0.7 for layer in subset)
    }
    assert drawn <= reachable
    run_search(search, 50, losses_of(search))
    assert search.selection() in reachable
    assert search.macs() <= 0.7
    again = DepthSearch(attached(hidden=SIZES)[0], max_macs=0.7, inputs=costs)
    again.load_state_dict(json_copy(search.state_dict()))
    assert again.selection() == search.selection()


@pytest.mark.parametrize(
    ("order", "taken"),
    [
        ([4, 3, 2, 1, 0], (4,)),
        ([3, 1, 0, 2, 4], (1, 3)),
        ([0, 2, 3, 1, 4], (2, 3)),
        ([0, 1, 4, 2, 3], (4,)),
        ([2, 1, 3, 0, 4], (2, 3)),
        ([5, 3, 1, 4, 0], (1, 3)),
        ([5, 2, 0, 3, 1], (2, 3)),
        ([2, 1, 0], None),
    ],
)
def test_a_budget_takes_from_the_order_and_gives_back_from_its_end(order, taken):
    """40 must be saved; layer 5 is cheaper than its bypass."""
    assert MacBudget(costs_that_save(5, 10, 20, 30, 40, -10, backbone=100), 0.6).take(order) == taken


@pytest.mark.parametrize(
    ("max_macs", "message"),
    [
        (0.1, r"at least 0\.\d{4}, the smallest share .* below 1\.0000, .*got 0\.1"),
        (1.0, r"below 1\.0000, that without skipping; got 1\.0"),
    ],
)
def test_a_budget_out_of_reach_is_refused(unequal, max_macs, message):
    model, inputs, costs = unequal
    with pytest.raises(ValueError, match=message):
        make_search(None, model=model, inputs=inputs, max_macs=max_macs)
    least = costs.ratio(range(6))
    with pytest.raises(ValueError, match=f"at least {least:.4f}"):
        make_search(None, model=model, inputs=inputs, max_macs=least - 1e-6)
    # Here every layer must go, so that there is nothing to compare.
    with pytest.raises(ValueError, match=r"max_macs=0\.\d+ leaves only 1 different subset of 8 layers"):
        make_search(None, model=model, inputs=inputs, max_macs=least)


def test_macs_need_inputs():
    with pytest.raises(ValueError, match="macs needs a search that was made with inputs"):
        make_search().macs()
