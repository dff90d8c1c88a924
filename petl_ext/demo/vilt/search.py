"""The demo's searches: what of the small ViLT the digits task does not need; and what all of them have in common."""

import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

from petl_ext import DASConfig, attach
from petl_ext.demo.vilt.training import BOTTLENECK, Method, any_inputs, make_model, one_quiet_thread
from petl_ext.hf import SearchCallback
from petl_ext.search import DepthSearch, PlacementSearch

DAS = Method("DAS, 1 of 4 layers skipped", DASConfig(bottleneck=BOTTLENECK), 1e-2, 1e-2, num_skip=1)
WARMUP_SHARE = 5  # the first update comes after one part in so many of the steps
# DAS has 10 and 1. Here there are few steps, and rewards exp(-loss) of 0.01 to 0.07: with a step size of 1 no
# preference goes beyond 0.04, and draws stay uniform.
INTERVAL, STEP_SIZE = 5, 100.0
CHECKPOINTS = 10
TRAINER_STATE = "trainer_state.json"  # the Trainer writes it last: a checkpoint without it is incomplete


@dataclass(frozen=True)
class ResumableSearch:
    """A search of the command line: its training can be interrupted and goes on from a checkpoint.

    A subclass makes the search, trains with it, and says what was found.

    Attributes:
        run: has output, size (with search_steps), seed, progress and data.folder.
        checkpoint: of an interrupted search, to go on from.
    """

    run: object
    search: DepthSearch | PlacementSearch
    checkpoint: Path | None

    name: ClassVar[str]
    picture: ClassVar[str]
    interval: ClassVar[int]

    @classmethod
    def check(cls, run_class, output, size, seed, goal, resume):
        """Refuses what needs no data to be refused, for drawing them takes its time.

        Args:
            run_class: whose `folder_of` says where the data will lie.
            goal: arguments of the search.

        Returns:
            The checkpoint of an interrupted search, or None.

        Raises:
            ValueError: too few steps, an interrupted search is in the way, or the goal cannot be reached.
        """
        if size.search_steps < cls.interval:
            raise ValueError(f"{size.search_steps} steps are too few: the first update comes after {cls.interval}")
        checkpoint = _last_checkpoint(cls._checkpoints(run_class.folder_of(output, size, seed)))
        if checkpoint is not None and not resume:
            raise ValueError(
                f"{checkpoint} is of an interrupted search: --resume goes on with it; delete {checkpoint.parent} to "
                "begin anew"
            )
        with one_quiet_thread():
            cls._check_goal(size, goal)
        return checkpoint

    @classmethod
    def prepare(cls, run, goal, checkpoint):
        """Args: `goal` and `checkpoint` as `check` took and gave them.

        Raises:
            ValueError: the checkpoint is of another search.
        """
        with one_quiet_thread():
            search = cls._new_search(run, goal)
        if checkpoint is not None:
            callbacks = json.loads((checkpoint / TRAINER_STATE).read_text(encoding="utf-8"))["stateful_callbacks"]
            search.load_state_dict(callbacks[SearchCallback.__name__]["attributes"]["search"])
        return cls(run, search, checkpoint)

    def train(self):
        """Trains to the end, writes search.json and a picture, and deletes the checkpoints."""
        checkpoints = self._checkpoints(self.run.data.folder)
        arguments = {
            "output_dir": str(checkpoints),
            "save_strategy": "steps",
            "save_steps": max(1, self.run.size.search_steps // CHECKPOINTS),
            "save_total_limit": 1,
        }
        with one_quiet_thread():
            self._train(self.search, self.run, self.checkpoint, **arguments)
        self.search.to_json(self.run.output / "search.json")
        self.search.plot(self.run.output / self.picture)
        # Half a checkpoint, left by a kill, would be taken for one to go on from.
        deleted = checkpoints.with_name(f".deleted-{checkpoints.name}")
        shutil.rmtree(deleted, ignore_errors=True)
        shutil.rmtree(checkpoints.rename(deleted))

    @classmethod
    def _checkpoints(cls, folder):
        return folder.with_name(f"{cls.name}-checkpoints-{folder.name}")

    @staticmethod
    def _check_goal(size, goal):
        """Raises ValueError where no search could reach the goal."""


class DigitsDepthSearch(ResumableSearch):
    """`petl-ext search das`: a `DepthSearch`; its goal is {"num_skip": n} or {"max_macs": share}."""

    name, picture, interval = "das", "gates.png", INTERVAL

    def result(self):
        """What was found, ready for JSON: `DASConfig(skip=result["skip"])`."""
        return {"skip": list(self.search.selection()), "macs": round(self.search.macs(), 4)}

    @staticmethod
    def _check_goal(size, goal):
        model = make_model(DAS, num_labels=2)
        _new_depth_search(attach(model, DAS.config), size, goal, any_inputs(model.config))

    @staticmethod
    def _new_search(run, goal):
        return _depth_search_of(run, DAS, goal)

    @staticmethod
    def _train(search, run, checkpoint, **arguments):
        _train(search, DAS, run, checkpoint, **arguments)


def find_layers(method, run):
    """The `DepthSearch` that has chosen `method.num_skip` layers, on a model of its own."""
    search = _depth_search_of(run, method, {"num_skip": method.num_skip})
    _train(search, method, run)
    return search


def train_with_search(trainer, search, validation_dataset, checkpoint=None, compute_score=None):
    """Trains while `search` compares its choices on validation data."""
    SearchCallback(search, validation_dataset, compute_score=compute_score).add_to(trainer)
    trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))


def for_search(run, **size):
    """`run` with as many steps as its search has, and with other fields of its size."""
    return replace(run, size=replace(run.size, steps=run.size.search_steps, **size))


def _depth_search_of(run, method, goal):
    return _new_depth_search(run.attach(method), run.size, goal, run.data.inputs("val", run.size.batch), run.seed)


def _new_depth_search(attachment, size, goal, inputs, seed=0):
    steps = size.search_steps
    return DepthSearch(
        attachment.model,
        **goal,
        inputs=inputs,
        seed=seed,
        warmup_steps=steps // WARMUP_SHARE,
        search_steps=steps,
        interval=INTERVAL,
        step_size=STEP_SIZE,
    )


def _train(search, method, run, checkpoint=None, **arguments):
    trainer = for_search(run).trainer(search.attachment, method, **arguments)
    train_with_search(trainer, search, run.data.datasets["val"], checkpoint)


def _last_checkpoint(folder):
    complete = [state.parent for state in folder.glob(f"checkpoint-*/{TRAINER_STATE}") if _is_json(state)]
    return max(complete, key=lambda checkpoint: int(checkpoint.name.rpartition("-")[2]), default=None)


def _is_json(path):
    try:
        json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return False
    return True
