"""What a training would take, told before it starts."""

import math
from dataclasses import dataclass
from pathlib import Path

import torch

from petl_ext.recipes.recipe import Recipe
from petl_ext.recipes.training import Costs, Experiment, parameter_groups, training_arguments

ADAM_STATES = 2  # numbers that AdamW keeps of every parameter that trains
SAMPLES = 2  # that are run to see what a forward pass keeps


@dataclass(frozen=True)
class Plan:
    """What `petl-ext train --dry-run` prints. `memory` is {what: bytes} of one process."""

    costs: Costs
    samples: int
    accumulation: int
    steps: int
    memory: dict[str, int]

    def __str__(self):
        costs = self.costs
        macs = "not counted" if costs.added_macs is None else f"{costs.added_macs:,}"
        memory = ", ".join(f"{name} {size / 2**20:,.0f}" for name, size in self.memory.items())
        return "\n".join(
            [
                f"trained parameters: {costs.trained_parameters:,} of {costs.all_parameters:,}, of these "
                f"{costs.new_parameters:,} beside the kept modules",
                f"added MACs for one sample: {macs}, of {costs.all_macs:,} in all",
                f"training samples: {self.samples:,}; optimizer steps: {self.steps:,} of {self.accumulation} "
                "accumulated batches in each process",
                f"memory of one process, estimated, MiB: {sum(self.memory.values()) / 2**20:,.0f} ({memory})",
            ]
        )


def plan(recipe: Recipe, data: str | Path) -> Plan:
    """Reads the data, makes the model and runs two samples forward, on the CPU; writes nothing.

    Raises what `train` raises before training starts.
    """
    experiment = Experiment.of(recipe, data)
    arguments = training_arguments(experiment, Path("unused"), progress=False)
    parameter_groups(experiment.prepared.model, recipe.training)
    samples = len(experiment.splits.train)
    batches = math.ceil(samples / (recipe.training.micro_batch * arguments.world_size))
    steps = arguments.max_steps
    if steps < 1:
        steps = math.ceil(arguments.num_train_epochs * math.ceil(batches / arguments.gradient_accumulation_steps))
    return Plan(Costs.of(experiment), samples, arguments.gradient_accumulation_steps, steps, _memory(experiment))


def _memory(experiment):
    model, training = experiment.prepared.model, experiment.recipe.training
    trained = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    held = sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))
    kept = _kept_for_backward(experiment) * training.micro_batch // SAMPLES
    return {
        "weights": held,
        "gradients": trained,
        "optimizer": ADAM_STATES * trained,
        "kept for backward": kept,
    }


def _kept_for_backward(experiment):
    """Bytes that autograd keeps of a forward pass of some samples, parameters not counted, each storage once."""
    model, splits, training = experiment.prepared.model, experiment.splits, experiment.recipe.training
    items = [splits.train[index % len(splits.train)] for index in range(SAMPLES)]
    batch = splits.collator(items)
    labels = batch.pop("labels")
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()  # itself, it would hold the node that keeps it, and neither would ever be freed

    if training.gradient_checkpointing:
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    lower = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(training.precision)
    model.train()
    with torch.autocast("cpu", lower, enabled=lower is not None), torch.autograd.graph.saved_tensors_hooks(keep, _same):
        loss = splits.task.loss(model(**batch), labels)
    del loss
    return sum(kept.values())


def _same(tensor):
    return tensor
