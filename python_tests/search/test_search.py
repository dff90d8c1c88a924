"""What every search does, be it of the library or of a few lines: one body over all of them."""

import json
import random
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from searched_models import Placed, attached, json_copy
from torch import nn

from petl_ext.search import Constants, DepthSearch, OneArm, PlacementSearch, Search, SeveralArms

ACTIVATIONS = (torch.relu, torch.tanh, torch.sin, torch.square)


class Activated(nn.Module):
    def __init__(self):
        super().__init__()
        self.activation = 0
        self.linear = nn.Linear(1, 1)
        nn.init.ones_(self.linear.weight)

    def forward(self, x, labels):
        output = ACTIVATIONS[self.activation](self.linear(x))
        return {"loss": F.mse_loss(output, labels), "output": output}


class ActivationChoice(OneArm):
    """All that a choice must say."""

    verb, options_key, measure_name, measures_key = "use", "activations", "loss", "losses"

    def take(self, order):
        return order[0]

    def draw_to_compare(self, bandit, constants):
        return list(bandit.draw(3, replacement=True))

    def chosen(self):
        return self.model.activation

    def choose(self, option):
        self.model.activation = option


class ActivationSearch(Search):
    def __init__(self, model, seed=0, process_group=None, **constants):
        choice = ActivationChoice(model, len(ACTIVATIONS))
        super().__init__(choice, Constants(**constants), seed, process_group, reward=lambda loss: -loss)


class Masked(nn.Module):
    """Takes some of six features; the last three hold nothing but noise."""

    def __init__(self):
        super().__init__()
        self.kept = ()

    def forward(self, x):
        return x[..., list(self.kept)].square().mean()


class FeatureChoice(SeveralArms):
    verb, options_key, measure_name, measures_key = "keep", "masks", "score", "scores"

    def take(self, order):
        return tuple(sorted(order[:3])) if len(order) >= 3 else None

    def draw_to_compare(self, bandit, constants):
        return bandit.draw_distinct(4, self.take)

    def chosen(self):
        return self.model.kept

    def choose(self, option):
        self.model.kept = option


class FeatureSearch(Search):
    def __init__(self, model, seed=0, process_group=None, **constants):
        super().__init__(FeatureChoice(model, 6), Constants(**constants), seed, process_group)


@dataclass(frozen=True)
class Searched:
    """A search, a new model for it, and its choice as a number."""

    search_class: type
    new_model: Callable
    arguments: dict
    number: Callable

    def new(self, **constants):
        return self.search_class(self.new_model(), **self.arguments, **constants)

    def compute(self, search, seed=0):
        """A measure that depends on the choice and on how often it has been asked for."""
        generator = random.Random(seed)
        return lambda: 0.1 + 0.2 * self.number(search.model) + generator.random()


SEARCHED = {
    "depth": Searched(
        DepthSearch, lambda: attached()[0], {"num_skip": 2}, lambda model: sum(model.petl_attachment.skipped)
    ),
    "placement": Searched(PlacementSearch, Placed, {}, lambda model: model.insert_layer),
    "activation": Searched(ActivationSearch, Activated, {}, lambda model: model.activation),
    "features": Searched(FeatureSearch, Masked, {}, lambda model: sum(model.kept)),
}


@pytest.fixture(params=SEARCHED.values(), ids=SEARCHED)
def searched(request):
    return request.param


def run_search(search, steps, compute):
    drawn = []
    for _ in range(steps):
        drawn.append(search.sample())
        if search.is_due:
            search.update(compute)
    return drawn


@pytest.mark.parametrize("steps", [7, 20, 23, 61])
def test_a_loaded_state_has_the_same_future(searched, steps, tmp_path):
    constants = {"seed": 3, "interval": 4, "warmup_steps": 5, "search_steps": 60}
    search, resumed = searched.new(**constants), searched.new(**constants)
    run_search(search, steps, searched.compute(search))
    resumed.load_state_dict(json_copy(search.state_dict()))
    search.save(tmp_path / "search.json")
    read = searched.search_class.load(tmp_path / "search.json", searched.new_model())
    assert search.state_dict() == resumed.state_dict() == read.state_dict()
    futures = [run_search(each, 60, searched.compute(each, seed=1)) for each in (search, resumed, read)]
    assert futures[0] == futures[1] == futures[2]
    assert search.state_dict() == resumed.state_dict() == read.state_dict()
    assert search.finished and futures[0][-7:] == [search.selection()] * 7


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
def test_an_exception_while_options_are_compared_leaves_the_search_as_it_was(searched, error):
    search, twin = searched.new(interval=2), searched.new(interval=2)
    search.model.train()
    for each in (search, twin):
        run_search(each, 21, searched.compute(each))
        each.sample()
    before, drawn, calls = search.state_dict(), searched.number(search.model), iter([1.0])

    def failing():
        value = next(calls, None)
        if value is None:
            raise error
        return value

    with pytest.raises(error):
        search.update(failing)
    assert search.state_dict() == before and searched.number(search.model) == drawn
    assert all(module.training for module in search.model.modules())
    for each in (search, twin):
        run_search(each, 20, searched.compute(each, seed=1))
    assert search.state_dict() == twin.state_dict()


def test_a_search_says_what_it_is(searched):
    search = searched.new(interval=1)
    run_search(search, 3, searched.compute(search))
    assert repr(search) == f"{searched.search_class.__name__}({search.choice}, step=3, finished=False)"
    selection = search.apply()
    assert repr(search).endswith("step=3, finished=True)")
    shown = selection if isinstance(selection, int) else list(selection)
    assert str(shown) in search.summary() and "after 3 updates" in search.summary()
    assert 0 < search.entropy <= 1


