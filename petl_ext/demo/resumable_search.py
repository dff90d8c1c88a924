"""The command line's searches: what they have in common."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from petl_ext.demo.training import Run, one_quiet_thread
from petl_ext.hf import SearchCallback
from petl_ext.hf.checkpoints import TRAINER_STATE, last_checkpoint
from petl_ext.search import DepthSearch, PlacementSearch

CHECKPOINTS = 10


@dataclass(frozen=True)
class ResumableSearch:
    """A search of the command line: its training can be interrupted and goes on from a checkpoint.

    A subclass makes the search (`new_search`), trains with it (`train_search`), and says what was found (`result`).

    Attributes:
        run: of the class `run_class`.
        checkpoint: of an interrupted search, to go on from.
    """

    run: Run
    search: DepthSearch | PlacementSearch
    checkpoint: Path | None

    run_class: ClassVar[type[Run]]
    name: ClassVar[str]
    picture: ClassVar[str]
    interval: ClassVar[int]

    @classmethod
    def check(cls, output, size, seed, goal, resume):
        """Refuses what can be refused before the data are drawn, which takes a while.

        Args:
            goal: arguments of the search.

        Returns:
            The checkpoint of an interrupted search, or None.

        Raises:
            ValueError: too few steps, an interrupted search is in the way, or the goal cannot be reached.
        """
        if size.search_steps < cls.interval:
            raise ValueError(f"{size.search_steps} steps are too few: the first update comes after {cls.interval}")
        checkpoint = last_checkpoint(cls._checkpoints(cls.run_class.folder_of(output, size, seed)))
        if checkpoint is not None and not resume:
            raise ValueError(
                f"{checkpoint} is of an interrupted search: --resume goes on with it; delete {checkpoint.parent} to "
                "begin anew"
            )
        with one_quiet_thread():
            cls.check_goal(size, goal)
        return checkpoint

    @classmethod
    def prepare(cls, run, goal, checkpoint):
        """Args: `goal` and `checkpoint` as `check` took and gave them.

        Raises:
            ValueError: the checkpoint is of another search.
        """
        with one_quiet_thread():
            search = cls.new_search(run, goal)
        if checkpoint is not None:
            callbacks = json.loads((checkpoint / TRAINER_STATE).read_text(encoding="utf-8"))["stateful_callbacks"]
            search.load_state_dict(callbacks[SearchCallback.__name__]["attributes"]["search"])
        return cls(run, search, checkpoint)

    def train(self):
        """Trains to the end, writes search.json and a picture, and deletes the checkpoints."""
        checkpoints = self._checkpoints(self.run.folder)
        arguments = {
            "output_dir": str(checkpoints),
            "save_strategy": "steps",
            "save_steps": max(1, self.run.size.search_steps // CHECKPOINTS),
            "save_total_limit": 1,
        }
        with one_quiet_thread():
            self.train_search(self.search, self.run, self.checkpoint, **arguments)
        self.search.save(self.run.output / "search.json")
        self.search.plot(self.run.output / self.picture)
        # Half a checkpoint, left by a kill, would be taken for one to go on from.
        deleted = checkpoints.with_name(f".deleted-{checkpoints.name}")
        shutil.rmtree(deleted, ignore_errors=True)
        shutil.rmtree(checkpoints.rename(deleted))

    @classmethod
    def _checkpoints(cls, folder):
        return folder.with_name(f"{cls.name}-checkpoints-{folder.name}")

    @staticmethod
    def check_goal(size, goal):
        """Raises ValueError where no search could reach the goal."""


def train_with_search(trainer, search, validation_dataset, checkpoint=None, compute_score=None):
    """Trains while `search` compares its choices on validation data."""
    SearchCallback(search, validation_dataset, compute_score=compute_score).add_to(trainer)
    trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
