"""The demo of SmolLM2: everything in the report is measured in the run that writes it."""

import os
import statistics
import time
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from tqdm.auto import tqdm
from transformers.utils import logging as transformers_logging

from petl_ext.counting import count_macs, count_parameters
from petl_ext.demo.llama.layers import find_layers
from petl_ext.demo.llama.report import write_report
from petl_ext.demo.llama.training import FULL, QUICK, ROWS, LlamaRun, Row
from petl_ext.demo.packages import GGUF, SMOLLM2, require

MEMORY = 6 * 2**30  # bytes: SmolLM2 eight times in float32, and what a training keeps


@dataclass(frozen=True)
class Measured:
    """What one row cost and learned.

    Attributes:
        weights: bytes of all parameters.
        macs: of one block, as a share of the bare model's.
        perplexity: (of the test part, its standard error).
        continued: the prompt's continuation.
        tokens_per_second: median over the rounds.
        speed: over the bare model's of the same round, the median; rounds are interleaved.
        seconds: of the training.
    """

    row: Row
    trained: int
    weights: int
    macs: float
    perplexity: tuple
    continued: str
    tokens_per_second: float
    speed: float
    seconds: float


def check():
    """Raises ModuleNotFoundError, with the line that installs them, where SmolLM2 or gguf is missing, ValueError where
    the weights are not the known ones, and MemoryError on a machine that cannot hold the models."""
    require([SMOLLM2, GGUF])
    SMOLLM2.check()
    if hasattr(os, "sysconf"):
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        if memory < MEMORY:
            raise MemoryError(f"memory must be {MEMORY / 2**30:.0f} GiB or more, got {memory / 2**30:.1f} GiB")


def run_llama_demo(output="demo_out", quick=False, seed=0, progress=True):
    """Finds what SmolLM2 can do without, trains every row and writes a report and charts.

    Args:
        output: folder for them.
        quick: one step of each on little text, to see it run.
        seed: of the new parameters, the searches and the order of the text.
        progress: shows progress bars.

    Returns:
        The report's text.

    Raises:
        ModuleNotFoundError, ValueError, MemoryError: as `check`.
    """
    check()
    Path(output).mkdir(parents=True, exist_ok=True)
    with _quiet():
        run = LlamaRun.prepare(QUICK if quick else FULL, seed, progress)
        found = find_layers(run, sorted({row.num_skip for row in ROWS if row.num_skip}))
        trained = [_train(row, found, run) for row in tqdm(ROWS, desc="rows", disable=not progress)]
        measured = _measure(trained, run)
    return write_report(Path(output), run, found, measured)


def _train(row, found, run):
    """(row, model, seconds) after the training."""
    config = row.config
    if row.num_skip:
        config = replace(config, skip=found.choices[-1].layers[row.num_skip], permanent=True)
    model, _ = run.new_model(config)
    seconds = 0.0 if config is None else run.train(model, row.rate, row.name)
    return row, model.eval(), seconds


def _measure(trained, run):
    speeds = race([model for _, model, _ in trained], run)
    block = {"input_ids": run.manual.test[:1], "use_cache": False}
    bare = count_macs(trained[0][1], block).total
    measured = []
    for (row, model, seconds), rates in zip(trained, speeds, strict=True):
        relative = [rate / of_bare for rate, of_bare in zip(rates, speeds[0], strict=True)]
        measured.append(
            Measured(
                row,
                count_parameters(model)[0],
                sum(parameter.nbytes for parameter in model.parameters()),
                count_macs(model, block).total / bare,
                run.perplexity(model),
                run.continued(model),
                statistics.median(rates),
                statistics.median(relative),
                seconds,
            )
        )
    return measured


def race(models, run):
    """Tokens per second of each in each round, in turns: the machine's speed drifts, and then drifts for all."""
    rates = [[] for _ in models]
    for model in models:
        run.continued(model, 2)
    for _ in range(run.size.rounds):
        for model, its in zip(models, rates, strict=True):
            start = time.perf_counter()
            run.continued(model)
            its.append(run.size.generated / (time.perf_counter() - start))
    return rates


@contextmanager
def _quiet():
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        transformers_logging.enable_progress_bar()
