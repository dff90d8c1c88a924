"""Answers as labels: vocabularies, the losses of tasks with one right answer or with scored ones, and accuracy."""

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from petl_ext.tasks.files import read_json, write_json

IGNORED = -100  # the label of an answer that the vocabulary lacks, as torch's cross_entropy has it


class LabelVocabulary:
    """The answers that a model can give: a sequence of different strings; the index of an answer is its label."""

    def __init__(self, answers: Iterable[str]):
        self.answers = tuple(answers)
        self.index = {answer: label for label, answer in enumerate(self.answers)}
        if len(self.index) != len(self.answers):
            raise ValueError(f"answers must be {len(self.answers)} different ones, got {len(self.index)}")

    @classmethod
    def load(cls, path: str | Path) -> "LabelVocabulary":
        """Reads what `save` wrote. Raises ValueError if the file is not a JSON list of different strings."""
        answers = read_json(path)
        if not isinstance(answers, list) or not all(isinstance(answer, str) for answer in answers):
            raise ValueError(f"{path} must be a JSON list of strings, got {str(answers)[:80]!r}")
        return cls(answers)

    def save(self, path: str | Path) -> None:
        """Writes a JSON list of the answers, whole or not at all."""
        write_json(path, list(self.answers))

    def __len__(self) -> int:
        return len(self.answers)

    def decode(self, logits: Any) -> list[str]:
        """The best answer of each row of `logits` [n, len(self)], a tensor or an array."""
        logits = torch.as_tensor(logits)
        if logits.ndim != 2 or logits.shape[1] != len(self):
            raise ValueError(f"logits must have shape [n, {len(self)}], got {list(logits.shape)}")
        return [self.answers[label] for label in logits.argmax(dim=1).tolist()]


def label_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of `logits` [batch, answers] and `labels` [batch], the mean of those that are not `IGNORED`.

    Zero, with zero gradients, where all are ignored: torch's own mean would be NaN.
    """
    total = F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum")
    return total / (labels != IGNORED).sum().clamp(min=1)


def soft_target_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Binary cross-entropy of `logits` [batch, answers] with scores in [0, 1], likewise.

    Summed over the answers; the mean of the batch.
    """
    return F.binary_cross_entropy_with_logits(logits, targets) * targets.shape[1]


def label_accuracy(logits: Tensor, labels: Tensor) -> float:
    """Share of rows of `logits` [n, answers] that are best at their label [n]; an `IGNORED` one is never right."""
    return (logits.argmax(dim=1) == labels).double().mean().item()


def compute_metrics(prediction: Any) -> dict[str, float]:
    """`compute_metrics` of `transformers.Trainer`: accuracy of `predictions` [n, answers] and `label_ids` [n]."""
    logits, labels = torch.as_tensor(prediction.predictions), torch.as_tensor(prediction.label_ids)
    return {"accuracy": label_accuracy(logits, labels)}


@dataclass(frozen=True)
class TypeAccuracy:
    """Accuracy over the questions of one type, beside that of always giving the type's most frequent answer."""

    count: int
    accuracy: float
    majority: float


def require_one_each(given: Sequence, entries: Sequence, names: tuple[str, str]) -> None:
    """Raises ValueError unless there is one of `given` per entry; `names` are theirs: ("answers", "question")."""
    if len(given) != len(entries):
        raise ValueError(f"{names[0]} must be {len(entries)}, one per {names[1]}, got {len(given)}")


def share_equal(given: Sequence[Hashable], expected: Sequence[Hashable]) -> float:
    """Share of positions at which two sequences of equal length agree; NaN if they are empty."""
    right = [one == other for one, other in zip(given, expected, strict=True)]
    return sum(right) / len(right) if right else float("nan")
