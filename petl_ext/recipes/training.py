"""Trains what a recipe says, by transformers.Trainer, in one process or several."""

import re
import resource
import statistics
import sys
import time
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import (
    EarlyStoppingCallback,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from petl_ext.counting import count_macs, count_parameters
from petl_ext.hf import EpochCallback
from petl_ext.recipes.data import Splits
from petl_ext.recipes.methods import Prepared, prepare
from petl_ext.recipes.models import FAMILIES
from petl_ext.recipes.recipe import Recipe, Training
from petl_ext.recipes.runs import CHECKPOINTS, Run, begin

WARM_STEPS = 3  # of this process, which are not timed


@dataclass(frozen=True)
class Experiment:
    """A recipe with its data: makes its model and its Trainer.

    Args:
        searching: whether layers are searched, for which a DVP has a prompt for each of them.
    """

    recipe: Recipe
    splits: Splits
    searching: bool = False

    @classmethod
    def of(cls, recipe: Recipe, data: str | Path, **options: Any) -> "Experiment":
        """Args: data: the folder of the recipe's files; options: of `Splits` and of this class."""
        searching = options.pop("searching", False)
        return cls(recipe, Splits(recipe, Path(data), **options), searching)

    @cached_property
    def prepared(self) -> Prepared:
        """The model with its method, drawn with the recipe's seed."""
        set_seed(self.recipe.training.seed)
        model, family = self.recipe.model.below(self.splits.folder), FAMILIES[self.recipe.model.family]
        made = family.make(
            model, family.tasks[self.recipe.task], self.splits.num_labels, self.recipe.method, self.searching
        )
        return prepare(made, self.recipe.method, self.recipe.keep)

    def trainer(self, arguments: TrainingArguments) -> "RecipeTrainer":
        """The Trainer of the model."""
        splits, training = self.splits, self.recipe.training
        trainer = RecipeTrainer(
            self.prepared.model,
            arguments,
            training=training,
            data_collator=splits.collator,
            train_dataset=splits.train,
            eval_dataset=splits.validation,
            compute_metrics=splits.task.compute_metrics,
            compute_loss_func=splits.task.loss,
        )
        trainer.model_accepts_loss_kwargs = False  # the loss is the task's, not the model's
        if hasattr(splits.train, "set_epoch"):
            trainer.add_callback(EpochCallback())
        if training.patience is not None:
            trainer.add_callback(EarlyStoppingCallback(training.patience))
        trainer.remove_callback(PrinterCallback)
        return trainer

    def sample(self) -> dict[str, Any]:
        """What the model takes for the first training sample, without labels."""
        return {name: one for name, one in self.splits.collator([self.splits.train[0]]).items() if name != "labels"}


class RecipeTrainer(Trainer):
    """A Trainer with the learning rates and weight decays of a recipe's training section.

    Attributes:
        waits: the seconds for which each optimizer step waited for its data.
    """

    def __init__(self, *arguments: Any, training: Training, **named: Any):
        self.training, self.waits = training, []
        super().__init__(*arguments, **named)

    def get_batch_samples(self, *arguments: Any, **named: Any) -> tuple[list, torch.Tensor | int | None]:
        """The batches of an optimizer step."""
        begun = time.perf_counter()
        batches = super().get_batch_samples(*arguments, **named)
        self.waits.append(time.perf_counter() - begun)
        return batches

    def create_optimizer(self, model: torch.nn.Module | None = None) -> torch.optim.Optimizer:
        """AdamW with a group for each learning rate and decay."""
        if self.optimizer is None:
            groups = parameter_groups(self.model if model is None else model, self.training)
            self.optimizer = torch.optim.AdamW(groups, betas=self.training.betas, eps=self.training.epsilon)
        return self.optimizer

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        if dist.is_initialized():  # what the first process writes next says that all of the checkpoint is there
            dist.barrier()


def parameter_groups(model: torch.nn.Module, training: Training) -> list[dict[str, Any]]:
    """What trains, as an optimizer takes it. Raises ValueError if a rate is of nothing that trains."""
    groups, unused = {}, set(training.rates)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            entry = next((entry for entry in training.rates if re.search(entry, name)), None)
            unused.discard(entry)
            rate = training.learning_rate if entry is None else training.rates[entry]
            decays = not any(re.search(pattern, name) for pattern in training.no_decay)
            groups.setdefault((rate, training.weight_decay if decays else 0.0), []).append(parameter)
    if unused:
        raise ValueError(f"training.rates must be in names of what trains, got {', '.join(sorted(unused))}")
    return [{"params": found, "lr": rate, "weight_decay": decay} for (rate, decay), found in groups.items()]


def training_arguments(experiment: Experiment, folder: Path, progress: bool = True) -> TrainingArguments:
    """The recipe's training section as transformers has it.

    Raises ValueError if the batch cannot be divided among the processes, or the device lacks the precision.
    """
    training, splits = experiment.recipe.training, experiment.splits
    evaluates = training.evaluate_every is not None and splits.validation is not None
    if training.evaluate_every is not None and splits.validation is None:
        raise ValueError("data.validation or data.held_out must be given with training.evaluate_every, got neither")
    keeps_best = evaluates and training.checkpoint_every is not None and not experiment.searching
    given = {} if training.steps is None else {"max_steps": training.steps}
    arguments = TrainingArguments(
        str(folder),
        **given,
        num_train_epochs=training.epochs or 1,
        per_device_train_batch_size=training.micro_batch,
        per_device_eval_batch_size=training.micro_batch,
        learning_rate=training.learning_rate,
        lr_scheduler_type=training.schedule,
        warmup_steps=training.warmup,
        max_grad_norm=training.max_grad_norm,
        **_precision(training.precision),
        **_checkpointing(training.gradient_checkpointing),
        eval_strategy="steps" if evaluates else "no",
        eval_steps=training.evaluate_every,
        save_strategy="no" if training.checkpoint_every is None else "steps",
        save_steps=training.checkpoint_every or 1,
        save_total_limit=1,
        load_best_model_at_end=keeps_best,
        metric_for_best_model=splits.task.best if keeps_best else None,
        greater_is_better=True if keeps_best else None,
        restore_callback_states_from_checkpoint=training.patience is not None,
        logging_steps=training.log_every,
        report_to=list(training.report_to),
        disable_tqdm=not progress,
        remove_unused_columns=False,
        label_names=["labels"],
        dataloader_num_workers=experiment.recipe.data.workers,
        dataloader_pin_memory=torch.cuda.is_available(),
        use_cpu=not torch.accelerator.is_available(),
        seed=training.seed,
    )
    at_once = training.micro_batch * arguments.world_size * max(1, arguments.n_gpu)
    if training.batch_size % at_once:
        raise ValueError(
            f"training.batch_size must be a multiple of {at_once}, {training.micro_batch} samples in each of "
            f"{at_once // training.micro_batch} processes, got {training.batch_size}"
        )
    arguments.gradient_accumulation_steps = training.batch_size // at_once
    return arguments


def _precision(name):
    if name == "fp16" and not torch.cuda.is_available():
        raise ValueError("training.precision must be fp32 or bf16 without a GPU, got fp16")
    return {"fp16": name == "fp16", "bf16": name == "bf16"}


def _checkpointing(wanted):
    """transformers 5.23 calls it activation checkpointing."""
    name = "activation" if hasattr(TrainingArguments, "activation_checkpointing") else "gradient"
    return {f"{name}_checkpointing": True, f"{name}_checkpointing_kwargs": {"use_reentrant": False}} if wanted else {}


def train(recipe: Recipe, data: str | Path, output: str | Path, overwrite: bool = False, progress: bool = True) -> Run:
    """Trains a recipe to the end, going on from the last complete checkpoint where there is one.

    Raises ValueError or FileNotFoundError for what is wrong with data, recipe or folder, before training starts.
    """
    experiment = Experiment.of(recipe, data)
    run, arguments = begun(experiment, output, overwrite, progress)
    costs = Costs.of(experiment)
    trainer = experiment.trainer(arguments)
    trained = run_trainer(trainer, run)
    if arguments.should_save:
        experiment.prepared.save(run.trained)
        run.finish(vars(costs) | trained)
    return run


def begun(experiment: Experiment, output: str | Path, overwrite: bool, progress: bool) -> tuple[Run, TrainingArguments]:
    """The run in its folder, which the first process makes while the others wait, once all that can be refused has been
    looked at: data, model, learning rates, batches and the folder."""
    arguments = training_arguments(experiment, Path(output).resolve() / CHECKPOINTS, progress)
    recipe = experiment.recipe
    experiment.sample()
    parameter_groups(experiment.prepared.model, recipe.training)
    with arguments.main_process_first(local=False, desc="the run's folder"):
        run = begin(output, recipe, overwrite and arguments.process_index == 0)
    if arguments.should_save and experiment.splits.vocabulary is not None:
        experiment.splits.vocabulary.save(run.answers)
    return run, arguments


def run_trainer(trainer: RecipeTrainer, run: Run) -> dict[str, Any]:
    """Trains to the end, and says what was measured meanwhile."""
    clock = StepClock()
    trainer.add_callback(clock)
    checkpoint = run.checkpoint
    if checkpoint is not None and trainer.args.should_save:
        print(f"petl-ext: goes on from {checkpoint}", file=sys.stderr)
    trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
    return {
        "steps": trainer.state.global_step,
        "epochs": trainer.state.epoch,
        "best_step": trainer.state.best_global_step,
        "step_seconds": clock.median,
        "wait_seconds": _median(trainer.waits),
        "peak_memory": peak_memory(),
        "device": device_name(),
        "processes": trainer.args.world_size,
        "log": trainer.state.log_history,
    }


class StepClock(TrainerCallback):
    """The seconds of each optimizer step, reading not included."""

    def __init__(self):
        self.begun, self.seconds = None, []

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        _synchronize()
        self.begun = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        _synchronize()
        self.seconds.append(time.perf_counter() - self.begun)

    @property
    def median(self) -> float | None:
        """Without the first steps; None where there were no others."""
        return _median(self.seconds)


def _median(seconds):
    return statistics.median(seconds[WARM_STEPS:]) if len(seconds) > WARM_STEPS else None


def _synchronize():
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def peak_memory() -> int:
    """Bytes: of the GPU where there is one, else of the process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def device_name() -> str:
    """Of the GPU, or "CPU" with its threads."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"


@dataclass(frozen=True)
class Costs:
    """What a method costs: parameters that train, of these those beside `keep`, and all of the model; and
    multiply-accumulates of one sample: those of the new layers, None where nothing says, and all."""

    trained_parameters: int
    new_parameters: int
    all_parameters: int
    added_macs: int | None
    all_macs: int

    @classmethod
    def of(cls, experiment: Experiment) -> "Costs":
        """Of an experiment's model, by a forward pass of the first training sample."""
        prepared = experiment.prepared
        trained, every = count_parameters(prepared.model)
        device = next(prepared.model.parameters()).device
        sample = {name: tensor.to(device) for name, tensor in experiment.sample().items()}
        state = torch.get_rng_state()
        added, macs = prepared.added_macs(sample), count_macs(prepared.model, sample).total
        torch.set_rng_state(state)
        return cls(trained, prepared.new_parameters(experiment.recipe.keep), every, added, macs)
