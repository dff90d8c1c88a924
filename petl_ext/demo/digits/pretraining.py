"""What both pre-trainings share: an optimizer, and steps whose learning rate warms up and decays."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm


@dataclass(frozen=True)
class Optimization:
    """The optimizer's settings."""

    learning_rate: float = 1e-3
    weight_decay: float = 0.02
    warmup_steps: int = 60


class Optimizer:
    """AdamW on all parameters of a model, whose gradients are clipped to the norm 1."""

    def __init__(self, model: nn.Module, settings: Optimization):
        self.model, self.settings = model, settings
        self._adamw = torch.optim.AdamW(
            model.parameters(), settings.learning_rate, betas=(0.9, 0.98), weight_decay=settings.weight_decay
        )

    def steps(self, count: int, name: str, progress: bool) -> Iterator[int]:
        """The numbers of `count` steps, each with its learning rate set: a warm-up and a cosine decay."""
        for step in tqdm(range(count), desc=name, disable=not progress):
            rate = min(1, (step + 1) / self.settings.warmup_steps) * (1 + math.cos(math.pi * step / count)) / 2
            for group in self._adamw.param_groups:
                group["lr"] = self.settings.learning_rate * rate
            yield step

    def minimize(self, loss: Tensor) -> None:
        """One step along the gradient of `loss`."""
        self._adamw.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self._adamw.step()
