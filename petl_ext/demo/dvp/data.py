"""The DVP demo's data: three tasks about the same scenes, every image as the tokens of the frozen encoder."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import ViltProcessor

from petl_ext.demo.digits import BACKBONE
from petl_ext.demo.digits.gqa import GQADigitsFiles
from petl_ext.demo.digits.snli_ve import SNLIVEDigitsFiles
from petl_ext.demo.digits.vqa import DigitsFiles
from petl_ext.demo.dvp.models import DigitsEncoder, read_tokenizer
from petl_ext.demo.vilt.training import SPLITS
from petl_ext.tasks import gqa, labels, snli_ve, vqa
from petl_ext.tasks.inputs import TextAndImage

READING = {"max_length": 16, "cache_images": True}  # tokens of a text: the authors' limit
NUM_INITIAL_TEXTS = 256  # that the queries are initialised on


class SeenDataset(torch.utils.data.Dataset):
    """A task's items with the image encoder's tokens [N, Dv], visual_features, in place of pixels.

    The encoder is frozen, so each image is encoded once, before the training.

    Args:
        dataset: a task's.
        entries: its questions or pairs, in its order.
    """

    def __init__(self, dataset, entries, encoder):
        self.dataset, self.entries = dataset, entries
        items = [dict(dataset[index]) for index in range(len(dataset))]
        pixels = {entry.image_id: item.pop("pixel_values") for entry, item in zip(entries, items, strict=True)}
        with torch.no_grad():
            seen = torch.cat([encoder(torch.stack(some)).last_hidden_state for some in _chunks([*pixels.values()])])
        features = dict(zip(pixels, seen, strict=True))
        self.items = [
            item | {"visual_features": features[entry.image_id]} for entry, item in zip(entries, items, strict=True)
        ]

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        return self.items[index]


def _chunks(values, size=256):
    return [values[start : start + size] for start in range(0, len(values), size)]


@dataclass(frozen=True)
class SeenCollator:
    """Batches the items of a `SeenDataset`; texts are padded to the longest."""

    tokenizer: object

    def __call__(self, items):
        texts = [{name: item[name] for name in ("input_ids", "attention_mask")} for item in items]
        batch = dict(self.tokenizer.pad(texts, return_tensors="pt"))
        batch["visual_features"] = torch.stack([item["visual_features"] for item in items])
        return batch | {"labels": torch.stack([torch.as_tensor(item["labels"]) for item in items])}


@dataclass(frozen=True)
class Task:
    """One task's three splits.

    Attributes:
        by_type: (answers, `SeenDataset`) -> {type: TypeAccuracy}.
    """

    name: str
    datasets: dict
    vocabulary: labels.LabelVocabulary
    compute_metrics: Callable
    by_type: Callable


@dataclass(frozen=True)
class DVPData:
    """The tasks' data, and what turns their items into batches."""

    folder: Path
    tasks: dict
    collator: SeenCollator

    @classmethod
    def read(cls, folder, names=("VQA", "GQA", "SNLI-VE")):
        folder, tokenizer, encoder = Path(folder), read_tokenizer(), DigitsEncoder()
        processor = TextAndImage(tokenizer, ViltProcessor.from_pretrained(BACKBONE).image_processor)
        tasks = {name: READERS[name](folder, processor, encoder) for name in names}
        return cls(folder, tasks, SeenCollator(tokenizer))

    def batch(self, task, split, count):
        dataset = self.tasks[task].datasets[split]
        return self.collator([dataset[index] for index in range(min(count, len(dataset)))])

    def texts(self, task):
        """Questions that the queries are initialised on."""
        batch = self.batch(task, "train", NUM_INITIAL_TEXTS)
        return {name: batch[name] for name in ("input_ids", "attention_mask")}


def _read_vqa(folder, processor, encoder):
    files = {split: DigitsFiles.of(folder, split) for split in SPLITS}
    vocabulary = vqa.AnswerVocabulary.from_annotations([files["train"].annotations], min_count=1)

    def read(file):
        named = {"image_name": file.image_name, **READING}
        return vqa.VQADataset(file.questions, file.images, processor, vocabulary, file.annotations, **named)

    datasets = _seen(files, read, lambda dataset: dataset.questions, encoder)
    by_type = _by_type(vqa.accuracy_by_type, lambda dataset: dataset.annotations)
    return Task("VQA", datasets, vocabulary, vqa.compute_metrics, by_type)


def _read_gqa(folder, processor, encoder):
    files = {split: GQADigitsFiles.of(folder, split) for split in SPLITS}
    vocabulary = gqa.GQAVocabulary.from_questions([files["train"].questions])

    def read(file):
        named = {"image_name": file.image_name, **READING}
        return gqa.GQADataset(file.questions, file.images, processor, vocabulary, **named)

    datasets = _seen(files, read, lambda dataset: dataset.questions, encoder)
    by_type = _by_type(gqa.accuracy_by_type, lambda dataset: dataset.questions)
    return Task("GQA", datasets, vocabulary, gqa.compute_metrics, by_type)


def _read_snli_ve(folder, processor, encoder):
    files = {split: SNLIVEDigitsFiles.of(folder, split) for split in SPLITS}

    def read(file):
        return snli_ve.SNLIVEDataset(file.jsonl, file.images, processor, image_name=file.image_name, **READING)

    datasets = _seen(files, read, lambda dataset: dataset.pairs, encoder)
    by_type = _by_type(_by_label, lambda dataset: dataset.pairs)
    return Task("SNLI-VE", datasets, snli_ve.LABELS, snli_ve.compute_metrics, by_type)


def _seen(files, read, entries_of, encoder):
    datasets = {split: read(file) for split, file in files.items()}
    return {split: SeenDataset(dataset, entries_of(dataset), encoder) for split, dataset in datasets.items()}


def _by_type(accuracies, entries):
    return lambda answers, seen: accuracies(answers, entries(seen.dataset))


def _by_label(answers, pairs):
    """Labels take the place of types, which the files do not have."""
    by_label = {}
    for label, given in snli_ve.confusion(answers, pairs).items():
        count = sum(given.values())
        if count:
            by_label[label] = labels.TypeAccuracy(count, given[label] / count, majority=1.0)
    return by_label


READERS = {"VQA": _read_vqa, "GQA": _read_gqa, "SNLI-VE": _read_snli_ve}
