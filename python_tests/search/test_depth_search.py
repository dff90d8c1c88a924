"""The depth search (DAS, arXiv 2309.01479) on small models that are really skipped, trained and counted."""

import copy
import itertools
import json
import logging
import math
import random
import sys

import pytest
import torch
from searched_models import DIM, LAYERS, Layer, Stack, attached, json_copy
from torch import nn
from two_processes import in_two_processes, refusal_of_other_draws

import petl_ext
from petl_ext import DepthSearch
from petl_ext.attaching import LayerCosts
from petl_ext.search.goal import MacBudget


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


def test_gates_follow_the_papers_rule_from_the_real_losses():
    search = make_search(num_skip=3, seed=4, interval=2)
    x, target = torch.randn(4, DIM), torch.randn(4, DIM)
    gates = torch.zeros(LAYERS, dtype=torch.float64)
    run_search(search, 100, lambda: search.model(x, target)["loss"])
    assert len(search.history) == 50
    for entry in search.history:
        losses = []
        for subset in entry["subsets"]:
            search.attachment.skip(subset)
            losses.append(search.model.eval()(x, target)["loss"].item())
        assert losses == entry["losses"]
        rewards = torch.tensor(losses, dtype=torch.float64).neg().exp()
        p = gates.sigmoid()
        for subset, reward in zip(entry["subsets"], rewards, strict=True):
            gates[subset] += ((reward - rewards.mean()) * p * (1 - p))[subset]
        torch.testing.assert_close(torch.tensor(entry["preferences"], dtype=torch.float64), gates, rtol=0, atol=1e-7)
    assert search.selection() == tuple(sorted(gates.argsort(descending=True)[:3].tolist()))


def test_every_step_skips_what_was_drawn():
    search = make_search(num_skip=3)
    for subset in run_search(search, 20, None if search.is_due else losses_of(search)):
        assert len(set(subset)) == 3
    assert search.sample() == search.attachment.skipped
    x = torch.randn(2, DIM)
    drawn = search.sample()
    got = search.model.eval()(x)["output"]
    for index, layer in enumerate(search.model.layers):
        x = layer.bypass(x) if index in drawn else Layer.forward(layer, x)
    torch.testing.assert_close(got, search.model.head(x))


@pytest.mark.parametrize(("warmup", "first"), [(0, 10), (10, 11), (25, 26)])
def test_updates_come_when_the_papers_do(warmup, first):
    # Steps count in the warm-up too, so that the first update comes with the first step after it.
    search = make_search(warmup_steps=warmup)
    run_search(search, 60, losses_of(search))
    assert [entry["step"] for entry in search.history] == list(range(first, 61, 10))


def test_the_selection_is_fixed_after_search_steps():
    search = make_search(search_steps=30)
    run_search(search, 30, losses_of(search))
    assert not search.finished and len(search.history) == 3
    selection = search.selection()
    assert [search.sample() for _ in range(15)] == [selection] * 15
    assert search.finished and search.attachment.skipped == selection
    assert not search.is_due and search.step == 30
    with pytest.raises(RuntimeError, match="the selection is fixed"):
        search.update(losses_of(search))


