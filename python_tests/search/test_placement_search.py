"""The search for the prompt's layer (KAB-APP, arXiv 2306.00409): its formulas, on small models."""

import itertools
import json
import logging
import math
import random

import pytest
import torch
import torch.nn.functional as F
from placement_searches import make_search, run_search, scores_of
from searched_models import PROMPTED_LAYERS as LAYERS
from searched_models import Placed, json_copy
from torch import nn
from two_processes import in_two_processes, refusal_of_other_draws

from petl_ext import DepthSearch, PlacementSearch


@pytest.mark.parametrize("constants", [{}, {"step_size": 0.5, "num_samples": 10, "temperature": 2.0}])
def test_preferences_follow_the_papers_rule(constants):
    search = make_search(seed=3, **constants)
    step_size, temperature = constants.get("step_size", 0.005), constants.get("temperature", 1.0)
    run_search(search, 50, scores_of(search))
    assert [entry["step"] for entry in search.history] == list(range(1, 51))
    alpha = torch.zeros(LAYERS, dtype=torch.float64)
    for entry in search.history:
        pi = torch.softmax(alpha / temperature, 0)
        mean = sum(entry["scores"]) / len(entry["scores"])
        for layer, score in zip(entry["layers"], entry["scores"], strict=True):
            alpha[layer] = alpha[layer] + step_size * (score - mean) * pi[layer] * (1 - pi[layer])
        torch.testing.assert_close(torch.tensor(entry["preferences"], dtype=torch.float64), alpha, rtol=0, atol=1e-7)
        assert entry["selection"] == alpha.argmax().item() and len(entry["layers"]) == search.constants.num_samples
    assert alpha.abs().max() > 0.05
    assert any(len(set(entry["layers"])) < len(entry["layers"]) for entry in search.history)
    assert search.probabilities == pytest.approx(torch.softmax(alpha / temperature, 0).tolist())


def chi_square(drawn, law):
    return sum((drawn.count(layer) - p * len(drawn)) ** 2 / (p * len(drawn)) for layer, p in enumerate(law))


CHI_SQUARE_LIMIT = 20.5  # five degrees of freedom: one seed in a thousand exceeds it


def test_training_draws_are_uniform_and_scoring_draws_follow_the_softmax():
    search = make_search(seed=1, num_samples=10, search_steps=10_000)
    search.bandit.preferences = [-1.5, 0.0, 0.4, 2.0, 0.1, 0.0]
    assert chi_square([search.sample() for _ in range(4000)], [1 / LAYERS] * LAYERS) < CHI_SQUARE_LIMIT
    for _ in range(400):
        search.update(lambda: 1.0)  # equal scores move nothing
    scored = [layer for entry in search.history for layer in entry["layers"]]
    pi = torch.tensor([-1.5, 0.0, 0.4, 2.0, 0.1, 0.0], dtype=torch.float64).softmax(0).tolist()
    assert len(scored) == 4000 and chi_square(scored, pi) < CHI_SQUARE_LIMIT
    assert chi_square(scored, [1 / LAYERS] * LAYERS) > 10 * CHI_SQUARE_LIMIT
    pairs = [first == second for e in search.history for first, second in itertools.combinations(e["layers"], 2)]
    assert sum(pairs) / len(pairs) == pytest.approx(sum(p * p for p in pi), abs=0.02)  # independent of each other


def test_a_layer_drawn_twice_is_scored_once():
    search, scored = make_search(), []
    search.sample()

    def compute_score():
        scored.append(search.model.insert_layer)
        return torch.rand(())

    for _ in range(20):
        scored.clear()
        search.update(compute_score)
        entry = search.history[-1]
        assert scored == sorted(set(entry["layers"]))
        assert len(set(entry["scores"])) == 1  # each from the same state of the generators


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_an_update_leaves_no_trace_but_the_preferences(mode):
    search = make_search(evaluation_mode=mode)
    model = search.model.train()
    model.head.eval()
    drawn, training = search.sample(), [module.training for module in model.modules()]
    seen = []

    def compute_score():
        assert not torch.is_grad_enabled()
        seen.append([module.training for module in model.modules()])
        return float(model(torch.ones(2, 4)).sum())

    state = torch.get_rng_state()
    search.update(compute_score)
    assert seen[0] == (training if mode == "train" else [False] * len(training))
    assert [module.training for module in model.modules()] == training
    assert model.insert_layer == drawn and torch.equal(torch.get_rng_state(), state) and torch.is_grad_enabled()
    assert search.bandit.preferences != [0.0] * LAYERS


