"""How the demo trains: its data, and a transformers.Trainer that is the same for every method."""

from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from transformers import (
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainingArguments,
    ViltConfig,
    ViltForQuestionAnswering,
    ViltProcessor,
    set_seed,
)
from transformers.utils import logging as transformers_logging

from petl_ext import attach
from petl_ext.demo.digits import BACKBONE
from petl_ext.demo.digits.vqa import DigitsFiles
from petl_ext.demo.digits.write import write_digits
from petl_ext.tasks.vqa import AnswerVocabulary, VQACollator, VQADataset, compute_metrics

SPLITS = ("train", "val", "test")
# What every method trains besides its own parameters, as the paper's baselines do.
HEAD = ("classifier", "pooler", "token_type_embeddings")
# An eighth of the model's width, as in the papers.
BOTTLENECK = 16


@dataclass(frozen=True)
class Method:
    """A row of the table. The learning rates are those that did best on the validation split (petl-ext demo --tune).

    Attributes:
        num_skip: how many layers a search chooses first, for `config` to skip.
    """

    name: str
    config: object
    learning_rate: float
    head_learning_rate: float
    pretrained: bool = True
    num_skip: int = 0


@dataclass(frozen=True)
class Size:
    """How much is generated and trained."""

    steps: int = 600
    search_steps: int = 120
    batch: int = 32
    scenes: dict = field(default_factory=lambda: {"train": 5000, "val": 500, "test": 1000})


QUICK = Size(steps=100, search_steps=40, scenes={"train": 1500, "val": 100, "test": 300})


def size_of(quick, search_steps=None):
    size = QUICK if quick else Size()
    return size if search_steps is None else replace(size, search_steps=search_steps)


@dataclass(frozen=True)
class Data:
    """The three splits, and what turns their items into batches."""

    folder: Path
    datasets: dict
    collator: VQACollator
    vocabulary: AnswerVocabulary

    @classmethod
    def read(cls, folder):
        files = {split: DigitsFiles.of(folder, split) for split in SPLITS}
        processor = ViltProcessor.from_pretrained(BACKBONE)
        vocabulary = AnswerVocabulary.from_annotations([files["train"].annotations])
        datasets = {
            split: VQADataset(
                file.questions,
                file.images,
                processor,
                vocabulary,
                file.annotations,
                image_name=file.image_name,
                cache_images=True,
            )
            for split, file in files.items()
        }
        return cls(Path(folder), datasets, VQACollator(processor), vocabulary)

    def batch(self, split, count):
        dataset = self.datasets[split]
        return self.collator([dataset[index] for index in range(count)])

    def inputs(self, split, count):
        """What a model takes, without the labels."""
        return {name: tensor for name, tensor in self.batch(split, count).items() if name != "labels"}


@dataclass(frozen=True)
class Run:
    """What all trainings of one command have in common."""

    output: Path
    size: Size
    seed: int
    progress: bool
    data: Data

    @classmethod
    def prepare(cls, output, size, seed, progress):
        """Writes the data below `output`, or reads what an earlier run wrote there."""
        output, folder = Path(output), cls.folder_of(output, size, seed)
        if not folder.exists():
            write_digits(folder, size.scenes, seed=seed, progress=progress)
        return cls(output, size, seed, progress, Data.read(folder))

    @staticmethod
    def folder_of(output, size, seed):
        """Where the data lie."""
        return Path(output) / f"digits-{size.scenes['train']}-seed{seed}"

    def attach(self, method):
        """A new model with the method's layers and head: the attachment."""
        set_seed(self.seed)
        return attach(make_model(method, len(self.data.vocabulary)), method.config, keep=HEAD)

    def trainer(self, attachment, method, **arguments):
        """A Trainer that prints nothing, with the demo's `TrainingArguments` but for those given."""
        optimizer = torch.optim.AdamW(_groups(attachment, method), betas=(0.9, 0.98), weight_decay=0.01)
        data = {"data_collator": self.data.collator, "train_dataset": self.data.datasets["train"]}
        return quiet_trainer(self, attachment.model, optimizer, **data, compute_metrics=compute_metrics, **arguments)


def quiet_trainer(run, model, optimizer, data_collator, train_dataset, compute_metrics, **arguments):
    """A Trainer that prints nothing, with the demos' `TrainingArguments` but for those given.

    Args:
        run: has output, size (with steps and batch), seed and progress.
    """
    defaults = {
        "output_dir": str(run.output),
        "max_steps": run.size.steps,
        "per_device_train_batch_size": run.size.batch,
        "per_device_eval_batch_size": 2 * run.size.batch,
        "lr_scheduler_type": "linear",
        "warmup_steps": run.size.steps // 10,
        "use_cpu": True,
        "seed": run.seed,
        "save_strategy": "no",
        "logging_strategy": "no",
        "report_to": [],
        "disable_tqdm": not run.progress,
        "remove_unused_columns": False,
        "label_names": ["labels"],
    }
    trainer = Trainer(
        model,
        TrainingArguments(**defaults | arguments),
        data_collator=data_collator,
        train_dataset=train_dataset,
        compute_metrics=compute_metrics,
        optimizers=(optimizer, None),
    )
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    return trainer


class BarOnly(ProgressCallback):
    """transformers' progress bar without the figures that it prints between the steps."""

    def on_log(self, *arguments, **named):
        pass


@contextmanager
def one_quiet_thread():
    """On matrices of this size several threads are slower than one; and a head that is new is no news here."""
    threads, verbosity = torch.get_num_threads(), transformers_logging.get_verbosity()
    torch.set_num_threads(1)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        transformers_logging.set_verbosity(verbosity)
        transformers_logging.enable_progress_bar()


def make_model(method, num_labels):
    """The backbone of a method, with a head for so many answers."""
    if method.pretrained:
        return ViltForQuestionAnswering.from_pretrained(BACKBONE, num_labels=num_labels)
    return ViltForQuestionAnswering(ViltConfig.from_pretrained(BACKBONE, num_labels=num_labels))


def any_inputs(config):
    """What a ViLT of this configuration takes, with the longest text and the largest image, as zeros."""
    text = torch.zeros(1, config.max_position_embeddings, dtype=torch.long)
    image = torch.zeros(1, config.num_channels, config.image_size, config.image_size)
    return {"input_ids": text, "attention_mask": torch.ones_like(text), "pixel_values": image}


def _groups(attachment, method):
    """The classifier is new and learns fastest; the rest of the head is pre-trained and takes half its rate."""
    groups = {}
    for name, parameter in attachment.named_parameters():
        part = next((part for part in HEAD if f".{part}." in f".{name}."), None)
        rates = {"classifier": method.head_learning_rate, None: method.learning_rate}
        groups.setdefault(rates.get(part, method.head_learning_rate / 2), []).append(parameter)
    return [{"params": parameters, "lr": rate} for rate, parameters in groups.items()]
