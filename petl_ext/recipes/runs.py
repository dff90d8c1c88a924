"""The folder of a run: its recipe, its checkpoints while it trains, what it trained and measured.

recipe.yaml      the complete recipe; what makes a folder one of a run
answers.json     the vocabulary, where the recipe has one
checkpoints/     of the Trainer, until the run is finished
trained/         what `petl_ext.load`, PEFT or a DVP's `load` reads
training.json    costs and losses; written last, so that a run with it is finished
results/<split>/ metrics.json and the official file of an evaluation
"""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import petl_ext
from petl_ext.hf.checkpoints import last_checkpoint, remove_incomplete
from petl_ext.recipes.reading import read_document
from petl_ext.recipes.recipe import Recipe, parsed
from petl_ext.tasks.files import read_json, write_json, write_text

RECIPE, ANSWERS, TRAINING, METRICS = "recipe.yaml", "answers.json", "training.json", "metrics.json"
CHECKPOINTS = "checkpoints"
UNFINISHED = ".unfinished-"  # of `written_whole`: a kill may leave one before there is a recipe


@dataclass(frozen=True)
class Run:
    """One run."""

    folder: Path
    recipe: Recipe

    @property
    def checkpoints(self) -> Path:
        return self.folder / CHECKPOINTS

    @property
    def trained(self) -> Path:
        return self.folder / "trained"

    @property
    def answers(self) -> Path:
        return self.folder / ANSWERS

    @property
    def is_finished(self) -> bool:
        return (self.folder / TRAINING).is_file()

    @property
    def checkpoint(self) -> Path | None:
        """The last complete one."""
        return last_checkpoint(self.checkpoints)

    def results(self, split: str) -> Path:
        """The folder of an evaluation's files."""
        return self.folder / "results" / split

    def metrics(self, split: str) -> dict[str, Any]:
        """Of an evaluation; empty before it."""
        path = self.results(split) / METRICS
        return read_json(path) if path.is_file() else {}

    def training(self) -> dict[str, Any]:
        """What training.json holds. Raises ValueError if the run is not finished."""
        if not self.is_finished:
            raise ValueError(f"{self.folder} must be a finished run, got one without {TRAINING}")
        return read_json(self.folder / TRAINING)

    def finish(self, measured: dict[str, Any]) -> None:
        """Writes training.json and deletes the checkpoints, but not what trackers have written beside them."""
        write_json(self.folder / TRAINING, measured)
        for checkpoint in self.checkpoints.glob("checkpoint-*"):
            shutil.rmtree(checkpoint)
        if self.checkpoints.is_dir() and not any(self.checkpoints.iterdir()):
            self.checkpoints.rmdir()


def begin(folder: str | Path, recipe: Recipe, overwrite: bool = False) -> Run:
    """A new run in a folder that is empty or not there, or an interrupted one of the same recipe, to go on with.

    Raises ValueError if the folder holds anything else: another run or a finished one, which `overwrite` deletes, or
    files that are of no run.
    """
    folder = Path(folder)
    run = Run(folder, recipe)
    if (folder / RECIPE).is_file():
        if overwrite:
            _delete(folder)
        else:
            _check_same(open_run(folder), recipe)
            remove_incomplete(run.checkpoints)
            return run
    elif folder.is_dir() and any(not path.name.startswith(UNFINISHED) for path in folder.iterdir()):
        raise ValueError(f"--output must be a new folder or that of a run, got {folder}, which holds other files")
    elif folder.exists() and not folder.is_dir():
        raise ValueError(f"--output must be a folder, got the file {folder}")
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / RECIPE, f"# petl_ext {petl_ext.__version__}\n{recipe.as_yaml()}")
    return run


def open_run(folder: str | Path) -> Run:
    """The run in a folder. Raises FileNotFoundError if there is none."""
    path = Path(folder) / RECIPE
    if not path.is_file():
        raise FileNotFoundError(f"{folder} must be the folder of a run, got one without {RECIPE}")
    return Run(Path(folder), parsed(read_document(path)))


def _delete(folder):
    """Half of a run, left by a kill, would be of none: it goes under another name."""
    deleted = folder.with_name(f".deleted-{folder.name}")
    shutil.rmtree(deleted, ignore_errors=True)
    shutil.rmtree(folder.rename(deleted))


def _check_same(run, recipe):
    here, given = _flat(run.recipe.as_values()), _flat(recipe.as_values())
    different = sorted(key for key in here.keys() | given.keys() if here.get(key) != given.get(key))
    if different:
        key = different[0]
        raise ValueError(
            f"{run.folder} holds another run: its {key} must be {given.get(key)!r}, got {here.get(key)!r} "
            f"({len(different)} keys differ); name another --output, or --overwrite deletes that run"
        )
    if run.is_finished:
        raise ValueError(f"{run.folder} holds this run, finished; --overwrite deletes it and trains anew")


def _flat(value, path=""):
    if isinstance(value, dict | list):
        pairs = value.items() if isinstance(value, dict) else enumerate(value)
        return {key: leaf for name, inner in pairs for key, leaf in _flat(inner, f"{path}.{name}").items()}
    return {path.removeprefix("."): value}
