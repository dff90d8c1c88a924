"""A search: while a model trains, it learns which option of a choice serves a task best."""

import dataclasses
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

from torch.distributed import ProcessGroup

from petl_ext.search.bandit import are_numbers
from petl_ext.search.choice import Choice
from petl_ext.search.comparing import check_callable, measured, rewards_of
from petl_ext.search.constants import Constants
from petl_ext.search.state import StoredSearch, entry_of

logger = logging.getLogger("petl_ext")


class Search(StoredSearch):
    """A choice that is drawn anew for every training step and learned by a bandit.

    Args:
        choice: what is decided; an attribute too.
        constants: when and how; an attribute too.
        seed: an integer.
        process_group: the torch.distributed group to average over; None: all processes.
        reward: from a measure, averaged over processes, to a number that is larger for a better option.

    Attributes:
        model: what is searched.
        bandit: the `Bandit`, whose preferences the options' arms have.
        step: how often `sample` has drawn.
        since_update: how often it has since the last update.
        fixed: the selection when it is fixed, else None.
        history: one dict per update, ready for JSON.

    Raises:
        ValueError: an argument is out of its range.
        TypeError: reward cannot be called.
    """

    constants_class: ClassVar[type] = Constants

    def __init__(
        self,
        choice: Choice,
        constants: Constants,
        seed: int = 0,
        process_group: ProcessGroup | None = None,
        reward: Callable[[float], float] = float,
    ):
        check_callable(self.name, "reward", reward)
        self.choice = choice
        self.model = choice.model
        self.constants = constants
        self.process_group = process_group
        self.reward = reward
        self.bandit = constants.new_bandit(choice.num_arms, seed)
        self.step = 0
        self.since_update = 0
        self.fixed = None
        self.history = []

    @property
    def name(self) -> str:
        """Its class's, for messages."""
        return type(self).__name__

    @property
    def finished(self) -> bool:
        """Whether the selection is fixed."""
        return self.fixed is not None

    @property
    def is_due(self) -> bool:
        """Whether it is time for `update`."""
        warm = self.step > (self.constants.warmup_steps or 0)
        return not self.finished and warm and self.since_update >= self.constants.interval

    @property
    def entropy(self) -> float:
        """How open the search is: 0 when nothing is open.

        Where one arm is chosen, the entropy of the probabilities as a share of the largest, which is 1 at the start.
        Where several are, in bits per arm: at the start 1 with sigmoid, and less with softmax, where p is 1 / arms.
        """
        return self.choice.entropy(self.bandit.probabilities)

    def schedule(self, warmup_steps: int | None, search_steps: int | None) -> None:
        """Sets these constants of a search that has not begun.

        Raises:
            ValueError: it has begun, a value is out of its range, or the search would end before its first update.
                Nothing has changed.
        """
        if self.step:
            raise ValueError(f"{self.name}: the schedule cannot change after {self.step} steps")
        self.constants = dataclasses.replace(self.constants, warmup_steps=warmup_steps, search_steps=search_steps)

    def warm_start(self, values: Sequence[float], spread: float = 1.0) -> None:
        """Begins with preferences that follow what is known of the arms, which else are all 0.

        The papers' searches begin with 0. `petl_ext.search.one_by_one` and `block_influence` measure such values.

        Args:
            values: one per arm, larger for a better one. Standardized, times `spread`, they are the preferences.
            spread: how far they are trusted; with 0 all preferences are 0.

        Raises:
            ValueError: it has begun, not one finite value per arm, or spread is negative. Nothing has changed.
        """
        if self.step:
            raise ValueError(f"{self.name}: warm_start must come before the first step, got {self.step} steps")
        if not are_numbers(list(values), self.choice.num_arms):
            raise ValueError(f"{self.name}: values must be {self.choice.num_arms} finite numbers, got {values!r}")
        if not (math.isfinite(spread) and spread >= 0):
            raise ValueError(f"{self.name}: spread must be a finite number of 0 or more, got {spread!r}")
        self.bandit.preferences = [spread * value for value in _standardized(list(values))]

    def sample(self) -> Any:
        """Begins a training step: draws an option and gives it to the model, or the selection when that is fixed.

        An exception leaves the whole search as it was.

        Returns:
            The option, of the same kind as `selection`.
        """
        with self.unchanged_on_error():
            if self.constants.search_steps is not None and self.step >= self.constants.search_steps:
                self.finish()
            if self.finished:
                return self.use_selection()
            option = self.choice.draw(self.bandit, self.constants, self.step)
            self.choice.choose(option)
        self.step += 1
        self.since_update += 1
        return option

    def update(self, compute: Callable[[], float], /) -> None:
        """Compares drawn options on validation data and moves the preferences. Call it when `is_due`.

        Afterwards the model's option, torch's generators and the modules' training flags are as they were, after an
        exception too, which leaves the whole search as it was.

        The reward of a measure that is not finite is 0, or the lowest of the others where that is below 0; a warning
        says so.

        Args:
            compute: returns the loss or the score, as the search has it, of one batch, the same each time; called once
                per different option, without gradients, each time from the same state of torch's generators.

        Raises:
            RuntimeError: the selection is fixed, or the processes have drawn different options.
            TypeError: `compute` cannot be called, or it or the reward returns no number.
            ValueError: a reward is not a finite number although the measure is.
        """
        check_callable(self.name, f"compute_{self.choice.measure_name}", compute)
        if self.finished:
            raise RuntimeError(f"{self.name}: the selection is fixed, so there is nothing to update")
        with self.unchanged_on_error():
            options = self.choice.draw_to_compare(self.bandit, self.constants)
            values = measured(self, options, compute)
            rewards = rewards_of(self, values)
            self.bandit.update([self.choice.arms_of(option) for option in options], rewards)
        self.since_update = 0
        self.history.append(entry_of(self, options, values, rewards))

    def selection(self) -> Any:
        """The best option by preference; of equal preferences the lower index counts as the larger.

        An index where one arm is chosen; a tuple of indices, ascending, where several are.
        """
        return self.fixed if self.finished else self.choice.take(self.bandit.ranking())

    def is_stable(self, patience: int) -> bool:
        """Whether the last `patience` updates have left the selection as it was and no tie decides it."""
        selections = [entry["selection"] for entry in self.history[-patience - 1 :]]
        unchanged = len(selections) == patience + 1 and all(s == selections[0] for s in selections)
        preferences = self.bandit.preferences
        of_equals_the_higher = sorted(range(len(preferences)), key=lambda arm: (-preferences[arm], -arm))
        return unchanged and self.choice.take(of_equals_the_higher) == self.choice.take(self.bandit.ranking())

    def use_selection(self) -> Any:
        """Gives the model the present selection until the next `sample`: for validation between steps.

        Returns:
            The selection.
        """
        selection = self.selection()
        if self.choice.chosen() != selection:
            self.choice.choose(selection)
        return selection

    def finish(self) -> None:
        """Fixes the present selection; from now on `sample` gives it to the model."""
        self.fixed = self.selection()

    def apply(self) -> Any:
        """Ends the search and gives the model the selection. An exception leaves the search as it was.

        Returns:
            The selection.
        """
        if not self.history:
            logger.warning("%s: applied before the first update: the selection means nothing", self.name)
        with self.unchanged_on_error():
            self.finish()
            return self.use_selection()

    def summary(self) -> str:
        """What was found, as the rest of a sentence that begins with the search's name."""
        return self.choice.summary(self.selection(), len(self.history))

    def plot(self, path: str | Path) -> None:
        """Draws the preferences, and what was drawn and selected, over the steps into an image file.

        Raises:
            ValueError: no update has been made.
        """
        self.choice.plot(self, path)

    @contextmanager
    def unchanged_on_error(self) -> Iterator[None]:
        """An exception inside leaves the search as it was."""
        before = self.bandit.draws, self.fixed
        try:
            yield
        except BaseException:
            self.bandit.draws, self.fixed = before
            raise

    def __repr__(self):
        return f"{self.name}({self.choice}, step={self.step}, finished={self.finished})"


def _standardized(values):
    """With mean 0 and standard deviation 1; all 0 where they are equal."""
    if max(values) == min(values):
        return [0.0] * len(values)
    mean = math.fsum(values) / len(values)
    deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / len(values))
    return [(value - mean) / deviation for value in values]