def test_the_ramp_is_linear_and_updates_compare_full_subsets():
    search = make_search(num_skip=4, ramp_steps=20, interval=5)
    drawn = run_search(search, 30, losses_of(search))
    assert [len(subset) for subset in drawn] == [min(4, 4 * step // 20 + 1) for step in range(30)]
    assert {len(subset) for entry in search.history for subset in entry["subsets"]} == {4}


def test_an_update_leaves_no_trace_but_the_gates():
    model, _ = attached(dropout=0.5)
    search = make_search(model=model)
    model.train()
    model.layers[3].eval()
    training = {name: module.training for name, module in model.named_modules()}
    drawn, x, seen = search.sample(), torch.randn(4, DIM), []

    def compute_loss():
        assert not any(module.training for module in model.modules())
        assert not torch.is_grad_enabled()
        seen.append(search.attachment.skipped)
        return model(x, x)["loss"] + torch.rand(())

    state = torch.get_rng_state()
    search.update(compute_loss)
    assert [list(subset) for subset in seen] == search.history[0]["subsets"]
    assert len(set(seen)) == 3
    assert {name: module.training for name, module in model.named_modules()} == training
    assert search.attachment.skipped == drawn
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.is_grad_enabled()


def test_train_mode_compares_with_the_same_dropout():
    model, _ = attached(dropout=0.5)
    search = make_search(model=model, evaluation_mode="train")
    model.train()
    search.sample()
    masks = []

    def compute_loss():
        assert model.training
        masks.append(model.dropout(torch.ones(64)).tolist())
        return 1.0

    search.update(compute_loss)
    assert masks[0] == masks[1] == masks[2] and 0.0 in masks[0]
    torch.manual_seed(torch.initial_seed() + 1)
    search.update(compute_loss)
    assert masks[3] == masks[4] != masks[0]


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_no_number_has_no_reward(loss, caplog):
    search = make_search()
    search.sample()
    losses = iter([0.5, torch.tensor(loss), 0.7])
    with caplog.at_level(logging.WARNING, "petl_ext"):
        search.update(lambda: next(losses))
    assert f"step 1: a loss is {loss}; its reward is 0" in caplog.text
    entry = search.history[0]
    assert entry["rewards"] == [math.exp(-0.5), 0.0, math.exp(-0.7)]
    assert entry["losses"] == [0.5, None, 0.7]
    assert all(map(math.isfinite, entry["preferences"]))
    json.dumps(search.state_dict(), allow_nan=False)


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_loss_that_is_no_number_is_never_the_best(loss, caplog):
    search = make_search(reward=lambda loss: -loss)
    search.sample()
    losses = iter([0.5, loss, 0.7])
    search.update(lambda: next(losses))
    assert search.history[0]["rewards"] == [-0.5, -0.7, -0.7] and "its reward is -0.7" in caplog.text


@pytest.mark.parametrize("value", [None, "0.5", torch.ones(2), [1.0]])
def test_a_loss_or_reward_that_is_not_one_number_is_named(value):
    search = make_search()
    search.sample()
    before = search.state_dict()
    with pytest.raises(TypeError, match="DepthSearch: compute_loss must return one number, got"):
        search.update(lambda: value)
    with pytest.raises(TypeError, match="DepthSearch: compute_loss must be a function, got"):
        search.update(value)
    search.reward = lambda loss: value
    with pytest.raises(TypeError, match="DepthSearch: reward must return one number, got"):
        search.update(lambda: torch.ones(1))
    assert search.state_dict() == before
    with pytest.raises(TypeError, match="DepthSearch: reward must be a function, got"):
        make_search(reward=value)


def test_what_a_disabled_or_shrunk_model_refuses_leaves_search_and_model_as_they_were():
    search = make_search()
    run_search(search, 10, losses_of(search))
    search.sample()
    search.model.train()
    search.attachment.skip(set(range(LAYERS)) - set(search.selection()))
    before = search.state_dict()
    with search.attachment.disable():
        for act in (search.sample, search.apply, lambda: search.update(losses_of(search))):
            with pytest.raises(RuntimeError, match="the attachment is disabled"):
                act()
            assert search.state_dict() == before
            assert all(module.training for module in search.model.modules())
    search.attachment.remove_skipped()
    for act in (search.sample, search.apply, lambda: search.update(losses_of(search))):
        with pytest.raises(RuntimeError, match="removed for good"):
            act()
        assert search.state_dict() == before and search.model.training
    with pytest.raises(ValueError, match="the skipped layers of Stack have been removed for good"):
        DepthSearch(search.model, 2)


def test_flags_come_back_when_the_loss_disables_the_model():
    search = make_search()
    search.sample()
    search.model.train()
    disabled = search.attachment.disable()

    def compute_loss():
        disabled.__enter__()
        return 1.0

    with pytest.raises(RuntimeError, match="the attachment is disabled"):
        search.update(compute_loss)
    disabled.__exit__(None, None, None)
    assert all(module.training for module in search.model.modules())


def test_the_baseline_is_a_constant():
    search = make_search(baseline=False)
    search.sample()
    search.update(lambda: 0.0)
    assert not search.bandit.baseline and max(search.bandit.preferences) > 0
    read = make_search(baseline=False)
    read.load_state_dict(json_copy(search.state_dict()))
    assert read.state_dict() == search.state_dict()


def test_frozen_bypasses_are_warned_of_once(caplog):
    search = make_search()
    search.model.requires_grad_(False)
    run_search(search, 3, losses_of(search))
    assert caplog.text.count("no parameter of a bypass requires gradients") == 1
    caplog.clear()
    run_search(make_search(), 3, None)
    assert caplog.text == ""


def test_costs_follow_the_names_of_the_layers(unequal, tmp_path):
    model, _, costs = unequal
    turned = LayerCosts(costs.backbone, costs.unskipped, dict(reversed(costs.layers.items())))
    search = DepthSearch(model, 2, inputs=turned)
    assert tuple(search.costs.layers) == search.layers and search.costs.savings == costs.savings
    state = json.loads(json.dumps(search.state_dict(), sort_keys=True))
    state["costs"]["layers"] = dict(reversed(state["costs"]["layers"].items()))
    (tmp_path / "search.json").write_text(json.dumps(state))
    read = DepthSearch.from_json(tmp_path / "search.json", attached(hidden=SIZES)[0])
    assert read.costs.savings == costs.savings
    for layers in ({}, {**costs.layers, "more": [1, 0]}, list(costs.layers.values())):
        with pytest.raises(ValueError, match=r"expected costs of the layers \['layers\.0', "):
            DepthSearch(model, 2, inputs=LayerCosts(1, 1, layers))
    with pytest.raises(ValueError, match="costs must be integers, two for each layer"):
        DepthSearch(model, 2, inputs=LayerCosts("1", 1, costs.layers))


def test_macs_are_of_different_layers(unequal):
    model, _, costs = unequal
    search = DepthSearch(model, 2, inputs=costs)
    for selection in ([1, 1], [-1], [99], [True], "12", 3):
        with pytest.raises(ValueError, match="macs takes different indices from 0 to 7, got"):
            search.macs(selection)


def damaged_states(state):
    """What a file can be that is no state, beside words that the refusal says."""
    entry = state["history"][0]
    yield {name: value for name, value in state.items() if name != "history"}, "wrong history or none"
    for name, value in (
        ("history", [{**entry, "preferences": None}]),
        ("history", [{**entry, "subsets": [[99]]}]),
        ("history", [{"step": 1}]),
        ("step", "3"),
        ("since_update", -1),
        ("finished", None),
        ("selection", [0, 99]),
        ("selection", None),
    ):
        yield {**state, name: value}, f"wrong {name} or none"
    for name, value in (("draws", None), ("preferences", ["a"] * LAYERS), ("preferences", [math.nan] * LAYERS)):
        yield {**state, "bandit": {**state["bandit"], name: value}}, f"Bandit: {name} must be"
    yield {**state, "bandit": []}, "Bandit: a state is a dict"
    yield {**state, "costs": []}, "expected costs None"
    yield {**state, "constants": {**state["constants"], "probability": []}}, "expected constants"
    yield [], "a state is a dict"


def test_a_damaged_state_is_refused_and_changes_nothing(tmp_path):
    search, other = make_search(), make_search()
    run_search(search, 30, losses_of(search))
    run_search(other, 10, losses_of(other, seed=1))
    before = other.state_dict()
    for state, message in damaged_states(json_copy(search.state_dict())):
        with pytest.raises(ValueError, match=message):
            other.load_state_dict(state)
        assert other.state_dict() == before
        (tmp_path / "search.json").write_text(json.dumps(state))
        with pytest.raises(ValueError):
            DepthSearch.from_json(tmp_path / "search.json", attached()[0])


def test_pictures_say_what_to_install(tmp_path, monkeypatch):
    search = make_search()
    run_search(search, 10, losses_of(search))
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"DepthSearch\.plot needs matplotlib: pip install matplotlib"):
        search.plot(tmp_path / "gates.png")


def test_a_reward_without_end_is_refused():
    search = make_search()
    search.sample()
    before = search.state_dict()
    with pytest.raises(ValueError, match=r"the reward of the loss -1000\.0 is inf; give another reward"):
        search.update(lambda: -1000.0)
    assert search.state_dict() == before
    search.reward = lambda loss: -loss
    losses = iter([-1000.0, -999.0, -998.0])
    search.update(lambda: next(losses))
    assert search.history[0]["rewards"] == [1000.0, 999.0, 998.0]


PLANTED = (1, 4, 6)


def planted_selection(seed):
    """Trains head and bypasses to do what the backbone does without three layers, which only add noise."""
    model, attachment = attached(seed=seed, noisy=PLANTED)
    teacher = copy.deepcopy(model)
    teacher.petl_attachment.skip([])
    for index in PLANTED:
        teacher.layers[index].noise = 0.0
    search = make_search(3, model=model, seed=seed, interval=2, warmup_steps=20, step_size=3.0)
    optimizer = torch.optim.Adam(attachment.parameters(), lr=0.01)
    torch.manual_seed(100 + seed)

    def loss_of_new_batch():
        x = torch.randn(16, DIM)
        with torch.no_grad():
            target = teacher(x)["output"]
        return lambda: model(x, target)["loss"]

    for _ in range(200):
        search.sample()
        loss_of_new_batch()().backward()
        optimizer.step()
        optimizer.zero_grad()
        if search.is_due:
            search.update(loss_of_new_batch())
    return search.selection()


def test_the_search_finds_the_layers_that_are_not_needed():
    assert [planted_selection(seed) for seed in range(10)].count(PLANTED) >= 9


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_skip": 3}, "expected num_skip 3, found 2"),
        ({"interval": 5}, "expected constants .*'interval': 5.*found .*'interval': 10"),
        ({"seed": 1}, "'seed': 1.*found.*'seed': 0"),
        ({"inputs": costs_that_save(*[1] * LAYERS)}, "expected costs .*found None"),
        ({"model": attached(hidden=(DIM,) * 7)[0]}, "expected layers"),
    ],
    ids=lambda value: "" if isinstance(value, str) else next(iter(value)),
)
def test_the_state_of_another_search_is_refused(changes, message):
    search = make_search()
    run_search(search, 20, losses_of(search))
    other = make_search(**changes)
    before = other.state_dict()
    with pytest.raises(ValueError, match=message):
        other.load_state_dict(json_copy(search.state_dict()))
    assert other.state_dict() == before
    with pytest.raises(ValueError, match="expected a state of format 1, found None"):
        other.load_state_dict({})


