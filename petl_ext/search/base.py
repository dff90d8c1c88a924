"""What all searches have in common: draws for training, comparisons on validation data, processes, files."""

import copy
import dataclasses
import json
import logging
import math
import reprlib
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
import torch.distributed as dist
from torch.nn.parallel import DataParallel, DistributedDataParallel

from petl_ext.saving import written_whole
from petl_ext.search.bandit import Bandit, are_numbers

logger = logging.getLogger("petl_ext")

FORMAT = 1


@dataclass(frozen=True)
class Constants:
    """The constants that every search has; each adds its own and says what they mean."""

    warmup_steps: int | None = None
    search_steps: int | None = None
    interval: int = 1

    search: ClassVar[str]
    least: ClassVar[dict] = {"warmup_steps": 0, "search_steps": 1, "interval": 1}

    def __post_init__(self):
        for name, smallest in self.least.items():
            value = getattr(self, name)
            may_be_none = name in ("warmup_steps", "search_steps")
            if not (type(value) is int and value >= smallest) and not (value is None and may_be_none):
                raise ValueError(f"{self.search}: {name} must be an integer of {smallest} or more, got {value!r}")
        if self.evaluation_mode not in ("eval", "train"):
            raise ValueError(f'{self.search}: evaluation_mode must be "eval" or "train", got {self.evaluation_mode!r}')
        if self.search_steps is not None and self.first_update > self.search_steps:
            raise ValueError(
                f"{self.search}: search_steps={self.search_steps} ends the search before its first update, which "
                f"warmup_steps={self.warmup_steps} and interval={self.interval} put at step {self.first_update}"
            )

    @property
    def first_update(self):
        """The step with which the first update comes."""
        return max((self.warmup_steps or 0) + 1, self.interval)


