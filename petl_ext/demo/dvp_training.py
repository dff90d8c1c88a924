"""How the DVP demo trains: three tasks about the same scenes, and a transformers.Trainer that is the same for all."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import set_seed

from petl_ext.demo.dvp_models import (
    DigitsEncoder,
    MeanPromptLayer,
    PromptedBert,
    freeze_below,
    make_dvp,
    read_language_model,
    read_tokenizer,
    share_prompt_layers,
)
from petl_ext.demo.search import WARMUP_SHARE, ResumableSearch, for_search, train_with_search
from petl_ext.demo.training import SPLITS, quiet_trainer
from petl_ext.search import PlacementSearch
from petl_ext.tasks import gqa, labels, snli_ve, vqa
from petl_ext.tasks.digits import BACKBONE, DigitsFiles, write_digits
from petl_ext.tasks.digits_gqa import GQADigitsFiles
from petl_ext.tasks.digits_snli_ve import SNLIVEDigitsFiles
from petl_ext.tasks.inputs import TextAndImage

MAX_LENGTH = 16  # tokens of a text, as the authors'
LAYERS = 6  # of MiniLM
NUM_INITIAL_TEXTS = 256  # that the queries are initialised on
# The authors' are 1 and, for accuracies over thousands of updates, 0.005.
SEARCH_INTERVAL, SEARCH_STEP_SIZE = 3, 1.0


@dataclass(frozen=True)
class DVPMethod:
    """A row of the tables.

    Attributes:
        kind: "text only", "all tokens", "mean" or "prompt".
        insert_layer: where the prompt enters and the lowest layer of which something is trained; None stands for the
            search's choice.
    """

    name: str
    kind: str
    insert_layer: int | None = None
    use_adapters: bool = False


@dataclass(frozen=True)
class DVPSize:
    """How much is generated and trained."""

    steps: int = 160
    search_steps: int = 60
    batch: int = 32
    search_batch: int = 16
    questions_per_scene: int = 3
    scenes: dict = field(default_factory=lambda: {"train": 2500, "val": 300, "test": 500})


DVP_QUICK = DVPSize(steps=8, search_steps=6, batch=16, scenes={"train": 60, "val": 20, "test": 30})


@dataclass(frozen=True)
class Rates:
    """Learning rates: of the language model, of its adapters and norms, of new layers and of the head."""

    language_model: float = 1e-4
    adapters: float = 1e-3
    new: float = 2e-3
    head: float = 2e-3


RATES = Rates()


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
        from transformers import ViltProcessor

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
    datasets = {}
    for split, file in files.items():
        options = {"image_name": file.image_name, "max_length": MAX_LENGTH, "cache_images": True}
        dataset = vqa.VQADataset(file.questions, file.images, processor, vocabulary, file.annotations, **options)
        datasets[split] = SeenDataset(dataset, dataset.questions, encoder)
    by_type = _by_type(vqa.accuracy_by_type, lambda dataset: dataset.annotations)
    return Task("VQA", datasets, vocabulary, vqa.compute_metrics, by_type)


def _read_gqa(folder, processor, encoder):
    files = {split: GQADigitsFiles.of(folder, split) for split in SPLITS}
    vocabulary = gqa.GQAVocabulary.from_questions([files["train"].questions])
    datasets = {}
    for split, file in files.items():
        options = {"image_name": file.image_name, "max_length": MAX_LENGTH, "cache_images": True}
        dataset = gqa.GQADataset(file.questions, file.images, processor, vocabulary, **options)
        datasets[split] = SeenDataset(dataset, dataset.questions, encoder)
    by_type = _by_type(gqa.accuracy_by_type, lambda dataset: dataset.questions)
    return Task("GQA", datasets, vocabulary, gqa.compute_metrics, by_type)


def _read_snli_ve(folder, processor, encoder):
    datasets = {}
    for split in SPLITS:
        file = SNLIVEDigitsFiles.of(folder, split)
        options = {"image_name": file.image_name, "max_length": MAX_LENGTH, "cache_images": True}
        dataset = snli_ve.SNLIVEDataset(file.jsonl, file.images, processor, **options)
        datasets[split] = SeenDataset(dataset, dataset.pairs, encoder)
    by_type = _by_type(_by_label, lambda dataset: dataset.pairs)
    return Task("SNLI-VE", datasets, snli_ve.LABELS, snli_ve.compute_metrics, by_type)


def _by_type(accuracies, entries):
    return lambda answers, seen: accuracies(answers, entries(seen.dataset))


def _by_label(answers, pairs):
    counts = snli_ve.confusion(answers, pairs)
    by_label = {}
    for label, given in counts.items():
        total = sum(given.values())
        by_label[label] = labels.TypeAccuracy(total, given[label] / total if total else float("nan"), 1.0)
    return by_label


READERS = {"VQA": _read_vqa, "GQA": _read_gqa, "SNLI-VE": _read_snli_ve}


@dataclass(frozen=True)
class DVPRun:
    """What all trainings of one command have in common."""

    output: Path
    size: DVPSize
    seed: int
    progress: bool
    data: DVPData

    @classmethod
    def prepare(cls, output, size, seed, progress, tasks=tuple(READERS)):
        """Writes the data below `output`, or reads what an earlier run wrote there."""
        output = Path(output)
        folder = output / f"digits-dvp-{size.scenes['train']}-seed{seed}"
        if not folder.exists():
            formats = ("vqa", "gqa", "snli_ve")
            write_digits(folder, size.scenes, size.questions_per_scene, seed, progress, formats)
        return cls(output, size, seed, progress, DVPData.read(folder, tasks))

    def make_model(self, method, task, **options):
        """A new model of a method, on CPU and in training mode."""
        set_seed(self.seed)
        num_labels, width = len(self.data.tasks[task].vocabulary), self.visual_dim
        if method.kind in ("text only", "all tokens"):
            model = PromptedBert(read_language_model(), num_labels, width if method.kind == "all tokens" else None)
            freeze_below(model.language_model, method.insert_layer)
            return model.train()
        options = {"insert_layer": method.insert_layer, "use_adapters": method.use_adapters, **options}
        model = make_dvp(num_labels, width, self.data.texts(task), **options)
        freeze_below(model.language_model, method.insert_layer)
        if method.kind == "mean":
            model.visual_prompts[0] = MeanPromptLayer.like(model.visual_prompts[0])
        return model

    @property
    def visual_dim(self):
        """Dv."""
        task = next(iter(self.data.tasks.values()))
        return task.datasets["train"][0]["visual_features"].size(1)

    def trainer(self, model, task, **arguments):
        """The Trainer of a model of `make_model`."""
        task = self.data.tasks[task]
        optimizer = torch.optim.AdamW(_groups(model), betas=(0.9, 0.98), weight_decay=0.01)
        data = {"data_collator": self.data.collator, "train_dataset": task.datasets["train"]}
        return quiet_trainer(self, model, optimizer, **data, compute_metrics=task.compute_metrics, **arguments)


def _groups(model):
    groups = {}
    adapted = any(".adapter." in name for name, _ in model.named_parameters())
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        of_language_model = RATES.adapters if adapted else RATES.language_model
        rates = {"language_model": of_language_model, "classifier": RATES.head}
        groups.setdefault(rates.get(name.partition(".")[0], RATES.new), []).append(parameter)
    return [{"params": parameters, "lr": rate} for rate, parameters in groups.items()]


class PlacementDigitsSearch(ResumableSearch):
    """`petl-ext search placement`: a `PlacementSearch` on digits VQA; there is no goal, {}."""

    name, picture, interval = "placement", "placement.png", SEARCH_INTERVAL

    def result(self):
        """What was found, ready for JSON: `DVPBert(..., insert_layer=result["insert_layer"])`."""
        return {"insert_layer": self.search.selection()}

    @classmethod
    def _new_search(cls, run, goal):
        model = run.make_model(DVPMethod("search", "prompt", 0), "VQA", candidates="all")
        # The whole of it makes the candidates' queries: see freeze_below.
        model.language_model.requires_grad_(False)
        share_prompt_layers(model)
        steps = run.size.search_steps
        constants = {"warmup_steps": steps // WARMUP_SHARE, "search_steps": steps, "interval": cls.interval}
        return PlacementSearch(model, run.seed, **goal, **constants, step_size=SEARCH_STEP_SIZE)

    @staticmethod
    def _train(search, run, checkpoint=None, **arguments):
        trainer = for_search(run, batch=run.size.search_batch).trainer(search.model, "VQA", **arguments)
        train_with_search(trainer, search, run.data.tasks["VQA"].datasets["val"], checkpoint, _likelihood)


def _likelihood(model, batch):
    """100 * exp(-loss), the authors' score for ScienceQA: so early, the accuracy on 16 questions is mostly chance."""
    return 100 * math.exp(-model(**batch).loss.item())


def find_insert_layer(run):
    """The `PlacementSearch` that has chosen a layer, on a model of its own."""
    search = PlacementDigitsSearch._new_search(run, {})
    PlacementDigitsSearch._train(search, run)
    return search