@pytest.mark.parametrize("score", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(("others", "lowest"), [((50.0, 40.0), 0.0), ((-3.0, -2.0), -3.0)])
def test_a_score_that_is_no_number_is_the_lowest(score, others, lowest, caplog):
    search = make_search(seed=1, num_samples=12)
    search.sample()
    scores = iter([others[0], torch.tensor(score)])
    with caplog.at_level(logging.WARNING, "petl_ext"):
        search.update(lambda: next(scores, others[1]))
    assert f"PlacementSearch: step 1: a score is {score}; its reward is {lowest}" in caplog.text
    (entry,) = search.history
    assert None in entry["scores"] and {*others} < {*entry["scores"]}
    assert entry["rewards"] == [lowest if value is None else value for value in entry["scores"]]
    assert all(map(math.isfinite, entry["preferences"])) and any(entry["preferences"])
    json.dumps(search.state_dict(), allow_nan=False)


def test_where_no_score_is_a_number_nothing_moves(caplog):
    search = make_search()
    search.sample()
    search.update(lambda: math.nan)
    assert search.bandit.preferences == [0.0] * LAYERS and caplog.text.count("its reward is 0.0") == 1


def planted_selection(seed):
    """Trains a model in which the prompt of one layer arrives, that of the others in noise."""
    best = random.Random(seed).randrange(LAYERS)
    model = Placed(best, seed)
    search = PlacementSearch(model, seed=seed, step_size=0.02)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
    torch.manual_seed(100 + seed)
    teacher = torch.randn(4, 3)

    def new_batch():
        images = torch.randn(32, 4)
        return images, (images @ teacher).argmax(1)

    for _ in range(250):
        search.sample()
        images, labels = new_batch()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
        optimizer.zero_grad()
        images, labels = new_batch()
        if search.is_due:
            search.update(lambda: 100 * (model(images).argmax(1) == labels).float().mean())  # noqa: B023
    return search.apply() == best == model.insert_layer


def test_the_search_finds_the_best_layer():
    assert [planted_selection(seed) for seed in range(10)].count(True) >= 9


def test_the_state_of_another_search_is_refused(tmp_path):
    search, other = make_search(), make_search(seed=1)
    run_search(search, 5, scores_of(search))
    before = other.state_dict()
    with pytest.raises(ValueError, match=r"Bandit: state must be of .*'seed': 1.*got.*'seed': 0"):
        other.load_state_dict(search.state_dict())
    assert other.state_dict() == before
    with pytest.raises(ValueError, match=r"another search: its constants must be .*'interval': 2"):
        make_search(interval=2).load_state_dict(search.state_dict())
    longer = Placed()
    longer.num_layers = 9
    search.save(tmp_path / "search.json")
    with pytest.raises(ValueError, match="num_layers must be 9, got 6"):
        PlacementSearch.load(tmp_path / "search.json", longer)
    with pytest.raises(ValueError, match=r"search\.json: not what DepthSearch\.save writes"):
        DepthSearch.load(tmp_path / "search.json", Placed())
    depth_search = {"bandit": {"seed": 0}, "constants": {"num_subsets": 3}}
    (tmp_path / "depth.json").write_text(json.dumps(depth_search))
    with pytest.raises(ValueError, match=r"depth\.json: not what PlacementSearch\.save writes: .*num_subsets"):
        PlacementSearch.load(tmp_path / "depth.json", Placed())


def test_the_selection_is_used_between_steps_and_in_the_end(caplog):
    search = make_search(interval=2, warmup_steps=3)
    run_search(search, 30, scores_of(search))
    assert [entry["step"] for entry in search.history] == list(range(4, 31, 2))
    layer = search.selection()
    assert type(layer) is int and layer == max(range(LAYERS), key=search.bandit.preferences.__getitem__)
    assert search.use_selection() == search.model.insert_layer == layer and not search.finished
    search.sample()
    assert search.apply() == search.model.insert_layer == layer and search.finished and not search.is_due
    assert [search.sample() for _ in range(5)] == [layer] * 5 and search.step == 31
    with pytest.raises(RuntimeError, match="PlacementSearch: the selection is fixed"):
        search.update(scores_of(search))
    assert search.summary() == f"inserts the prompt at layer {layer} after 14 updates" and caplog.text == ""
    assert make_search().apply() == 0
    assert "PlacementSearch: applied before the first update: the selection means nothing" in caplog.text


def test_stability_and_entropy():
    search = make_search(num_samples=10)
    assert search.entropy == pytest.approx(1)
    for _ in range(3):
        search.sample()
        search.update(lambda: 1.0)
    assert search.selection() == 0 and not search.is_stable(2)  # a tie decides
    while not search.is_stable(20):
        search.sample()
        search.update(lambda: 100.0 * (search.model.insert_layer == 4))
        assert search.step < 100
    assert search.selection() == 4 and not search.is_stable(len(search.history)) and 0 < search.entropy < 0.9


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_samples": 1}, "PlacementSearch: num_samples must be an integer of 2 or more, got 1"),
        ({"interval": 0}, "PlacementSearch: interval must be an integer of 1 or more, got 0"),
        ({"warmup_steps": 1.5}, "warmup_steps must be an integer of 0 or more"),
        ({"search_steps": 0}, "search_steps must be an integer of 1 or more"),
        ({"search_steps": 5, "warmup_steps": 5}, "search_steps=5 ends the search before its first update"),
        ({"evaluation_mode": "test"}, 'PlacementSearch: evaluation_mode must be "eval" or "train", got \'test\''),
        ({"step_size": -1.0}, "step_size must be a positive number"),
        ({"temperature": 0}, "temperature must be a positive number"),
        ({"seed": "a"}, "seed must be an integer"),
        ({"model": nn.Linear(1, 1)}, r"with insert_layer and num_layers, .*got Linear, which has no insert_layer"),
        ({"model": object()}, "must be a torch module .*got object, which has no insert_layer"),
    ],
)
def test_wrong_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        make_search(**arguments)


