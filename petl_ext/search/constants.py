"""The numbers that a search is set by."""

from dataclasses import dataclass
from typing import ClassVar

from petl_ext.checks import check_choice
from petl_ext.search.bandit import Bandit


@dataclass(frozen=True)
class Constants:
    """The constants that every search has; each search adds its own and says what all of them mean.

    `probability` and `baseline`, which the `Bandit` takes, are fields where users may set them.
    """

    warmup_steps: int | None = None
    search_steps: int | None = None
    interval: int = 1
    step_size: float = 1.0
    evaluation_mode: str = "eval"
    temperature: float = 1.0

    probability: ClassVar[str] = "softmax"
    baseline: ClassVar[bool] = True

    search_name: ClassVar[str] = "Search"  # for messages
    least: ClassVar[dict] = {"warmup_steps": 0, "search_steps": 1, "interval": 1}
    default_warmup_epochs: ClassVar[float] = 0.0  # under `petl_ext.hf.SearchCallback`, where nothing else is said

    def __post_init__(self):
        for name, smallest in self.least.items():
            value = getattr(self, name)
            may_be_none = name in ("warmup_steps", "search_steps")
            if not (type(value) is int and value >= smallest) and not (value is None and may_be_none):
                raise ValueError(f"{self.search_name}: {name} must be an integer of {smallest} or more, got {value!r}")
        check_choice(f"{self.search_name}: evaluation_mode", self.evaluation_mode, ("eval", "train"))
        if self.search_steps is not None and self.first_update > self.search_steps:
            raise ValueError(
                f"{self.search_name}: search_steps={self.search_steps} ends the search before its first update, which "
                f"warmup_steps={self.warmup_steps} and interval={self.interval} put at step {self.first_update}"
            )

    @property
    def first_update(self) -> int:
        """The step with which the first update comes."""
        return max((self.warmup_steps or 0) + 1, self.interval)

    def new_bandit(self, num_arms: int, seed: int) -> Bandit:
        """Raises ValueError where a number is out of the bandit's range."""
        return Bandit(num_arms, seed, self.step_size, self.probability, self.temperature, self.baseline)