def test_the_json_file_says_what_was_found(tmp_path):
    search = make_search()
    run_search(search, 30, losses_of(search))
    (tmp_path / "search.json").write_text("before")
    search.to_json(tmp_path / "search.json")
    read = json.loads((tmp_path / "search.json").read_text())
    assert read["layers"] == [f"layers.{index}" for index in range(LAYERS)]
    assert read["selection"] == list(search.selection())
    assert read["selected_layers"] == [f"layers.{index}" for index in search.selection()]
    assert read["constants"]["num_subsets"] == 3 and read["num_skip"] == 2
    assert read["bandit"]["preferences"] == search.bandit.preferences
    assert read["history"] == search.history and len(read["history"]) == 3
    assert [path.name for path in tmp_path.iterdir()] == ["search.json"]
    search.history[0]["losses"] = [math.nan]
    with pytest.raises(ValueError, match="not JSON compliant"):
        search.to_json(tmp_path / "search.json")
    assert json.loads((tmp_path / "search.json").read_text()) == read
    assert [path.name for path in tmp_path.iterdir()] == ["search.json"]


@pytest.mark.parametrize("text", ["", "[]", '{"format": 1}', '{"num_skip": 2, "max_macs": null}'])
def test_another_json_file_is_refused(text, tmp_path):
    (tmp_path / "other.json").write_text(text)
    with pytest.raises(ValueError, match=r"other\.json: not what DepthSearch\.to_json writes"):
        DepthSearch.from_json(tmp_path / "other.json", attached()[0])