def test_a_damaged_state_is_refused_and_changes_nothing(tmp_path):
    search, other = make_search(), make_search()
    run_search(search, 5, scores_of(search))
    run_search(other, 2, scores_of(other, seed=1))
    state, before = json_copy(search.state_dict()), other.state_dict()
    for change in ({"history": None}, {"selection": LAYERS}, {"selection": [0]}, {"finished": 1}, {"bandit": None}):
        with pytest.raises(ValueError):
            other.load_state_dict({**state, **change})
        assert other.state_dict() == before
        (tmp_path / "search.json").write_text(json.dumps({**state, **change}))
        with pytest.raises(ValueError):
            PlacementSearch.load(tmp_path / "search.json", Placed())


def test_a_score_that_is_not_one_number_is_named():
    search = make_search()
    search.sample()
    with pytest.raises(TypeError, match=r"PlacementSearch: compute_score must return one .*tensor of shape \(2,\)"):
        search.update(lambda: torch.ones(2))
    with pytest.raises(TypeError, match="PlacementSearch: compute_score must be a function, got 3"):
        search.update(3)


def test_a_model_needs_two_layers():
    model = Placed()
    model.num_layers = 1
    with pytest.raises(ValueError, match="the model must have two layers or more, got 1"):
        PlacementSearch(model)
    with pytest.raises(TypeError, match="num_sample"):
        make_search(num_sample=3)
    search = make_search()
    search.sample()
    with pytest.raises(ValueError, match="PlacementSearch: the schedule cannot change after 1 steps"):
        search.schedule(0, 5)


def test_the_picture_is_drawn(tmp_path):
    search = make_search(step_size=0.02, temperature=0.5)
    with pytest.raises(ValueError, match="PlacementSearch: no update has been made"):
        search.plot(tmp_path / "placement.png")
    run_search(search, 150, scores_of(search))
    search.plot(tmp_path / "placement.svg")
    search.plot(tmp_path / "placement.png")
    drawn = (tmp_path / "placement.svg").read_text()
    assert f"layer {search.selection()}" in drawn and "probability" in drawn and "others" in drawn
    assert (tmp_path / "placement.png").read_bytes().startswith(b"\x89PNG")


def test_processes_agree_on_averaged_scores():
    ranks = in_two_processes(searched_in_two)
    assert ranks[0]["drawn"] == ranks[1]["drawn"] and ranks[0]["state"] == ranks[1]["state"]
    assert [rank["refusal"] for rank in ranks] == ["PlacementSearch: the processes have drawn different layers"] * 2
    alone = make_search()
    own = [scores_of(alone, seed) for seed in range(2)]
    run_search(alone, 30, lambda: (own[0]() + own[1]()) / 2)
    assert alone.state_dict() == ranks[0]["state"]
    single = make_search()
    run_search(single, 30, scores_of(single, 0))
    assert single.bandit.preferences != alone.bandit.preferences


def searched_in_two(rank):
    model = Placed()
    search = PlacementSearch(nn.parallel.DistributedDataParallel(model, find_unused_parameters=True))
    assert search.model is model
    drawn = run_search(search, 30, scores_of(search, rank))
    refusal = refusal_of_other_draws(make_search(seed=rank))
    return {"drawn": drawn, "state": search.state_dict(), "refusal": refusal}
