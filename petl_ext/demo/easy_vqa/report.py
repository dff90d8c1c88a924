"""The report of the demo on easy-VQA, and its charts."""

import platform

import torch

from petl_ext.demo.charts import (
    BESIDE,
    MOST_FREQUENT,
    draw_types,
    frame,
    markdown,
    new_figure,
    save_figure,
    save_report,
    types_table,
)
from petl_ext.demo.easy_vqa.models import LORA_RANK
from petl_ext.demo.easy_vqa.training import NEW_RATE, RATES

COLUMNS = ("method", "trained parameters", "MACs", "accuracy", "training")
CHOICE, OTHER = "the search's choice", "control: DVP with another picture"
# How far DVP at the best layer was to be above these rows.
GOALS = (("text only", "nothing", 15), ("the control", "mean", 10))
BESIDE_LAYERS = {"DVP_adp": "#5a9e4b", "LoRA with the same prompt": "#b0862a"}
LINES = (("nothing", "text only", ":"), ("all tokens", "all visual tokens", "-."), ("mean", "control: mean", "--"))


def write_report(output, run, language_model, results):
    """Writes easy-vqa-<language_model>-report.md and the charts below `output`; returns the report's text."""
    charts = {name: f"easy-vqa-{language_model}-{name}.png" for name in ("layers", "types", "search")}
    scores = _scores(results)
    _draw_layers(run, results, output / charts["layers"])
    some = {name: score for name, score in scores.items() if "DVP, layer" not in name or CHOICE in name}
    draw_types(some, output / charts["types"], majority=True)
    results.search.plot(output / charts["search"])
    parts = [
        _introduction(run),
        markdown([COLUMNS, *_table(results)]),
        _claims(results),
        _search(run, results),
        f"![accuracy for every layer]({charts['layers']})",
        f"![preferences of the layers over the search's steps]({charts['search']})",
        "Accuracy by type of question:",
        types_table(scores, majority=True),
        f"![accuracy by type of question]({charts['types']})",
    ]
    return save_report(parts, output / f"easy-vqa-{language_model}-report.md")


def _introduction(run):
    size, model, tokens = run.size, run.language_model, run.data.splits["train"].tokens
    trains = "adapters and norms of the layers from K on" if model.adapters_only else "the layers from K on"
    counts = {name: f"{len(split):,}" for name, split in run.data.splits.items()}
    pictures = {name: f"{number:,}" for name, number in size.pictures.items()}
    return f"""# Dynamic visual prompting on weights that others trained

The language model is {model.description}; the image encoder is EfficientNet-lite0, trained on ImageNet,
which sees a picture as {tokens.size(1)} tokens of width {tokens.size(2):,}, frozen. The task is easy-VQA: pictures of
one colored shape, questions after its color, its shape, and whether some color or shape is there; 13 answers. Its own
split: {counts["train"]} questions about the first {pictures["train"]} pictures of what it calls train are trained on,
the last {pictures["val"]} are held out for the search and for learning rates, and accuracies are of all
{counts["test"]} questions about the first {pictures["test"]} pictures of what it calls test, ± one standard error of
that sample. Every row: {size.steps} steps of {size.batch} questions (seed {run.seed}), dropout 0, {trains}
trained, those below frozen.

- **text only**: the language model and the head without a picture.
- **all visual tokens**: projected, in front of the words at the same layer.
- **control: mean**: one prompt, the mean of the tokens, which no question guides.
- **DVP, layer K**: the question's state below layer K pools the tokens into one prompt, which enters before layer K.
- **{OTHER}**: DVP at the search's choice, trained as ever, asked with the picture of another question.
- **DVP_adp** trains adapters and norms in the language model, **LoRA** (PEFT's, of rank {LORA_RANK} on all linear
  layers) nothing else of it.

As in the demo of digits, each query projection begins so that over all questions every number of the query has mean 0
and standard deviation 1. Learning rates: {_rates()} of the language model, {NEW_RATE:g} for prompts and head.
Trained parameters include the head; MACs are the language model's side for one question, counted; times are of this
run with one thread (torch {torch.__version__}, {platform.machine()}), without what is computed once: tokens of the
pictures and states of the {len(run.data.texts)} different questions below layer K."""


