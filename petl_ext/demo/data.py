"""The data of both demos: the splits of a task, their batches and scores."""

import math
from collections.abc import Callable
from dataclasses import dataclass

from petl_ext.demo.digits.vqa import DigitsFiles
from petl_ext.tasks import vqa
from petl_ext.tasks.labels import LabelVocabulary

SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class Score:
    """How well a model answered; accuracies and their errors are in [0, 1].

    Attributes:
        by_type: {type of question: `TypeAccuracy`}.
    """

    by_type: dict

    @property
    def count(self):
        """Of questions."""
        return sum(one.count for one in self.by_type.values())

    @property
    def accuracy(self):
        """Over all questions."""
        return sum(one.count * one.accuracy for one in self.by_type.values()) / self.count

    @property
    def standard_error(self):
        """Of the accuracy, as that of a sample of so many questions."""
        return math.sqrt(self.accuracy * (1 - self.accuracy) / self.count)

    def __str__(self):
        return f"{self.accuracy:.1%} ± {self.standard_error:.1%}"


@dataclass(frozen=True)
class Task:
    """One task's three splits, what turns their items into batches, and how answers are scored.

    Attributes:
        datasets: by split.
        collator: makes a batch of items.
        compute_metrics: for a Trainer.
        accuracy_by_type: (answers, dataset) -> {type: `TypeAccuracy`}.
    """

    datasets: dict
    vocabulary: LabelVocabulary
    collator: Callable
    compute_metrics: Callable
    accuracy_by_type: Callable

    def batch(self, split, count):
        """The first `count` items, or as many as there are."""
        dataset = self.datasets[split]
        return self.collator([dataset[index] for index in range(min(count, len(dataset)))])

    def inputs(self, split, count):
        """What a model takes, without the labels."""
        return {name: tensor for name, tensor in self.batch(split, count).items() if name != "labels"}

    def score(self, trainer, split):
        """The `Score` of the trainer's model."""
        dataset = self.datasets[split]
        answers = self.vocabulary.decode(trainer.predict(dataset).predictions)
        return Score(self.accuracy_by_type(answers, dataset))


def read_vqa(folder, processor, collator, min_count=9, **reading):
    """The task that `write_digits` wrote in VQAv2's format.

    Args:
        min_count: of `AnswerVocabulary.from_annotations`.
        reading: of `VQADataset`.
    """
    files = {split: DigitsFiles.of(folder, split) for split in SPLITS}
    vocabulary = vqa.AnswerVocabulary.from_annotations([files["train"].annotations], min_count)

    def read(file):
        named = {"image_name": file.image_name, **reading}
        return vqa.VQADataset(file.questions, file.images, processor, vocabulary, file.annotations, **named)

    def accuracy_by_type(answers, dataset):
        return vqa.accuracy_by_type(answers, dataset.annotations)

    datasets = {split: read(file) for split, file in files.items()}
    return Task(datasets, vocabulary, collator, vqa.compute_metrics, accuracy_by_type)
