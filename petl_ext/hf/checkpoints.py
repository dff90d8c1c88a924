"""Checkpoints of a Trainer: which are complete, after a kill or on a full disk."""

import json
import shutil
from pathlib import Path

TRAINER_STATE = "trainer_state.json"  # the Trainer writes it last: a checkpoint without it is incomplete


def last_checkpoint(folder: str | Path) -> Path | None:
    """The complete checkpoint of most steps, or None."""
    complete = [path for path in Path(folder).glob("checkpoint-*") if is_complete(path)]
    return max(complete, key=lambda checkpoint: int(checkpoint.name.rpartition("-")[2]), default=None)


def remove_incomplete(folder: str | Path) -> None:
    """Deletes what a kill or a full disk has left of a checkpoint."""
    for path in Path(folder).glob("checkpoint-*"):
        if not is_complete(path):
            shutil.rmtree(path)


def is_complete(checkpoint: Path) -> bool:
    """Whether the Trainer has written all of it."""
    try:
        json.loads((checkpoint / TRAINER_STATE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return True