def _rates():
    return ", ".join(f"{rate:g} for {part}" for part, rate in RATES.items())


def _scores(results):
    """{name in the tables: `Score`}"""
    scores = {}
    for one in results.rows:
        scores[_name(one, results)] = one.score
        if one is results.chosen:
            scores[OTHER] = one.with_other_pictures
    return scores


def _table(results):
    by_type = results.rows[0].score.by_type.values()
    majority = sum(one.count * one.majority for one in by_type) / sum(one.count for one in by_type)
    yield (f"{MOST_FREQUENT} of the type", "0", "0", f"{majority:.1%}", "")
    for one in results.rows:
        cells = f"{one.trained:,}", f"{one.macs / 1e6:.1f} M"
        yield (_name(one, results), *cells, str(one.score), f"{one.seconds:.0f} s")
        if one is results.chosen:
            yield (OTHER, *cells, str(one.with_other_pictures), "")


def _name(one, results):
    return f"**{one.row.full_name}** ({CHOICE})" if one is results.chosen else one.row.full_name


def _claims(results):
    best = results.best
    lines = [f"At the best layer, {best.row.layer}, DVP has {best.score.accuracy:.1%}:", ""]
    for name, sees, goal in GOALS:
        points = _points(best, _first(results, sees))
        reached = "reached" if points >= goal else "not reached"
        lines.append(f"- {points:+.1f} points against {name}; the goal of {goal} is {reached}.")
    lines.append(f"- {_points(best, _first(results, 'all tokens')):+.1f} points against all visual tokens.")
    return "\n".join(lines)


def _first(results, sees):
    return next(one for one in results.rows if one.row.sees == sees)


def _points(one, other):
    return 100 * (one.score.accuracy - other.score.accuracy)


def _search(run, results):
    search, chosen, best = results.search, results.chosen, results.best
    preferences = ", ".join(f"{preference:+.2f}" for preference in search.bandit.preferences)
    layers = run.language_model.layers
    share = results.search_seconds / chosen.seconds
    return f"""`PlacementSearch` chose layer {results.layer} in {search.step} steps with {len(search.history)} updates;
the preferences of layers {layers[0]} to {layers[-1]} are {preferences}. Its regret, how far that layer is below the
best of these, is {_points(best, chosen):.1f} points. It took {results.search_seconds:.0f} s, {share:.0%} of the
fine-tuning at that layer. In it the language model is frozen but for its last layer, and the layers' prompts differ in
queries and types only."""


def _draw_layers(run, results, path):
    figure = new_figure(9, 5)
    axes = figure.add_subplot(xlabel="layer K before which the prompt enters", ylabel="accuracy on the test split, %")
    rows = results.every_layer
    layers = [one.row.layer for one in rows]
    heights = [100 * one.score.accuracy for one in rows]
    errors = [100 * one.score.standard_error for one in rows]
    axes.errorbar(layers, heights, errors, fmt="o-", color="#1f3b63", capsize=3, label="DVP at layer K")
    look = {"color": "#d4502a", "markersize": 14, "fillstyle": "none", "mew": 2.5}
    axes.plot(results.layer, 100 * results.chosen.score.accuracy, "o", **look, label=CHOICE)
    for one in results.rows:
        if one.row.name in BESIDE_LAYERS:
            color = BESIDE_LAYERS[one.row.name]
            axes.plot(one.row.layer, 100 * one.score.accuracy, "s", color=color, label=one.row.name)
    for (sees, label, dashes), color in zip(LINES, ("0.5", "#7a5ea8", "#d4502a"), strict=True):
        axes.axhline(100 * _first(results, sees).score.accuracy, linestyle=dashes, color=color, label=label)
    axes.set_xticks(layers)
    axes.set_ylim(0, 100)
    frame(axes, grid="y")
    axes.set_title(f"easy-VQA: one visual prompt at layer K of {run.language_model.name}")
    axes.legend(**BESIDE)
    save_figure(figure, path)
