"""Measures a finished run on a split and writes the task's official file."""

import statistics
import time
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments

from petl_ext.recipes.runs import METRICS, open_run
from petl_ext.recipes.tasks import logits_of
from petl_ext.recipes.training import Experiment
from petl_ext.tasks.files import write_json
from petl_ext.tasks.retrieval_scores import score_all

ROUNDS, WARM_ROUNDS = 10, 2
MOVED_EVERY = 50  # batches, after which what the model gave leaves the GPU


def evaluate(folder: str | Path, data: str | Path, split: str = "test", progress: bool = True) -> dict[str, Any]:
    """Measures what a run has trained on a split of its recipe, in float32 as the authors do, in one process or more.

    Returns:
        {name: metrics} for each part of the split: "test" or, where there are several, "test-0" and so on. The files
        are in `results/<name>` of the run. Empty in all processes but the first.

    Raises ValueError or FileNotFoundError if the run is not finished, or the recipe has no such split.
    """
    run = open_run(folder)
    if "found" in run.training():
        raise ValueError(f"{folder} must be a training's folder, but it is that of a search")
    has_answers = run.answers if run.answers.is_file() else None
    experiment = Experiment.of(run.recipe, data, answers=has_answers)
    parts = experiment.splits.parts(split)
    if not parts:
        raise ValueError(f"{folder}: --split must be one for which the recipe has files, got {split!r}")
    experiment.prepared.load(run.trained)
    trainer = _trainer(experiment, run, progress)
    names = [split] if len(parts) == 1 else [f"{split}-{index}" for index in range(len(parts))]
    found = {}
    for name, part in zip(names, parts, strict=True):
        metrics = _measured(trainer, experiment, part, run.results(name))
        if trainer.is_world_process_zero():
            seconds = _seconds_of_a_sample(trainer, experiment, part)
            found[name] = metrics | {"samples": len(part), "inference_seconds": seconds}
            write_json(run.results(name) / METRICS, found[name])
    return found


def _trainer(experiment, run, progress):
    arguments = TrainingArguments(
        str(run.folder / "results"),
        per_device_eval_batch_size=experiment.recipe.training.micro_batch,
        eval_accumulation_steps=MOVED_EVERY,
        remove_unused_columns=False,
        label_names=["labels"],
        report_to=[],
        disable_tqdm=not progress,
        dataloader_num_workers=experiment.recipe.data.workers,
        dataloader_pin_memory=torch.cuda.is_available(),
        use_cpu=not torch.accelerator.is_available(),
        seed=experiment.recipe.training.seed,
    )
    return Trainer(
        experiment.prepared.model,
        arguments,
        data_collator=experiment.splits.collator,
        compute_loss_func=experiment.splits.task.loss,
    )


def _measured(trainer, experiment, dataset, folder):
    """The metrics of one part; only the first process has them all."""
    is_first, task = trainer.is_world_process_zero(), experiment.splits.task
    if is_first:
        folder.mkdir(parents=True, exist_ok=True)
    if experiment.recipe.task != "retrieval":
        logits = logits_of(trainer.predict(dataset).predictions)
        return task.finish(logits, dataset, folder) if is_first else {}
    if not is_first:  # the score matrix is one file, which goes on where it was
        return {}
    path, show = folder / "scores.safetensors", not trainer.args.disable_tqdm
    workers = trainer.args.dataloader_num_workers
    scores = score_all(trainer.model, dataset, path=path, num_workers=workers, progress=show)
    return task.finish(scores, dataset, folder)


def _seconds_of_a_sample(trainer: Trainer, experiment: Experiment, dataset: Dataset) -> float:
    """The median of some forward passes of one batch, over its samples."""
    model, device = trainer.model.eval(), trainer.args.device
    items = [dataset[index] for index in range(min(len(dataset), experiment.recipe.training.micro_batch))]
    batch = {name: one.to(device) for name, one in experiment.splits.collator(items).items() if name != "labels"}
    seconds = []
    for _ in range(WARM_ROUNDS + ROUNDS):
        begun = time.perf_counter()
        with torch.no_grad():
            model(**batch)
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begun)
    return statistics.median(seconds[WARM_ROUNDS:]) / len(items)
