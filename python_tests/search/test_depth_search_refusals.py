"""Arguments, losses and models that the depth search refuses or warns of."""

import pytest
import torch
from depth_searches import costs_that_save, losses_of, make_search, run_search
from searched_models import LAYERS, Stack

import petl_ext
from petl_ext import DepthSearch


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


def test_frozen_bypasses_are_warned_of_once(caplog):
    search = make_search()
    search.model.requires_grad_(False)
    run_search(search, 3, losses_of(search))
    assert caplog.text.count("no parameter of a bypass requires gradients") == 1
    caplog.clear()
    run_search(make_search(), 3, None)
    assert caplog.text == ""


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


def test_a_misspelled_constant_is_refused():
    with pytest.raises(TypeError, match="intervall"):
        make_search(intervall=3)


def test_a_model_without_skippable_layers_is_told_what_to_attach():
    with pytest.raises(ValueError, match=r"Stack .*nothing is attached; write petl_ext\.attach\(model, petl_ext\.DAS"):
        DepthSearch(Stack(), 2)
    model = Stack()
    petl_ext.attach(model, petl_ext.ClassifierOnlyConfig(), keep=["head"])
    with pytest.raises(ValueError, match=r"attached is ClassifierOnlyConfig\(.*\); write"):
        DepthSearch(model, 2)


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
