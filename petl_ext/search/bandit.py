"""A k-armed bandit over subsets of its arms. It knows no model."""

import math
import random
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from petl_ext.checks import check_choice, check_positive_integer, check_positive_number, check_switch

REDRAWS = 100


Take = Callable[[list[int]], tuple[int, ...] | None]  # see `Bandit.draw_distinct`


def _log_sigmoid(preferences):
    return [min(g, 0.0) - math.log1p(math.exp(-abs(g))) for g in preferences]


def _log_softmax(preferences):
    largest = max(preferences)
    log_sum = largest + math.log(sum(math.exp(g - largest) for g in preferences))
    return [g - log_sum for g in preferences]


LOG_PROBABILITIES = {"sigmoid": _log_sigmoid, "softmax": _log_softmax}


class Bandit:
    """Preferences g for arms 0, 1, ... (DAS, arXiv 2309.01479): a larger one makes the arm likelier to be drawn.

    A draw depends on the preferences, the seed and the number of draws before it, and on nothing else: not on torch's
    generators, the device or the number of processes. Without replacement its law is that of drawing one arm after the
    other with weights p, as torch.multinomial does: arms in ascending order of independent Exponential(p) numbers.
    These are compared by their logarithms, so that preferences of any size draw as they should.

    Args:
        num_arms: how many arms.
        seed: an integer.
        step_size: factor of every update.
        probability: "sigmoid": p_i = sigmoid(g_i), which need not sum to 1, or "softmax".
        temperature: p comes from g / temperature.
        baseline: whether the mean reward is subtracted from the rewards of an update.

    Attributes:
        preferences: list of floats, all 0 at the start.
        draws: how often `order` or `draw` has been called; `draw_distinct` calls `order` for each attempt.

    Raises:
        ValueError: an argument is out of its range.
    """

    def __init__(
        self,
        num_arms: int,
        seed: int = 0,
        step_size: float = 1.0,
        probability: str = "sigmoid",
        temperature: float = 1.0,
        baseline: bool = True,
    ):
        check_positive_integer("Bandit: num_arms", num_arms)
        if type(seed) is not int:
            raise ValueError(f"Bandit: seed must be an integer, got {seed!r}")
        for name, value in (("step_size", step_size), ("temperature", temperature)):
            check_positive_number(f"Bandit: {name}", value)
        check_choice("Bandit: probability", probability, LOG_PROBABILITIES)
        check_switch("Bandit: baseline", baseline)
        self.seed = seed
        self.step_size = step_size
        self.probability = probability
        self.temperature = temperature
        self.baseline = baseline
        self.preferences = [0.0] * num_arms
        self.draws = 0

    @property
    def num_arms(self) -> int:
        return len(self.preferences)

    @property
    def probabilities(self) -> list[float]:
        """p, one float per arm."""
        return [math.exp(value) for value in self._log_probabilities()]

    def ranking(self) -> list[int]:
        """All arms, the largest preference first; of equal ones the lower index."""
        return sorted(range(self.num_arms), key=lambda arm: -self.preferences[arm])

    def order(self, uniform: bool = False) -> list[int]:
        """All arms in a new random order: its first m are a draw of m without replacement.

        Args:
            uniform: whether all arms are equally likely instead of as their probabilities say.
        """
        return self._order(self._generator(), uniform)

    def draw(self, size: int = 1, replacement: bool = False, uniform: bool = False) -> tuple[int, ...]:
        """A tuple of `size` arms, ascending; with replacement an arm can occur more than once.

        Raises:
            ValueError: size is no positive integer or, without replacement, more than there are arms.
        """
        check_positive_integer("Bandit: size", size)
        if not replacement and size > self.num_arms:
            raise ValueError(f"Bandit: {size} different arms asked for, there are {self.num_arms}")
        generator = self._generator()
        if replacement:
            return tuple(sorted(self._order(generator, uniform)[0] for _ in range(size)))
        return tuple(sorted(self._order(generator, uniform)[:size]))

    def draw_distinct(self, count: int, take: Take) -> list[tuple[int, ...]]:
        """A list of `count` subsets, no two the same.

        Each is redrawn until it differs from those before it, as in DAS; after 100 attempts in vain, which only very
        unequal preferences cause, the next one of `best_distinct` is taken instead.

        Args:
            take: makes an order of arms into a subset, a tuple, or into None where these arms cannot make one. A
                subset must not contain another one.

        Raises:
            ValueError: there are fewer different subsets.
        """
        subsets = []
        while len(subsets) < count:
            attempts = (take(self.order()) for _ in range(REDRAWS))
            subset = next((s for s in attempts if s not in subsets), None)
            if subset is None:
                subset = self._best_but(subsets, take)
            if subset is None:
                raise ValueError(f"Bandit: {count} different subsets asked for, there are only {len(subsets)}")
            subsets.append(subset)
        return subsets

    def best_distinct(self, count: int, take: Take) -> list[tuple[int, ...]]:
        """`count` different subsets, made greedily of the most preferred arms; fewer where there are no more.

        The first is `take(ranking())`. For each further one, whenever `take` makes a subset that is there already, that
        subset's least preferred arm is left out of the ranking or, where nothing new can be made without it, its next
        one. Preferences are not summed: a subset of a greater sum can come later.
        """
        subsets = []
        while len(subsets) < count and (subset := self._best_but(subsets, take)) is not None:
            subsets.append(subset)
        return subsets

    def update(self, subsets: Sequence[Iterable[int]], rewards: Sequence[float]) -> None:
        """g_i += step_size * (R_j - mean R) * p_i * (1 - p_i) for every subset j and every arm i in it.

        p is that before the update; without a baseline, R_j itself stands in place of the difference.

        Raises:
            ValueError: not one finite reward per subset, or an arm that does not exist. Nothing has changed.
        """
        if len(subsets) != len(rewards) or not subsets:
            raise ValueError(f"Bandit: rewards must be one per subset, got {len(rewards)} for {len(subsets)} subsets")
        if not all(math.isfinite(reward) for reward in rewards):
            raise ValueError(f"Bandit: rewards must be finite, got {rewards}")
        if not all(arm in range(self.num_arms) for subset in subsets for arm in subset):
            raise ValueError(f"Bandit: arms must be 0 to {self.num_arms - 1}, got {subsets}")
        slopes = [p * (1 - p) for p in self.probabilities]
        mean = math.fsum(rewards) / len(rewards) if self.baseline else 0.0
        for subset, reward in zip(subsets, rewards, strict=True):
            for arm in subset:
                self.preferences[arm] += self.step_size * (reward - mean) * slopes[arm]

    def state_dict(self) -> dict[str, Any]:
        """All that the future depends on, ready for JSON."""
        return {**self._settings(), "preferences": list(self.preferences), "draws": self.draws}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse of `state_dict`.

        Raises:
            ValueError: it is no such state, or that of a bandit with other arguments. Nothing has changed.
        """
        if not isinstance(state, dict):
            raise ValueError(f"Bandit: state must be a dict, got {state!r}")
        settings = {name: value for name, value in state.items() if name not in ("preferences", "draws")}
        if settings != self._settings():
            raise ValueError(f"Bandit: state must be of {self._settings()}, got {settings}")
        preferences, draws = state.get("preferences"), state.get("draws")
        if not are_numbers(preferences, self.num_arms):
            raise ValueError(f"Bandit: preferences must be {self.num_arms} finite numbers, got {preferences!r}")
        if type(draws) is not int or draws < 0:
            raise ValueError(f"Bandit: draws must be an integer of 0 or more, got {draws!r}")
        self.preferences = list(map(float, preferences))
        self.draws = draws

    def __repr__(self):
        settings = ", ".join(f"{name}={value!r}" for name, value in self._settings().items())
        return f"Bandit({settings}, draws={self.draws})"

    def _settings(self):
        names = ("num_arms", "seed", "step_size", "probability", "temperature", "baseline")
        return {name: getattr(self, name) for name in names}

    def _log_probabilities(self):
        return LOG_PROBABILITIES[self.probability]([g / self.temperature for g in self.preferences])

    def _generator(self):
        self.draws += 1
        return random.Random(f"{self.seed}/{self.draws}")

    def _order(self, generator, uniform):
        rates = [0.0] * self.num_arms if uniform else self._log_probabilities()
        # Python promises that random() stays the same in later versions, but not that expovariate() does.
        waits = [max(-math.log1p(-generator.random()), sys.float_info.min) for _ in rates]
        keys = [math.log(wait) - rate for wait, rate in zip(waits, rates, strict=True)]
        return sorted(range(self.num_arms), key=keys.__getitem__)

    def _best_but(self, subsets, take, banned=frozenset()):
        """What `take` makes of the ranking without banned arms, or None.

        Where that is one of `subsets`, some other one that is not.

        Complete: of a subset that is taken already, any other one lacks some arm, and each is banned in turn, the least
        preferred first. Finite: what lacks that arm is another subset, so there are as many levels as subsets.
        """
        ranking = [arm for arm in self.ranking() if arm not in banned]
        best = take(ranking)
        if best is None or best not in subsets:
            return best
        others = (self._best_but(subsets, take, banned | {arm}) for arm in ranking[::-1] if arm in best)
        return next((other for other in others if other is not None), None)


def are_numbers(values, count):
    """Whether it is a list of `count` finite numbers, as JSON has them."""
    known = isinstance(values, list) and len(values) == count
    return known and all(type(value) in (int, float) and math.isfinite(value) for value in values)
