"""How both demos train: their data, and a transformers.Trainer that is the same for every method."""

from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import torch
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainingArguments
from transformers.utils import logging as transformers_logging

from petl_ext.demo.digits.write import write_digits


@dataclass(frozen=True)
class Size:
    """How much is generated and trained; `scenes` is {split: how many}."""

    steps: int
    search_steps: int
    batch: int
    search_batch: int
    questions_per_scene: int
    scenes: dict


@dataclass(frozen=True)
class Run:
    """What all trainings of one command have in common.

    A subclass has one more field, what it has read of the data; it says how large its runs are, what is written, and
    how it is read: `read(folder, ...)`.
    """

    output: Path
    size: Size
    seed: int
    progress: bool

    full: ClassVar[Size]
    quick: ClassVar[Size]
    data_name: ClassVar[str]  # the data's folder begins with it
    formats: ClassVar[tuple]  # of `write_digits`

    @classmethod
    def size_of(cls, quick, search_steps=None):
        """The size of a run, with another number of a search's steps where it is given."""
        size = cls.quick if quick else cls.full
        return size if search_steps is None else replace(size, search_steps=search_steps)

    @classmethod
    def prepare(cls, output, size, seed, progress, **reading):
        """Writes the data below `output`, or reads what an earlier run wrote there."""
        folder = cls.folder_of(output, size, seed)
        if not folder.exists():
            write_digits(folder, size.scenes, size.questions_per_scene, seed, progress, cls.formats)
        return cls(Path(output), size, seed, progress, cls.read(folder, **reading))

    @classmethod
    def folder_of(cls, output, size, seed):
        """Where the data lie."""
        return Path(output) / f"{cls.data_name}-{size.scenes['train']}-seed{seed}"

    @property
    def folder(self):
        """Where the data lie."""
        return self.folder_of(self.output, self.size, self.seed)

    def for_search(self):
        """The same with the steps and the batches of its search."""
        size = replace(self.size, steps=self.size.search_steps, batch=self.size.search_batch)
        return replace(self, size=size)

    def quiet_trainer(self, model, task, groups, **arguments):
        """A Trainer that prints nothing, with the demos' `TrainingArguments` but for those given.

        Args:
            task: the `Task` whose train split is trained on.
            groups: of parameters, for the optimizer.
        """
        defaults = {
            "output_dir": str(self.output),
            "max_steps": self.size.steps,
            "per_device_train_batch_size": self.size.batch,
            "per_device_eval_batch_size": 2 * self.size.batch,
            "lr_scheduler_type": "linear",
            "warmup_steps": self.size.steps // 10,
            "use_cpu": True,
            "seed": self.seed,
            "save_strategy": "no",
            "logging_strategy": "no",
            "report_to": [],
            "disable_tqdm": not self.progress,
            "remove_unused_columns": False,
            "label_names": ["labels"],
        }
        trainer = Trainer(
            model,
            TrainingArguments(**defaults | arguments),
            data_collator=task.collator,
            train_dataset=task.datasets["train"],
            compute_metrics=task.compute_metrics,
            optimizers=(torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=0.01), None),
        )
        trainer.remove_callback(PrinterCallback)
        trainer.remove_callback(ProgressCallback)
        return trainer

    def train(self, trainer):
        """Trains to the end, under a progress bar where the run shows them."""
        if self.progress:
            trainer.add_callback(BarOnly)
        trainer.train()


class BarOnly(ProgressCallback):
    """transformers' progress bar without the figures that it prints between the steps."""

    def on_log(self, *arguments, **named):
        pass


def groups_by_rate(named_parameters, rate_of):
    """An optimizer's groups of parameters: one for each learning rate that `rate_of(name)` gives."""
    groups = {}
    for name, parameter in named_parameters:
        groups.setdefault(rate_of(name), []).append(parameter)
    return [{"params": parameters, "lr": rate} for rate, parameters in groups.items()]


@contextmanager
def one_quiet_thread():
    """On matrices of this size several threads are slower than one. That the head is new needs no warning here."""
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
