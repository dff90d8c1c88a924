"""The report of the ViLT's demo, and its charts."""

import platform
from dataclasses import dataclass

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
from petl_ext.demo.data import Score

COLUMNS = (
    "method",
    "trained parameters",
    "of these new",
    "added MACs",
    "all MACs",
    "accuracy",
    "training step",
    "inference per image",
)
COSTS_CHART, TYPES_CHART, GATES_CHART = "accuracy.png", "types.png", "gates.png"


@dataclass(frozen=True)
class Measured:
    """What one method cost and learned.

    MACs are per question: those added, by formula, and all that the model needs, counted, over the bare backbone's.
    Times are in seconds.
    """

    name: str
    trained: int
    new: int
    macs: int
    all_macs: float
    score: Score
    step: float
    inference: float

    @classmethod
    def of(cls, name, report, all_macs, score, step, inference):
        new = sum(row.parameters for row in report.rows if row.class_name not in ("kept", "its own"))
        return cls(name, report.trained, new, report.macs, all_macs, score, step, inference)

    def cells(self):
        return (
            self.name,
            f"{self.trained:,}",
            f"{self.new:,}",
            f"{self.macs / 1e6:.2f} M",
            f"{self.all_macs:.1%}",
            str(self.score),
            f"{1e3 * self.step:.0f} ms",
            f"{1e6 * self.inference:.0f} µs",
        )


def write_report(run, measured, das):
    """Writes report.md and the charts below `run.output`; returns the report's text.

    Args:
        das: the `Trained` that a search came before.
    """
    scores = {one.name: one.score for one in measured}
    table = markdown([COLUMNS, *(one.cells() for one in measured)])
    charts = (
        f"![accuracy over trained parameters]({COSTS_CHART})",
        f"![accuracy by type of question]({TYPES_CHART})",
    )
    _draw_costs(measured, run.output / COSTS_CHART)
    draw_types(scores, run.output / TYPES_CHART, majority=True)
    das.search.plot(run.output / GATES_CHART)
    parts = [_introduction(run.size, run.seed), table, _search(das), _types(scores), *charts]
    return save_report(parts, run.output / "report.md")


def _introduction(size, seed):
    scenes = size.scenes
    return f"""# Answering questions about handwritten digits

A ViLT of 0.9 million parameters, pre-trained on captions and object tags of such pictures, trained by each method for
{size.steps} steps of {size.batch} questions about {scenes["train"]:,} pictures (seed {seed}). Accuracy: on questions
about {scenes["test"]:,} pictures of other handwritten digits, ± one standard error of that sample.

Every method also trains the classifier, the pooler and the token-type embeddings. Learning rates were chosen on the
validation split (`petl-ext demo --tune`). Added MACs: of the new layers that run, for one question, by formula; all
MACs: of the whole model for one question, counted, over those of the bare backbone. Times are medians of turns in one
process with one thread and batches of {size.batch} (torch {torch.__version__}, {platform.machine()}); a training step
is forward, backward and optimizer."""


def _search(trained):
    search = trained.search
    last, updates = len(search.layers) - 1, len(search.history)
    preferences = ", ".join(f"{preference:+.2f}" for preference in search.bandit.preferences)
    share = trained.search_seconds / trained.seconds
    return f"""{trained.name}: in brackets the layer, counted from 0, that `DepthSearch` chose in {search.step} steps
with {updates} updates; the preferences for skipping layers 0 to {last} are {preferences}. The search took
{share:.0%} of the time of the training that followed, from the pre-trained weights and without the skipped layer. There
are only {last + 1} layers to choose from: `python -m petl_ext.demo.vilt.every_layer` trains with each of them skipped.

![preferences for skipping over training steps]({GATES_CHART})"""


def _types(scores):
    header = "Accuracy by type of question, beside that of always giving the type's most frequent answer:"
    return f"{header}\n\n{types_table(scores, majority=True)}"


def _draw_costs(measured, path):
    figure = new_figure(12, 4.8)
    over_parameters, over_macs = figure.subplots(1, 2, sharey=True)
    for one in measured:
        accuracy = 100 * one.score.accuracy
        look = {"yerr": 100 * one.score.standard_error, "fmt": "o", "capsize": 3, "label": one.name}
        over_parameters.errorbar(one.trained, accuracy, **look)
        over_macs.errorbar(100 * one.all_macs, accuracy, **look)
    over_parameters.set(xscale="log", xlabel="trained parameters", ylabel="accuracy on the test split, %")
    over_macs.set(xlabel="MACs of the whole model, % of the bare backbone's")
    for axes in (over_parameters, over_macs):
        axes.margins(x=0.1, y=0.1)
        frame(axes, grid="both")
    over_macs.legend(**BESIDE)
    save_figure(figure, path)
