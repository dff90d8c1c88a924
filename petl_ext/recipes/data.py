"""A recipe's splits, read from the official files."""

import copy
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import ConcatDataset, Dataset

from petl_ext.recipes.models import FAMILIES
from petl_ext.recipes.recipe import Recipe
from petl_ext.recipes.tasks import TASKS, RecipeTask
from petl_ext.tasks.labels import LabelVocabulary

SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class Splits:
    """What a recipe trains and is measured on. A split's files are read when it is asked for.

    Args:
        recipe: a `Recipe`.
        folder: that --data names.
        answers: the vocabulary of a finished run; None: from the recipe's files.
    """

    recipe: Recipe
    folder: Path
    answers: Path | None = None
    _read: dict[str, Any] = field(default_factory=dict, repr=False)

    def __post_init__(self):
        if not self.folder.is_dir():
            raise FileNotFoundError(
                f"--data must be the folder of the recipe's files, got no such folder: {self.folder}"
            )

    @property
    def task(self) -> RecipeTask:
        return TASKS[self.recipe.task]

    @cached_property
    def processor(self) -> Any:
        model = self.recipe.model.below(self.folder)
        return FAMILIES[model.family].processor(model)

    @cached_property
    def collator(self) -> Callable:
        return self.task.collator(self.processor, self.recipe.data.text_length)

    @cached_property
    def vocabulary(self) -> LabelVocabulary | None:
        """Of a task that has none of its own."""
        if self.task.vocabulary is None:
            return None
        if self.answers is not None:
            return self.task.vocabulary_class.load(self.answers)
        given = self.recipe.data.answers
        return self.task.vocabulary([self.folder / name for name in given.files], given.min_count)

    @property
    def num_labels(self) -> int:
        return self.task.num_labels if self.vocabulary is None else len(self.vocabulary)

    @cached_property
    def train(self) -> Dataset:
        parts = self.parts("train")
        return _joined([*parts[:-1], self._split_off[0]] if self.recipe.data.held_out else parts)

    @cached_property
    def validation(self) -> Dataset | None:
        """None where the recipe has none."""
        parts = self.parts("validation")
        return _joined(parts) if parts else None

    def parts(self, split: str) -> list[Dataset]:
        """The data sets of a split's parts, as the recipe names them; images that are held out are a part too."""
        if split == "validation" and self.recipe.data.held_out:
            return [self._split_off[1]]
        if split not in self._read:
            self._read[split] = [self._dataset(part) for part in getattr(self.recipe.data, split)]
        return self._read[split]

    def check_images(self, progress: bool = True) -> None:
        """Decodes all images of what is trained and validated on. Raises ValueError naming the first that cannot be."""
        for split in ("train", "validation"):
            for part in self.parts(split):
                part.check_images(self.recipe.data.workers, progress)

    def _dataset(self, part):
        data, task = self.recipe.data, self.task
        files = {name: self.folder / part[name] for name in task.files if part.get(name) is not None}
        files |= dict.fromkeys(name for name in task.files if name in part and part[name] is None)
        options = {name: part[name] for name in task.options if name in part}
        if self.vocabulary is not None:
            options["vocabulary"] = self.vocabulary
        needed = inspect.signature(task.dataset).parameters
        missing = [name for name in task.files if needed[name].default is inspect.Parameter.empty and name not in part]
        if missing:
            raise ValueError(f"a part of data for {self.recipe.task} must have the key {missing[0]!r}, got {part}")
        return task.dataset(
            **files,
            **options,
            processor=self.processor,
            max_length=data.max_length,
            cache_images=data.cache_images,
        )

    @cached_property
    def _split_off(self):
        """Of the last part of `train`, what is trained on and the images that are held out."""
        last, count = self.parts("train")[-1], self.recipe.data.held_out
        if len(last.entries) != len(last):
            raise ValueError(f"data.held_out must be 0 for {self.recipe.task}, whose items are no rows, got {count}")
        images = sorted({str(entry.image_id) for entry in last.entries})
        if count >= len(images):
            raise ValueError(f"data.held_out must be below {len(images)}, the images of the last part, got {count}")
        drawn = set(np.random.default_rng(self.recipe.data.seed).choice(images, count, replace=False).tolist())
        is_held = [str(entry.image_id) in drawn for entry in last.entries]
        return [_only(last, [row for row, one in enumerate(is_held) if one is wanted]) for wanted in (False, True)]


def _joined(parts):
    """One data set of all; alone it stays itself: some are told the epoch."""
    return parts[0] if len(parts) == 1 else ConcatDataset(parts)


def _only(dataset, rows):
    """A data set of some of the rows, all that it has one of for each row being lists."""
    some = copy.copy(dataset)
    for name, value in vars(dataset).items():
        if isinstance(value, list) and len(value) == len(dataset):
            setattr(some, name, [value[row] for row in rows])
    return some
