"""The DVP demo's data: three tasks about the same scenes, every image as the tokens of the frozen encoder."""

from dataclasses import dataclass, replace

import torch
from transformers import ViltProcessor

from petl_ext.demo.data import SPLITS, Task, read_vqa
from petl_ext.demo.digits import BACKBONE
from petl_ext.demo.digits.gqa import GQADigitsFiles
from petl_ext.demo.digits.snli_ve import SNLIVEDigitsFiles
from petl_ext.demo.dvp.models import DigitsEncoder, read_tokenizer
from petl_ext.tasks import gqa, labels, snli_ve
from petl_ext.tasks.inputs import TextAndImage

READING = {"max_length": 16, "cache_images": True}  # tokens of a text: the authors' limit
NUM_INITIAL_TEXTS = 256  # that the queries are initialized on


class SeenDataset(torch.utils.data.Dataset):
    """A task's items with the image encoder's tokens [N, Dv], visual_features, in place of pixels.

    The encoder is frozen, so each image is encoded once, before the training.

    Args:
        dataset: a `TextImageDataset`.
    """

    def __init__(self, dataset, encoder):
        self.dataset, entries = dataset, dataset.entries
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


def read_tasks(folder, names):
    """{name: `Task` of a folder of `write_digits`}, every image as the tokens of the frozen encoder."""
    tokenizer, encoder = read_tokenizer(), DigitsEncoder()
    processor = TextAndImage(tokenizer, ViltProcessor.from_pretrained(BACKBONE).image_processor)
    collator = SeenCollator(tokenizer)
    return {name: _seen(READERS[name](folder, processor, collator), encoder) for name in names}


def initial_texts(task):
    """Questions that the queries are initialized on."""
    batch = task.batch("train", NUM_INITIAL_TEXTS)
    return {name: batch[name] for name in ("input_ids", "attention_mask")}


def _seen(task, encoder):
    datasets = {split: SeenDataset(dataset, encoder) for split, dataset in task.datasets.items()}

    def accuracy_by_type(answers, seen):
        return task.accuracy_by_type(answers, seen.dataset)

    return replace(task, datasets=datasets, accuracy_by_type=accuracy_by_type)


def _read_vqa(folder, processor, collator):
    return read_vqa(folder, processor, collator, min_count=1, **READING)


def _read_gqa(folder, processor, collator):
    files = {split: GQADigitsFiles.of(folder, split) for split in SPLITS}
    vocabulary = gqa.GQAVocabulary.from_questions([files["train"].questions])

    def read(file):
        named = {"image_name": file.image_name, **READING}
        return gqa.GQADataset(file.questions, file.images, processor, vocabulary, **named)

    def accuracy_by_type(answers, dataset):
        return gqa.accuracy_by_type(answers, dataset.questions)

    datasets = {split: read(file) for split, file in files.items()}
    return Task(datasets, vocabulary, collator, gqa.compute_metrics, accuracy_by_type)


def _read_snli_ve(folder, processor, collator):
    files = {split: SNLIVEDigitsFiles.of(folder, split) for split in SPLITS}

    def read(file):
        return snli_ve.SNLIVEDataset(file.jsonl, file.images, processor, image_name=file.image_name, **READING)

    datasets = {split: read(file) for split, file in files.items()}
    return Task(datasets, snli_ve.LABELS, collator, snli_ve.compute_metrics, _accuracy_by_label)


def _accuracy_by_label(answers, dataset):
    """Labels take the place of types, which the files do not have."""
    by_label = {}
    for label, given in snli_ve.confusion(answers, dataset.pairs).items():
        count = sum(given.values())
        if count:
            by_label[label] = labels.TypeAccuracy(count, given[label] / count, majority=1.0)
    return by_label


READERS = {"VQA": _read_vqa, "GQA": _read_gqa, "SNLI-VE": _read_snli_ve}
NAMES = tuple(READERS)
