"""What a search decides about a model.

A `Choice` says what its options are, how they are drawn, and how the model takes one. An option is made of a bandit's
arms: of a single one (`OneArm`) or of several (`SeveralArms`).
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel


class Choice(ABC):
    """What a `Search` decides. Derive from `OneArm` or `SeveralArms`.

    Args:
        model: the module whose forward pass the chosen option changes.
        num_arms: how many arms the options are made of.
    """

    verb: ClassVar[str]  # what is done with an option, for progress bars: "skip"
    options_key: ClassVar[str]  # of the compared options, in the history and in messages: "subsets"
    measure_name: ClassVar[str]  # what is measured of each option, "loss" or "score"; users give compute_<name>
    measures_key: ClassVar[str]  # of these measures in the history: "losses"

    def __init__(self, model: nn.Module, num_arms: int):
        self.model = model
        self.num_arms = num_arms

    @abstractmethod
    def take(self, order):
        """The option that an order of all arms makes."""

    @abstractmethod
    def draw_to_compare(self, bandit, constants):
        """A list of options for an update."""

    @abstractmethod
    def chosen(self):
        """The option that the model has now."""

    @abstractmethod
    def choose(self, option):
        """Gives the model this option."""

    def draw(self, bandit, constants, step):
        """An option for the training step after `step` others."""
        return self.take(bandit.order())

    def settings(self):
        """What a state must agree with, ready for JSON."""
        return {"num_arms": self.num_arms}

    def described(self, option):
        """What a state holds about the selected option besides the option itself, ready for JSON."""
        return {}

    def summary(self, option, updates):
        """What was found after so many updates, as the rest of a sentence that begins with the search's name."""
        return f"chooses {self.to_json(option)} after {updates} updates"

    def plot(self, search, path):
        """Draws the search into an image file."""
        raise NotImplementedError(f"{search.name} has no picture")

    def is_arm(self, value) -> bool:
        return type(value) is int and 0 <= value < self.num_arms

    def __str__(self):
        return f"{self.num_arms} arms"


class OneArm(Choice):
    """A choice of one arm: an option is its index."""

    def arms_of(self, option: int) -> tuple[int, ...]:
        return (option,)

    def to_json(self, option: int) -> int:
        return int(option)

    def from_json(self, stored: int) -> int:
        return stored

    def is_stored(self, value: Any) -> bool:
        """Whether it is an option as JSON has it."""
        return self.is_arm(value)

    def entropy(self, probabilities: Sequence[float]) -> float:
        """Of the arms' probabilities, as a share of the largest."""
        return torch.special.entr(_double(probabilities)).sum().item() / math.log(self.num_arms)


class SeveralArms(Choice):
    """A choice of several arms: an option is a tuple of their indices, ascending."""

    def arms_of(self, option: tuple[int, ...]) -> tuple[int, ...]:
        return option

    def to_json(self, option: tuple[int, ...]) -> list[int]:
        return list(option)

    def from_json(self, stored: list[int]) -> tuple[int, ...]:
        return tuple(stored)

    def is_stored(self, value: Any) -> bool:
        """Whether it is an option as JSON has it."""
        return isinstance(value, list) and all(map(self.is_arm, value)) and value == sorted(set(value))

    def entropy(self, probabilities: Sequence[float]) -> float:
        """Of whether an arm is taken or not, in bits per arm."""
        p = _double(probabilities)
        return (torch.special.entr(p) + torch.special.entr(1 - p)).mean().item() / math.log(2)


def unwrapped(model: nn.Module) -> nn.Module:
    """The model within DistributedDataParallel or DataParallel."""
    return model.module if isinstance(model, DataParallel | DistributedDataParallel) else model


def _double(values):
    return torch.tensor(values, dtype=torch.float64)