def test_a_choice_of_a_few_lines_finds_the_best_option():
    torch.manual_seed(0)
    search = ActivationSearch(Activated(), seed=2, step_size=2.0)
    optimizer = torch.optim.SGD(search.model.parameters(), lr=0.01)
    for _ in range(60):
        x = 3 * torch.randn(32, 1)
        search.sample()
        search.model(x, x.sin())["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
        search.update(lambda: search.model(x, x.sin())["loss"])  # noqa: B023
    assert search.apply() == search.model.activation == ACTIVATIONS.index(torch.sin)
    assert search.history[-1].keys() >= {"activations", "losses"}


def test_a_choice_of_several_of_a_few_lines_finds_the_best_option():
    search = FeatureSearch(Masked(), seed=1, step_size=5.0, interval=1)
    x = torch.tensor([1.0, 1, 1, 0.1, 0.1, 0.1])
    run_search(search, 150, lambda: search.model(x))
    assert search.apply() == search.model.kept == (0, 1, 2)


def test_a_choice_of_a_few_lines_is_searched_in_a_trainer(tmp_path):
    from transformers import Trainer, TrainingArguments

    from petl_ext.hf import SearchCallback

    x = torch.linspace(-3, 3, 16)[:, None]
    data = [{"x": row, "labels": row.sin()} for row in x]
    search = ActivationSearch(Activated(), seed=2)
    quiet = {"use_cpu": True, "report_to": [], "disable_tqdm": True, "save_strategy": "no"}
    arguments = TrainingArguments(tmp_path, max_steps=6, per_device_train_batch_size=4, **quiet)
    trainer = Trainer(search.model, arguments, train_dataset=data, eval_dataset=data)
    SearchCallback(search).add_to(trainer)
    trainer.train()
    assert len(search.history) == search.step == 6 and search.model.activation == search.selection()
    assert any("search/loss" in entry for entry in trainer.state.log_history)


def test_a_choice_that_says_too_little_is_refused():
    class Half(OneArm):
        def take(self, order):
            return order[0]

    with pytest.raises(TypeError, match=r"Half .*choose.*chosen.*draw_to_compare"):
        Half(nn.Identity(), 2)
    with pytest.raises(TypeError, match="Search: reward must be a function, got 'half'"):
        Search(ActivationChoice(Activated(), 4), Constants(), reward="half")
    with pytest.raises(NotImplementedError, match="ActivationSearch has no picture"):
        ActivationSearch(Activated()).plot("unwritten.png")


# What searches wrote before a search was given a choice.
STORED = {
    "depth": {
        "format": 1,
        "layers": [f"layers.{index}" for index in range(8)],
        "num_skip": 2,
        "max_macs": None,
        "costs": None,
        "constants": {
            "warmup_steps": None,
            "search_steps": None,
            "interval": 1,
            "num_subsets": 2,
            "step_size": 1.0,
            "evaluation_mode": "eval",
            "ramp_steps": 0,
            "probability": "sigmoid",
            "temperature": 1.0,
            "baseline": True,
        },
        "bandit": {
            "num_arms": 8,
            "seed": 7,
            "step_size": 1.0,
            "probability": "sigmoid",
            "temperature": 1.0,
            "baseline": True,
            "preferences": [-0.029831402317648886, 0.0, 0.029831402317648886, 0.0, 0.0, 0.0, 0.0, 0.0],
            "draws": 4,
        },
        "step": 2,
        "since_update": 1,
        "finished": False,
        "selection": [1, 2],
        "selected_layers": ["layers.1", "layers.2"],
        "history": [
            {
                "step": 1,
                "subsets": [[2, 4], [0, 4]],
                "losses": [0.5, 1.0],
                "rewards": [0.6065306597126334, 0.36787944117144233],
                "preferences": [-0.029831402317648886, 0.0, 0.029831402317648886, 0.0, 0.0, 0.0, 0.0, 0.0],
                "selection": [1, 2],
            }
        ],
    },
    "placement": {
        "format": 1,
        "num_layers": 6,
        "constants": {
            "warmup_steps": None,
            "search_steps": None,
            "interval": 1,
            "num_samples": 2,
            "step_size": 0.005,
            "evaluation_mode": "eval",
            "temperature": 1.0,
        },
        "bandit": {
            "num_arms": 6,
            "seed": 7,
            "step_size": 0.005,
            "probability": "softmax",
            "temperature": 1.0,
            "baseline": True,
            "preferences": [0.0, 0.0, 0.008680555555555556, 0.0, -0.008680555555555556, 0.0],
            "draws": 2,
        },
        "step": 1,
        "since_update": 0,
        "finished": True,
        "selection": 2,
        "history": [
            {
                "step": 1,
                "layers": [2, 4],
                "scores": [50.0, 25.0],
                "rewards": [50.0, 25.0],
                "preferences": [0.0, 0.0, 0.008680555555555556, 0.0, -0.008680555555555556, 0.0],
                "selection": 2,
            }
        ],
    },
}
NEXT = {"depth": [(1, 3), (2, 7)], "placement": [2, 2]}


@pytest.mark.parametrize("name", STORED)
def test_a_stored_search_is_read_and_goes_on(name, tmp_path):
    (tmp_path / "search.json").write_text(json.dumps(STORED[name]))
    searched = SEARCHED[name]
    search = searched.search_class.load(tmp_path / "search.json", searched.new_model())
    assert search.state_dict() == STORED[name]
    assert [search.sample() for _ in range(2)] == NEXT[name]