def test_stability_counts_updates_and_ties_are_not_stable():
    search = make_search()
    for _ in range(5):
        search.sample()
        search.update(lambda: 1.0)
    assert search.selection() == (0, 1) and not search.is_stable(2)
    search = make_search(num_skip=1)
    for time in range(6):
        search.sample()
        search.update(lambda: 0.0 if search.attachment.skipped == (5,) else 1.0)
        preferred = search.history[-1]["selection"] == [5]
        assert search.is_stable(1) <= (time > 0)
        if preferred and time > 2:
            break
    selections = [entry["selection"] for entry in search.history]
    for patience in range(1, 6):
        tail = selections[-patience - 1 :]
        assert search.is_stable(patience) == (len(tail) == patience + 1 and all(s == tail[0] for s in tail))


def test_apply_skips_and_can_delete(caplog):
    model, attachment = attached()
    search = make_search(model=model)
    with pytest.raises(RuntimeError, match="before the first update nothing says which layers to delete"):
        search.apply(permanent=True)
    run_search(search, 25, losses_of(search))
    selection = search.apply()
    assert search.finished and attachment.skipped == selection == search.selection()
    whole, x = sum(p.numel() for p in model.parameters()), torch.randn(2, DIM)
    output = model.eval()(x)["output"]
    assert search.apply(permanent=True) == selection
    assert sum(p.numel() for p in model.parameters()) < whole
    torch.testing.assert_close(model(x)["output"], output)
    assert search.sample() == search.use_selection() == selection
    assert "means nothing" not in caplog.text
    make_search().apply()
    assert "applied before the first update: the selection means nothing" in caplog.text


