"""The depth search (DAS, arXiv 2309.01479) on small models that are really skipped and trained."""

import copy
import json
import logging
import math
import random

import pytest
import torch
from depth_searches import losses_of, make_search, run_search
from searched_models import DIM, LAYERS, Layer, attached, json_copy
from torch import nn
from two_processes import in_two_processes, refusal_of_other_draws

import petl_ext
from petl_ext import DepthSearch


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
