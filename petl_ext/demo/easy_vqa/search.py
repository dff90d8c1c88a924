"""The search for the layer at which the prompt enters best."""

import math

import torch

from petl_ext.demo.dvp.models import share_prompt_layers
from petl_ext.demo.easy_vqa.models import make_dvp
from petl_ext.search import PlacementSearch

# As in the demo of digits: the authors' values are 1, no warm-up and, for accuracies over thousands of updates, 0.005.
INTERVAL, WARMUP_SHARE, STEP_SIZE = 4, 0.4, 1.0
RATE = 1e-4  # of the last layer


def find_layer(run):
    """The `PlacementSearch` that has chosen, of `run.language_model.layers` the one with the index of its selection.

    The language model is frozen but for its last layer, through which the head reads the prompt, and the layers'
    prompts differ in queries and types alone: in so few steps, prompts trained apart would hardly be trained at all.
    """
    size, first = run.size, run.language_model.layers[0]
    torch.manual_seed(run.seed)
    model = make_dvp(run.texts, first, len(run.data.vocabulary), run.data.visual_dim, candidates="all")
    share_prompt_layers(model)
    freeze_but_last_layer(model.language_model)
    warmup = int(size.search_steps * WARMUP_SHARE)
    search = PlacementSearch(
        model,
        run.seed,
        warmup_steps=warmup,
        search_steps=size.search_steps,
        interval=INTERVAL,
        step_size=STEP_SIZE,
    )
    optimizer, schedule = run.optimizer(model, RATE, size.search_steps)
    generator = torch.Generator().manual_seed(run.seed)
    for questions in run.batches(size.search_steps, size.search_batch):
        search.sample()
        run.loss(model, questions).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if search.is_due:
            held_out = run.data.splits["val"]
            compared = held_out[torch.randperm(len(held_out), generator=generator)[: size.compared]]
            # The authors' score for ScienceQA: so early, accuracies are mostly chance.
            search.update(lambda compared=compared: 100 * math.exp(-run.loss(model, compared).item()))
    search.finish()
    return search


def freeze_but_last_layer(language_model):
    """Of BERT or LLaMA; the last norm trains too."""
    layers = language_model.encoder.layer if hasattr(language_model, "encoder") else language_model.layers
    layers[:-1].requires_grad_(False)