def test_validation_between_steps_can_see_the_selection():
    search = make_search()
    run_search(search, 21, losses_of(search))
    assert search.use_selection() == search.attachment.skipped == search.selection()
    assert not search.finished
    future = search.sample()
    assert search.attachment.skipped == future


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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_skip": 0}, "num_skip must be an integer from 1 to 8, the number of layers, got 0"),
        ({"num_skip": 9}, "got 9"),
        ({"num_skip": None}, "exactly one of num_skip and max_macs"),
        ({"num_skip": 2, "max_macs": 0.8}, "exactly one of num_skip and max_macs"),
        ({"num_skip": None, "max_macs": 0.8}, "max_macs needs inputs"),
        ({"num_skip": 8}, r"num_subsets=3, but num_skip=8 leaves only 1 different subset of 8 layers"),
        ({"num_skip": 7, "num_subsets": 9}, "leaves only 8 different subsets"),
        ({"num_subsets": 1}, "num_subsets must be an integer of 2 or more, got 1"),
        ({"interval": 0}, "interval must be an integer of 1 or more, got 0"),
        ({"interval": None}, "interval must be an integer of 1 or more, got None"),
        ({"warmup_steps": 1.5}, r"warmup_steps must be an integer of 0 or more, got 1\.5"),
        ({"evaluation_mode": "test"}, 'evaluation_mode must be "eval" or "train", got \'test\''),
        ({"step_size": -1.0}, r"step_size must be a positive number, got -1\.0"),
        ({"num_skip": None, "max_macs": 0.8, "inputs": costs_that_save(*[1] * 8), "ramp_steps": 5}, "needs num_skip"),
        (
            {"num_skip": None, "max_macs": True, "inputs": costs_that_save(*[1] * 8)},
            "max_macs must be a number, .*True",
        ),
        ({"num_skip": None, "max_macs": "0.5", "inputs": costs_that_save(*[1] * 8)}, "max_macs must be a num.*'0.5'"),
        ({"warmup_steps": 30, "search_steps": 30}, "warmup_steps=30 and interval=10 put at step 31"),
        ({"search_steps": 9}, "search_steps=9 ends the search before its first update"),
        ({"baseline": None}, "baseline must be True or False, got None"),
    ],
)
def test_wrong_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        make_search(**{"num_skip": 2, **arguments})


def test_a_misspelt_constant_is_refused():
    with pytest.raises(TypeError, match="intervall"):
        make_search(intervall=3)


def test_a_model_without_skippable_layers_is_told_what_to_attach():
    with pytest.raises(ValueError, match=r"Stack .*nothing is attached; write petl_ext\.attach\(model, petl_ext\.DAS"):
        DepthSearch(Stack(), 2)
    model = Stack()
    petl_ext.attach(model, petl_ext.ClassifierOnlyConfig(), keep=["head"])
    with pytest.raises(ValueError, match=r"attached is ClassifierOnlyConfig\(.*\); write"):
        DepthSearch(model, 2)


