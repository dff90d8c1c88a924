"""What a checkpoint did to a model, key by key."""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch


class KeyOutcome(NamedTuple):
    """What became of one key of the file.

    Attributes:
        key: its name in the file.
        action: "loaded", "split", "adapted", "left out" or "ignored".
        names: the tensors of the model that it filled.
        note: how it was adapted, or why it was left out.
    """

    key: str
    action: str
    names: tuple[str, ...] = ()
    note: str = ""

    def __str__(self):
        arrow = f" -> {', '.join(self.names)}" if self.names else ""
        return f"{self.key}{arrow}{': ' + self.note if self.note else ''}"


@dataclass(frozen=True)
class CheckpointReport:
    """What a checkpoint did to a model. Prints as a text.

    Attributes:
        source: the file, or "the state dict".
        model: the name of the model's class.
        keys: a `KeyOutcome` for every key, in the file's order.
        unfilled: {name: why that is all right} of the model's tensors that the file has not filled.
        conversions: {(dtype in the file, dtype in the model): how many keys}, where the two differ.
        not_finite: the keys that fill the model and hold NaN or infinity in the file.
        settings: {what of the model the file has set beside its tensors: what it is now, and was}.
    """

    source: str
    model: str
    keys: tuple[KeyOutcome, ...]
    unfilled: dict[str, str]
    conversions: dict[tuple[torch.dtype, torch.dtype], int]
    not_finite: tuple[str, ...] = ()
    settings: dict[str, Any] = field(default_factory=dict)

    def __str__(self):
        lines = [f"{self.source} -> {self.model}"]
        lines += [f"{count} keys converted from {old} to {new}" for (old, new), count in self.conversions.items()]
        if self.not_finite:
            lines.append(f"NaN or infinity in {len(self.not_finite)} keys of the file: {', '.join(self.not_finite)}")
        lines += _section("set beside tensors", [f"{name}: {value}" for name, value in self.settings.items()])
        for action in ("loaded", "split", "adapted", "left out", "ignored"):
            lines += _section(action, [str(outcome) for outcome in self.keys if outcome.action == action])
        lines += _section("not in the file", [f"{name}: {why}" for name, why in self.unfilled.items()])
        return "\n".join(lines)


def _section(title, entries):
    return [f"{title} ({len(entries)})", *(f"  {entry}" for entry in entries)] if entries else []
