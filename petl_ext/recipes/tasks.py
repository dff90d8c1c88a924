"""What a recipe knows of each task: the data set and its files, the loss, what is measured and what is written."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset
from transformers import default_data_collator

from petl_ext.tasks import gqa, image_classification, nlvr2, retrieval, scienceqa, snli_ve, vqa
from petl_ext.tasks.files import write_json
from petl_ext.tasks.labels import IGNORED, LabelVocabulary, label_accuracy, label_loss, soft_target_loss


@dataclass(frozen=True)
class RecipeTask:
    """One task.

    Attributes:
        dataset, collator: of `petl_ext.tasks`, or what makes them.
        files: arguments of the data set that are files or folders below the data folder.
        options: its other arguments that a part of a split may have.
        loss: (outputs, labels, num_items_in_batch) -> the loss, as a Trainer's compute_loss_func.
        compute_metrics: of a Trainer; `best` is the one that tells which checkpoint is the best.
        finish: (logits, data set, folder) -> metrics of a finished model; writes the official file.
        columns: of the metrics, {name: the column of a table}.
        vocabulary: (files, min_count) -> the answers; None where the task has its own, `num_labels` of them.
        vocabulary_class: reads them again.
    """

    dataset: Callable[..., Dataset]
    collator: Callable[[Any, int | None], Callable]
    files: tuple[str, ...]
    options: tuple[str, ...]
    loss: Callable
    compute_metrics: Callable
    best: str
    finish: Callable[[Tensor, Dataset, Path], dict[str, float]]
    columns: dict[str, str]
    num_labels: int = 0
    vocabulary: Callable | None = None
    vocabulary_class: type[LabelVocabulary] = LabelVocabulary


def class_loss(outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
    """Cross-entropy, the mean over all samples of an optimizer step, of which this may be a part."""
    if num_items_in_batch is None:
        return label_loss(outputs["logits"], labels)
    total = F.cross_entropy(outputs["logits"], labels, ignore_index=IGNORED, reduction="sum")
    return total / num_items_in_batch


def soft_loss(outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
    """Binary cross-entropy, summed over the answers; the mean over all samples of an optimizer step, likewise."""
    if num_items_in_batch is None:
        return soft_target_loss(outputs["logits"], labels)
    total = F.binary_cross_entropy_with_logits(outputs["logits"], labels, reduction="sum")
    return total * labels.shape[1] / num_items_in_batch


def _finish_vqa(logits, dataset, folder):
    answers = dataset.vocabulary.decode(logits)
    vqa.write_results(folder / "vqa_results.json", dataset.questions, answers)
    if dataset.annotations is None:
        return {}
    return _with_types(vqa.accuracy_by_type(answers, dataset.annotations))


def _finish_gqa(logits, dataset, folder):
    answers = dataset.vocabulary.decode(logits)
    gqa.write_predictions(folder / "gqa_predictions.json", dataset.questions, answers)
    if not dataset.has_answers:
        return {}
    return _with_types(gqa.accuracy_by_type(answers, dataset.questions))


def _with_types(by_type):
    """The accuracy over all questions, and those of their types."""
    total = sum(one.count for one in by_type.values())
    accuracy = sum(one.count * one.accuracy for one in by_type.values()) / total
    return {"accuracy": accuracy, **{name: one.accuracy for name, one in by_type.items()}}


def _finish_snli_ve(logits, dataset, folder):
    return {"accuracy": snli_ve.accuracy(snli_ve.LABELS.decode(logits), dataset.pairs)}


def _finish_nlvr2(logits, dataset, folder):
    predicted = nlvr2.LABELS.decode(logits)
    nlvr2.write_predictions(folder / "nlvr2_predictions.csv", dataset.examples, predicted)
    measured = {"accuracy": nlvr2.accuracy, "consistency": nlvr2.consistency}
    return {name: measure(predicted, dataset.examples) for name, measure in measured.items()}


def _finish_scienceqa(logits, dataset, folder):
    answers = scienceqa.choose(logits, dataset.problems)
    scienceqa.write_results(folder / "scienceqa_results.json", dataset.problems, answers)
    found = scienceqa.accuracy(answers, dataset.problems)
    return {name: one.accuracy for name, one in found.items() if one.count}


def _classes(folders, min_count):
    counts = Counter(image.class_name for folder in folders for image in image_classification.read_image_folder(folder))
    return LabelVocabulary(sorted(name for name, count in counts.items() if count >= min_count))


def _image_folder(images, vocabulary, processor, max_length, cache_images=False, shots=None, seed=0):
    """Images of a folder, all or so many of each class; `max_length` is that of texts, which they have not."""
    found = image_classification.read_image_folder(images)
    if shots is not None:
        found = image_classification.draw_shots(found, shots, seed).shots
    return image_classification.ImageClassificationDataset(
        found, vocabulary.answers, processor.image_processor, cache_images
    )


def _image_collator(processor, text_length):
    return default_data_collator


def _finish_image_classification(logits, dataset, folder):
    predicted = [dataset.classes[label] for label in logits.argmax(dim=1).tolist()]
    shown = {str(image.path): name for image, name in zip(dataset.images, predicted, strict=True)}
    write_json(folder / "image_classification_predictions.json", shown)
    labels = torch.tensor([dataset.label[image.class_name] for image in dataset.images])
    by_class = image_classification.accuracy_by_class(logits, labels, dataset.classes)
    return {"accuracy": label_accuracy(logits, labels), **by_class}


def _finish_retrieval(scores, dataset, folder):
    return retrieval.recalls(scores, dataset.image_of)


_with_class_loss = partial(RecipeTask, loss=class_loss, best="accuracy")

TASKS = {
    "vqa": RecipeTask(
        dataset=vqa.VQADataset,
        collator=vqa.VQACollator,
        files=("questions", "annotations", "images"),
        options=("image_name",),
        loss=soft_loss,
        compute_metrics=vqa.compute_metrics,
        best="vqa_score",
        finish=_finish_vqa,
        columns={"accuracy": "VQA"},
        vocabulary=vqa.AnswerVocabulary.from_annotations,
        vocabulary_class=vqa.AnswerVocabulary,
    ),
    "gqa": _with_class_loss(
        dataset=gqa.GQADataset,
        collator=gqa.GQACollator,
        files=("questions", "images"),
        options=("image_name",),
        compute_metrics=gqa.compute_metrics,
        finish=_finish_gqa,
        columns={"accuracy": "GQA"},
        vocabulary=gqa.GQAVocabulary.from_questions,
        vocabulary_class=gqa.GQAVocabulary,
    ),
    "snli_ve": _with_class_loss(
        dataset=snli_ve.SNLIVEDataset,
        collator=snli_ve.SNLIVECollator,
        files=("pairs", "images"),
        options=("image_name",),
        compute_metrics=snli_ve.compute_metrics,
        finish=_finish_snli_ve,
        columns={"accuracy": "SNLI-VE"},
        num_labels=len(snli_ve.LABELS),
    ),
    "nlvr2": _with_class_loss(
        dataset=nlvr2.NLVR2Dataset,
        collator=nlvr2.NLVR2Collator,
        files=("examples", "images"),
        options=("image_name",),
        compute_metrics=nlvr2.compute_metrics,
        finish=_finish_nlvr2,
        columns={"accuracy": "NLVR2"},
        num_labels=len(nlvr2.LABELS),
    ),
    "retrieval": _with_class_loss(
        dataset=retrieval.RetrievalDataset,
        collator=retrieval.RetrievalCollator,
        files=("annotations", "images"),
        options=("splits", "negatives", "own_captions", "seed"),
        compute_metrics=retrieval.compute_metrics,
        finish=_finish_retrieval,
        columns={"IR@1": "IR R@1", "TR@1": "TR R@1"},
    ),
    "scienceqa": _with_class_loss(
        dataset=scienceqa.ScienceQADataset,
        collator=scienceqa.ScienceQACollator,
        files=("problems", "splits", "images", "captions"),
        options=("split", "blank_size"),
        compute_metrics=scienceqa.compute_metrics,
        finish=_finish_scienceqa,
        columns={"Avg": "ScienceQA"},
        num_labels=len(scienceqa.LETTERS),
    ),
    "image_classification": _with_class_loss(
        dataset=_image_folder,
        collator=_image_collator,
        files=("images",),
        options=("shots", "seed"),
        compute_metrics=image_classification.compute_metrics,
        finish=_finish_image_classification,
        columns={"accuracy": "images"},
        vocabulary=_classes,
    ),
}


def logits_of(predictions: Any) -> Tensor:
    """What a Trainer predicted as a tensor [n, labels]; where a model returned more, the logits come first."""
    return torch.as_tensor(predictions[0] if isinstance(predictions, tuple) else predictions)