def test_macs_need_inputs():
    with pytest.raises(ValueError, match="macs needs a search that was made with inputs"):
        make_search().macs()


def test_a_search_that_has_begun_keeps_its_schedule():
    search = make_search()
    search.schedule(warmup_steps=4, search_steps=10)
    assert (search.constants.warmup_steps, search.constants.search_steps) == (4, 10)
    with pytest.raises(ValueError, match=r"search_steps=10 ends the search before its first update, .* at step 11"):
        search.schedule(warmup_steps=10, search_steps=10)
    assert (search.constants.warmup_steps, search.constants.search_steps) == (4, 10)
    search.sample()
    with pytest.raises(ValueError, match="cannot change after 1 steps"):
        search.schedule(warmup_steps=0, search_steps=None)


def test_vilt_is_searched_and_shrunk():
    # Not above: the processes of the last test import this file, and transformers takes them seconds.
    from tiny_vilt import LABELS, make_inputs, make_model

    model = make_model(num_hidden_layers=4)
    attachment = petl_ext.attach(model, petl_ext.DASConfig(bottleneck=4), keep=["classifier", "vilt.pooler"])
    inputs = make_inputs(model)
    search = DepthSearch(model, max_macs=0.8, inputs=inputs, interval=1)
    assert search.layers == tuple(f"vilt.encoder.layer.{index}" for index in range(4))
    assert len(set(search.costs.savings)) == 1 and search.costs.unskipped > search.costs.backbone
    labels = torch.eye(LABELS)[:2]
    state = torch.get_rng_state()
    run_search(search, 3, lambda: model(**inputs, labels=labels).loss)
    assert torch.equal(torch.get_rng_state(), state)  # ViLT shuffles patches in eval mode too
    selection = search.apply(permanent=True)
    assert attachment.skipped == selection and len(selection) == 2 and search.macs() <= 0.8
    assert not hasattr(model.vilt.encoder.layer[selection[0]], "attention")
    assert model.eval()(**inputs).logits.isfinite().all()


def test_the_picture_is_drawn(tmp_path):
    search = make_search(num_skip=3)
    with pytest.raises(ValueError, match="nothing to plot"):
        search.plot(tmp_path / "gates.png")
    run_search(search, 60, losses_of(search))
    search.plot(tmp_path / "gates.svg")
    search.plot(tmp_path / "gates.png")
    drawn = (tmp_path / "gates.svg").read_text()
    assert all(f"layers.{index}" in drawn for index in range(LAYERS)) and "3 of 8 layers" in drawn
    assert (tmp_path / "gates.png").read_bytes().startswith(b"\x89PNG")


def test_the_reward_is_of_the_loss_averaged_over_processes():
    ranks = in_two_processes(searched_in_two)
    assert ranks[0]["state"] == ranks[1]["state"]
    assert [rank["refusal"] for rank in ranks] == ["DepthSearch: the processes have drawn different subsets"] * 2
    alone, own = make_search(interval=2), [rank_losses(rank) for rank in range(2)]
    run_search(alone, 40, lambda: (next(own[0]) + next(own[1])) / 2)
    assert len(alone.history) == 20 and alone.state_dict() == ranks[0]["state"]
    single = make_search(interval=2)
    only = rank_losses(0)
    run_search(single, 40, lambda: next(only))
    assert single.bandit.preferences != alone.bandit.preferences


def rank_losses(rank):
    generator = random.Random(rank)
    while True:
        yield generator.random()


def searched_in_two(rank):
    model, _ = attached()
    wrapped = nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
    search, losses = DepthSearch(wrapped, 2, interval=2), rank_losses(rank)
    assert search.model is model
    optimizer = torch.optim.SGD(model.petl_attachment.parameters(), lr=0.01)
    for _ in range(40):
        search.sample()
        wrapped(torch.randn(2, DIM), torch.randn(2, DIM))["loss"].backward()
        optimizer.step()
        if search.is_due:
            search.update(lambda: next(losses))
    return {"state": search.state_dict(), "refusal": refusal_of_other_draws(make_search(seed=rank))}
