"""The state of a search as a dict that is ready for JSON, its checks, and its files."""

import copy
import dataclasses
import json
import math
import reprlib
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from torch import nn

from petl_ext.saving import written_whole
from petl_ext.search.bandit import are_numbers

FORMAT = 1
Stored = TypeVar("Stored", bound="StoredSearch")


class StoredSearch:
    """The part of a `Search` that outlives its process; `Search` derives from it."""

    constants_class: ClassVar[type]

    def state_dict(self) -> dict:
        """All of the search but model, functions and process group, ready for JSON."""
        selection = self.selection()
        return {
            "format": FORMAT,
            **_settings(self),
            "bandit": self.bandit.state_dict(),
            "step": self.step,
            "since_update": self.since_update,
            "finished": self.finished,
            "selection": self.choice.to_json(selection),
            **self.choice.described(selection),
            "history": copy.deepcopy(self.history),
        }

    def load_state_dict(self, state: dict) -> None:
        """Goes on where the search that gave the state was. Weights and optimizer are the training's own.

        Raises:
            ValueError: it is no state, or not of this search: other layers, goal or constants. Nothing has changed.
        """
        _check_settings(self, state)
        _check_progress(self, state)
        self.bandit.load_state_dict(state.get("bandit"))
        self.step = state["step"]
        self.since_update = state["since_update"]
        self.fixed = self.choice.from_json(state["selection"]) if state["finished"] else None
        self.history = copy.deepcopy(state["history"])

    def save(self, path: str | Path) -> None:
        """Writes the state to a file, which is complete or, after an error, as it was."""
        text = json.dumps(self.state_dict(), indent=2, allow_nan=False) + "\n"
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with written_whole(path) as unfinished:
            unfinished.write_text(text, encoding="utf-8")

    @classmethod
    def load(cls: type[Stored], path: str | Path, model: nn.Module, **arguments: Any) -> Stored:
        """The search that `save` wrote, on a model with the same layers.

        Args:
            arguments: of the class, what no file holds: process_group and, for a `DepthSearch`, reward.

        Raises:
            ValueError: the file is none of `save`, or does not fit the model.
        """
        try:
            state = json.loads(Path(path).read_text(encoding="utf-8"))
            stored = cls.arguments_of(state)
            constants = cls.constants_class(**state["constants"])
            seed = state["bandit"]["seed"]
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path}: not what {cls.__name__}.save writes: {error!r}") from error
        search = cls(model, **stored, seed=seed, **arguments, **dataclasses.asdict(constants))
        search.load_state_dict(state)
        return search

    @classmethod
    def arguments_of(cls, state: dict) -> dict:
        """The arguments of the class, other than constants and seed, that a state holds."""
        return {}


def entry_of(search, options, values, rewards):
    """The history's entry of an update that has compared these options; a value that is not finite is None in it."""
    choice = search.choice
    return {
        "step": search.step,
        choice.options_key: [choice.to_json(option) for option in options],
        choice.measures_key: [value if math.isfinite(value) else None for value in values],
        "rewards": rewards,
        "preferences": list(search.bandit.preferences),
        "selection": choice.to_json(search.selection()),
    }


def _settings(search):
    return {**search.choice.settings(), "constants": dataclasses.asdict(search.constants)}


def _check_settings(search, state):
    if not isinstance(state, dict):
        raise ValueError(f"{search.name}: state must be a dict, got {state!r}")
    if state.get("format") != FORMAT:
        raise ValueError(f"{search.name}: state must be of format {FORMAT}, got {state.get('format')!r}")
    for name, ours in _settings(search).items():
        if state.get(name) != ours:
            raise ValueError(
                f"{search.name}: the state is of another search: its {name} must be {ours!r}, got {state.get(name)!r}"
            )


def _check_progress(search, state):
    """Checks all of a state but its settings and its bandit."""
    step, since_update, finished = (state.get(name) for name in ("step", "since_update", "finished"))
    history, selection = state.get("history"), state.get("selection")
    for name, value, is_right in (
        ("step", step, type(step) is int and step >= 0),
        ("since_update", since_update, type(since_update) is int and since_update >= 0),
        ("finished", finished, type(finished) is bool),
        ("selection", selection, search.choice.is_stored(selection)),
        ("history", history, isinstance(history, list) and all(_is_entry(search.choice, entry) for entry in history)),
    ):
        if not is_right:
            raise ValueError(f"{search.name}: state must have a valid {name}, got {reprlib.repr(value)}")


def _is_entry(choice, entry):
    """Whether it is one of the history's, as JSON has it."""
    names = {"step", choice.options_key, choice.measures_key, "rewards", "preferences", "selection"}
    if not isinstance(entry, dict) or entry.keys() != names or not isinstance(entry[choice.options_key], list):
        return False
    options, values = entry[choice.options_key], entry[choice.measures_key]
    return (
        type(entry["step"]) is int
        and all(choice.is_stored(option) for option in [entry["selection"], *options])
        and isinstance(values, list)
        and are_numbers([0.0 if value is None else value for value in values], len(options))
        and are_numbers(entry["rewards"], len(options))
        and are_numbers(entry["preferences"], choice.num_arms)
    )