class Search:
    """A choice among a model's layers that is drawn anew for every training step and learned by a bandit.

    A choice is what a subclass makes of an order of the layers: a tuple of some of them, or a single one. A subclass
    says how it is drawn, made and rewarded, in the methods at the end, and which words name it.

    Args:
        model: what is searched; DistributedDataParallel around it may be there or not.
        num_layers: the bandit's number of arms.
        seed: an integer.
        process_group: the torch.distributed group to average over; None: all processes.
        constants: a `Constants`.
    """

    constants_class: ClassVar[type]
    verb: ClassVar[str]  # what is done with the selected layers, for progress bars
    drawn: ClassVar[str]  # the key of the compared choices in the history
    measure: ClassVar[str]  # what is measured of each, "loss" or "score"
    measures: ClassVar[str]  # its key in the history
    warmup_epochs: ClassVar[float]  # epochs before the first update where a user says nothing

    def __init__(self, model, num_layers, seed, process_group, constants):
        self.model = model
        self.process_group = process_group
        self.constants = constants
        self.bandit = Bandit(
            num_layers, seed, constants.step_size, constants.probability, constants.temperature, constants.baseline
        )
        self.step = 0
        self.finished = False
        self.history = []
        self._since_update = 0
        self._fixed = None

    @property
    def is_due(self):
        """Whether it is time for `update`."""
        warm = self.step > (self.constants.warmup_steps or 0)
        return not self.finished and warm and self._since_update >= self.constants.interval

    def schedule(self, warmup_steps, search_steps):
        """Sets these constants of a search that has not begun.

        Raises:
            ValueError: it has begun, a value is out of its range, or the search would end before its first update.
                Nothing has changed.
        """
        if self.step:
            raise ValueError(f"{self._name}: the schedule cannot change after {self.step} steps")
        self.constants = dataclasses.replace(self.constants, warmup_steps=warmup_steps, search_steps=search_steps)

    def sample(self):
        """Begins a training step: draws a choice and makes it, or the selection when that is fixed.

        An exception leaves the whole search as it was.

        Returns:
            The choice, of the same kind as `selection`.
        """
        with self._or_as_before():
            if self.constants.search_steps is not None and self.step >= self.constants.search_steps:
                self.finish()
            if self.finished:
                return self.use_selection()
            choice = self._draw()
            self._choose(choice)
        self.step += 1
        self._since_update += 1
        return choice

    def update(self, compute):
        """Compares drawn choices and moves the preferences. Call it after the step's backward pass.

        Afterwards the model's choice, torch's generators and the modules' training flags are as they were, after an
        exception too, which leaves the whole search as it was.

        Args:
            compute: returns the measure, a loss or a score, of one batch, the same each time; called once per
                different choice, without gradients, each time from the same state of torch's generators.

        Raises:
            RuntimeError: the selection is fixed, or the processes have drawn different choices.
            TypeError: `compute` cannot be called, or returns no number.
            ValueError: a reward is not a finite number although the measure is.
        """
        check_callable(self._name, f"compute_{self.measure}", compute)
        if self.finished:
            raise RuntimeError(f"{self._name}: the selection is fixed, so there is nothing to update")
        with self._or_as_before():
            drawn = self._draw_to_compare()
            measured = self._measure(drawn, compute)
            rewards = self._rewards(measured)
            self.bandit.update([self._layers_of(choice) for choice in drawn], rewards)
        self._since_update = 0
        self.history.append(
            {
                "step": self.step,
                self.drawn: [self._to_json(choice) for choice in drawn],
                self.measures: [value if math.isfinite(value) else None for value in measured],
                "rewards": rewards,
                "preferences": list(self.bandit.preferences),
                "selection": self._to_json(self.selection()),
            }
        )

    def selection(self):
        """The present best choice by preference; of equal preferences the lower index counts as the larger."""
        return self._fixed if self.finished else self._take(self.bandit.ranking())

    def is_stable(self, patience):
        """Whether the last `patience` updates have left the selection as it was and no tie decides it."""
        selections = [entry["selection"] for entry in self.history[-patience - 1 :]]
        unchanged = len(selections) == patience + 1 and all(s == selections[0] for s in selections)
        preferences = self.bandit.preferences
        of_equals_the_higher = sorted(range(len(preferences)), key=lambda layer: (-preferences[layer], -layer))
        return unchanged and self._take(of_equals_the_higher) == self._take(self.bandit.ranking())

    def use_selection(self):
        """Makes the present selection the model's choice until the next `sample`: for validation between steps.

        Returns:
            The selection.
        """
        selection = self.selection()
        if self._chosen() != selection:
            self._choose(selection)
        return selection

    def finish(self):
        """Fixes the present selection; from now on `sample` makes it the model's choice."""
        self._fixed = self.selection()
        self.finished = True

    def apply(self):
        """Ends the search and makes the selection the model's choice. An exception leaves the search as it was.

        Returns:
            The selection.
        """
        if not self.history:
            logger.warning("%s: applied before the first update: the selection means nothing", self._name)
        with self._or_as_before():
            self.finish()
            return self.use_selection()

    def state_dict(self):
        """All of the search but model, functions and process group, ready for JSON."""
        return {
            "format": FORMAT,
            **self._settings(),
            "bandit": self.bandit.state_dict(),
            "step": self.step,
            "since_update": self._since_update,
            "finished": self.finished,
            **self._found(),
            "history": copy.deepcopy(self.history),
        }

    def load_state_dict(self, state):
        """Goes on where the search that gave the state was. Weights and optimiser are the training's own.

        Raises:
            ValueError: it is no state, or not of this search: other layers, goal or constants. Nothing has changed.
        """
        if not isinstance(state, dict):
            raise ValueError(f"{self._name}: a state is a dict, got {state!r}")
        if state.get("format") != FORMAT:
            raise ValueError(f"{self._name}: expected a state of format {FORMAT}, found {state.get('format')!r}")
        for name, ours in self._settings().items():
            if state.get(name) != ours:
                raise ValueError(
                    f"{self._name}: the state is of another search: expected {name} {ours!r}, found {state.get(name)!r}"
                )
        self._check_progress(state)
        self.bandit.load_state_dict(state.get("bandit"))
        self.step = state["step"]
        self._since_update = state["since_update"]
        self.finished = state["finished"]
        self._fixed = self._from_json(state["selection"]) if self.finished else None
        self.history = copy.deepcopy(state["history"])

    def to_json(self, path):
        """Writes the state to a file, which is complete or, after an error, as it was."""
        text = json.dumps(self.state_dict(), indent=2, allow_nan=False) + "\n"
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with written_whole(path) as unfinished:
            unfinished.write_text(text, encoding="utf-8")

    @property
    def _name(self):
        return type(self).__name__

    @classmethod
    def _read(cls, path, model, **arguments):
        """The search that `to_json` wrote."""
        try:
            state = json.loads(Path(path).read_text(encoding="utf-8"))
            stored = cls._stored_arguments(state)
            constants = cls.constants_class(**state["constants"])
            seed = state["bandit"]["seed"]
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path}: not what {cls.__name__}.to_json writes: {error!r}") from error
        search = cls(model, **stored, seed=seed, **arguments, **dataclasses.asdict(constants))
        search.load_state_dict(state)
        return search

    def _check_progress(self, state):
        """Checks all of a state but its settings and its bandit."""
        step, since_update, finished = (state.get(name) for name in ("step", "since_update", "finished"))
        history, selection = state.get("history"), state.get("selection")
        for name, value, is_right in (
            ("step", step, type(step) is int and step >= 0),
            ("since_update", since_update, type(since_update) is int and since_update >= 0),
            ("finished", finished, type(finished) is bool),
            ("selection", selection, self._is_choice(selection)),
            ("history", history, isinstance(history, list) and all(map(self._is_entry, history))),
        ):
            if not is_right:
                raise ValueError(f"{self._name}: the state has a wrong {name} or none, found {reprlib.repr(value)}")

    def _is_entry(self, entry):
        """Whether it is one of the history's, as JSON has it."""
        names = {"step", self.drawn, self.measures, "rewards", "preferences", "selection"}
        if not isinstance(entry, dict) or entry.keys() != names or not isinstance(entry[self.drawn], list):
            return False
        count, measured = len(entry[self.drawn]), entry[self.measures]
        return (
            type(entry["step"]) is int
            and all(self._is_choice(choice) for choice in [entry["selection"], *entry[self.drawn]])
            and isinstance(measured, list)
            and are_numbers([0.0 if value is None else value for value in measured], count)
            and are_numbers(entry["rewards"], count)
            and are_numbers(entry["preferences"], self.bandit.num_arms)
        )

    def _is_layer(self, value):
        return type(value) is int and 0 <= value < self.bandit.num_arms

    @contextmanager
    def _or_as_before(self):
        """An exception inside leaves the search as it was."""
        before = self.bandit.draws, self.finished, self._fixed
        try:
            yield
        except BaseException:
            self.bandit.draws, self.finished, self._fixed = before
            raise

    def _measure(self, drawn, compute):
        """One number for each of `drawn`, averaged over the processes."""
        different = list(dict.fromkeys(drawn))
        measured = self._mean_over_processes(drawn, self._measure_here(different, compute))
        return [measured[different.index(choice)] for choice in drawn]

    def _measure_here(self, choices, compute):
        measured, devices = [], self._cuda_devices()
        with self._as_it_was():
            if self.constants.evaluation_mode == "eval":
                self.model.eval()
            for choice in choices:
                self._choose(choice)
                with torch.no_grad(), torch.random.fork_rng(devices, device_type="cuda"):
                    measured.append(number_of(compute(), f"{self._name}: compute_{self.measure}"))
        return measured

    @contextmanager
    def _as_it_was(self):
        training = {module: module.training for module in self.model.modules()}
        chosen = self._chosen()
        self._choose(chosen)  # where the model refuses a change of its choice, it does so before anything has changed
        try:
            yield
        finally:
            for module, mode in training.items():
                module.training = mode
            self._choose(chosen)

    def _cuda_devices(self):
        if not torch.cuda.is_initialized():
            return set()
        return {parameter.device for parameter in self.model.parameters() if parameter.device.type == "cuda"}

    def _mean_over_processes(self, drawn, measured):
        if not dist.is_available() or not dist.is_initialized() or dist.get_world_size(self.process_group) == 1:
            return measured
        everyones = [None] * dist.get_world_size(self.process_group)
        dist.all_gather_object(everyones, (drawn, self.bandit.preferences, measured), self.process_group)
        if any(other[:2] != everyones[0][:2] for other in everyones):
            raise RuntimeError(
                f"{self._name}: the processes have drawn different {self.drawn}; give each the same seed and call "
                "sample and update equally often"
            )
        return [_mean(each) for each in zip(*(other[2] for other in everyones), strict=True)]

    def _rewards(self, measured):
        """A finite number for each, larger for a better choice."""
        rewards = [self._reward_of(value) if math.isfinite(value) else None for value in measured]
        # What is no number must not be the best, neither where rewards are negative.
        lowest = min([0.0, *(reward for reward in rewards if reward is not None)])
        wrong = next((value for value in measured if not math.isfinite(value)), None)
        if wrong is not None:
            values = (self._name, self.step, self.measure, wrong, lowest)
            logger.warning("%s: step %d: a %s is %s; its reward is %s", *values)
        return [lowest if reward is None else reward for reward in rewards]

    def _found(self):
        """What the state says of the selection."""
        return {"selection": self._to_json(self.selection())}

    # What a subclass says.

    _to_json: ClassVar  # a choice as the history and files have it
    _from_json: ClassVar

    @property
    def entropy(self):
        """How open the search is, from 1 to 0, when nothing is open."""
        raise NotImplementedError

    @classmethod
    def _stored_arguments(cls, state):
        """The arguments, but for constants and seed, that a state tells."""
        raise NotImplementedError

    def _settings(self):
        """What a state must agree with, ready for JSON."""
        raise NotImplementedError

    def _draw(self):
        """A choice for a training step."""
        raise NotImplementedError

    def _draw_to_compare(self):
        """A list of choices for an update."""
        raise NotImplementedError

    def _take(self, order):
        """The choice that an order of all layers makes."""
        raise NotImplementedError

    def _layers_of(self, choice):
        """A tuple of layers."""
        raise NotImplementedError

    def _chosen(self):
        """The model's present choice."""
        raise NotImplementedError

    def _choose(self, choice):
        """Makes it the model's."""
        raise NotImplementedError

    def _is_choice(self, stored):
        """Whether it is a choice as JSON has it."""
        raise NotImplementedError

    def _reward_of(self, value):
        """A finite number, larger for a better choice, from a finite measure."""
        return value


def unwrapped(model):
    """The model within DistributedDataParallel or DataParallel."""
    return model.module if isinstance(model, DataParallel | DistributedDataParallel) else model


def check_callable(name, argument, value):
    """Raises TypeError where the value of this argument cannot be called."""
    if not callable(value):
        raise TypeError(f"{name}: {argument} must be a function, got {value!r}")


def number_of(value, function):
    """The float that a function has returned, also as a tensor; any other thing raises TypeError."""
    several = isinstance(value, torch.Tensor) and value.numel() != 1
    if several or isinstance(value, str):
        found = f"a tensor of shape {tuple(value.shape)}" if several else repr(value)
        raise TypeError(f"{function} must return one number, got {found}")
    try:
        return float(value)
    except (TypeError, ValueError) as error:
        raise TypeError(f"{function} must return one number, got {value!r}") from error


def _mean(measured):
    # fsum rounds once, so that the order of the processes does not matter; it refuses inf - inf.
    return math.fsum(measured) / len(measured) if all(map(math.isfinite, measured)) else math.nan
