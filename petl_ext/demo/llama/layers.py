"""Which layers SmolLM2 can do without: each tried alone, block influence, and DAS's search, begun with nothing, as
published, and begun with what the layers are worth alone."""

import random
import time
from dataclasses import dataclass

import torch
from tqdm.auto import tqdm

from petl_ext import DepthSearch
from petl_ext.demo.llama.training import DAS, LlamaRun, loss_of, new_optimizer
from petl_ext.search import block_influence, one_by_one

# The authors' for LLaMA are 0.05 and some 150 updates an epoch; here, updates are few and rewards exp(-loss) about 0.1.
INTERVAL, WARMUP_SHARE, STEP_SIZE = 2, 0.25, 100.0
SPREAD = 4.0  # of the preferences that a search begins with
RATE = 1e-3


@dataclass(frozen=True)
class Choice:
    """What one way of choosing takes out.

    Attributes:
        layers: {how many: indices, ascending}.
        losses: {how many: loss on the validation blocks without these layers, before any training}.
        seconds: that it took to choose.
    """

    name: str
    layers: dict
    losses: dict
    seconds: float


@dataclass(frozen=True)
class Found:
    """What was found.

    Attributes:
        bare: loss on the validation blocks with all layers.
        alone: the losses with each layer skipped alone.
        choices: by every way; the last is the search's that the demo goes on with.
        search: that one.
    """

    bare: float
    alone: list
    choices: list
    search: DepthSearch


class Chooser:
    """Asks SmolLM2, untrained, what it loses without layers: bypasses begin by passing their input on."""

    def __init__(self, run: LlamaRun, numbers):
        self.run, self.numbers = run, numbers
        self.model, self.attachment = run.new_model(DAS)
        self.blocks = run.manual.val[: run.size.compared]

    def loss(self):
        return loss_of(self.model, self.blocks)

    @torch.no_grad()
    def loss_without(self, layers):
        """The loss, a number, without these layers."""
        self.attachment.skip(layers, decodes=False)
        loss = self.loss().item()
        self.attachment.skip((), decodes=False)
        return loss

    def choice(self, name, ranking, seconds):
        """The first layers of a ranking, as many as each number says."""
        layers = {number: tuple(sorted(ranking[:number])) for number in self.numbers}
        losses = {number: self.loss_without(taken) for number, taken in layers.items()}
        return Choice(name, layers, losses, seconds)


def find_layers(run, numbers):
    """`Found`, with as many layers as each of `numbers` says.

    A search runs for the smallest of them; for the others, the layers that it prefers next are taken too.
    """
    chooser = Chooser(run, numbers)
    chooser.model.eval()
    count = len(chooser.attachment.layers)
    order = random.Random(run.seed).sample(range(count), count)
    choices = [chooser.choice("random", order, 0.0), chooser.choice("the last", range(count)[::-1], 0.0)]
    ask = DepthSearch(chooser.model, num_skip=1, reward=lambda loss: -loss)
    for name, measure in (("block influence", block_influence), ("each alone", one_by_one)):
        start = time.perf_counter()
        values = measure(ask, chooser.loss)
        ranking = sorted(range(count), key=lambda layer, values=values: -values[layer])
        choices.append(chooser.choice(name, ranking, time.perf_counter() - start))
    alone = values
    for name, known in (("DAS's search", None), ("DAS's search, begun with each alone", alone)):
        start = time.perf_counter()
        search = _searched(run, min(numbers), known)
        seconds = time.perf_counter() - start + (choices[3].seconds if known else 0.0)
        choices.append(chooser.choice(name, search.bandit.ranking(), seconds))
    return Found(chooser.loss_without(()), [-value for value in alone], choices, search)


def _searched(run, num_skip, known):
    """The finished `DepthSearch`, on a model of its own."""
    model, _ = run.new_model(DAS)
    steps = run.size.search_steps
    search = DepthSearch(
        model,
        num_skip=num_skip,
        seed=run.seed,
        warmup_steps=int(steps * WARMUP_SHARE),
        search_steps=steps,
        interval=INTERVAL,
        step_size=STEP_SIZE,
        evaluation_mode="eval",
    )
    if known is not None:
        search.warm_start(known, SPREAD)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer, schedule = new_optimizer(trained, RATE, steps)
    generator = torch.Generator().manual_seed(run.seed)
    bar = tqdm(run.batches(steps), "search", steps, leave=False, disable=not run.progress)
    for blocks in bar:
        search.sample()
        loss_of(model.train(), blocks).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if search.is_due:
            drawn = torch.randperm(len(run.manual.val), generator=generator)[: run.size.compared]
            search.update(lambda drawn=drawn: loss_of(model, run.manual.val[drawn]))
    search.finish()
    return search
