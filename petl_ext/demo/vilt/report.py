"""The demo's report and charts."""

import math
import platform
from dataclasses import dataclass

import torch

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
GATES = "gates.png"


@dataclass(frozen=True)
class Measured:
    """What one method cost and learned.

    MACs are per question: those added, by formula, and all that the model needs, counted, over the bare backbone's.
    Accuracies are in [0, 1], times in seconds.
    """

    name: str
    trained: int
    new: int
    macs: int
    all_macs: float
    accuracy: float
    by_type: dict
    step: float
    inference: float

    @classmethod
    def of(cls, name, report, all_macs, score, step, inference):
        new = sum(row.parameters for row in report.rows if row.layer not in ("kept", "its own"))
        return cls(name, report.trained, new, report.macs, all_macs, *score, step, inference)

    @property
    def standard_error(self):
        questions = sum(one.count for one in self.by_type.values())
        return math.sqrt(self.accuracy * (1 - self.accuracy) / questions)

    def cells(self):
        return (
            self.name,
            f"{self.trained:,}",
            f"{self.new:,}",
            f"{self.macs / 1e6:.2f} M",
            f"{self.all_macs:.1%}",
            f"{self.accuracy:.1%} ± {self.standard_error:.1%}",
            f"{1e3 * self.step:.0f} ms",
            f"{1e6 * self.inference:.0f} µs",
        )


def write_report(run, measured, das):
    """Writes report.md and the charts below `run.output`; returns the report's text.

    Args:
        das: the `Trained` that a search came before.
    """
    parts = [_introduction(run.size, run.seed), _table(measured), _search(das), _types_table(measured)]
    text = "\n\n".join([*parts, _charts()]) + "\n"
    (run.output / "report.md").write_text(text, encoding="utf-8")
    _draw_costs(measured, run.output / "accuracy.png")
    _draw_types(measured, run.output / "types.png")
    das.search.plot(run.output / GATES)
    return text


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
is forward, backward and optimiser."""


def _table(measured):
    return markdown([COLUMNS, *(one.cells() for one in measured)])


def _search(trained):
    search = trained.search
    last, updates = len(search.layers) - 1, len(search.history)
    preferences = ", ".join(f"{preference:+.2f}" for preference in search.bandit.preferences)
    share = trained.search_seconds / trained.seconds
    return f"""{trained.name}: in brackets the layer, counted from 0, that `DepthSearch` chose in {search.step} steps
with {updates} updates; the preferences for skipping layers 0 to {last} are {preferences}. The search took
{share:.0%} of the time of the training that followed, from the pre-trained weights and without the skipped layer. There
are only {last + 1} layers to choose from: `python -m petl_ext.demo.vilt.every_layer` trains with each of them skipped.

![preferences for skipping over training steps]({GATES})"""


def _types_table(measured):
    types = list(measured[0].by_type)
    majority = [f"{measured[0].by_type[kind].majority:.0%}" for kind in types]
    rows = [[one.name, *(f"{one.by_type[kind].accuracy:.0%}" for kind in types)] for one in measured]
    header = "Accuracy by type of question, beside that of always giving the type's most frequent answer:"
    return f"{header}\n\n" + markdown([("method", *types), ("most frequent answer", *majority), *rows])


def markdown(rows):
    header, *body = rows
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *body]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _charts():
    return "![accuracy over trained parameters](accuracy.png)\n\n![accuracy by type of question](types.png)"


def _draw_costs(measured, path):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4.8), layout="constrained")
    over_parameters, over_macs = figure.subplots(1, 2, sharey=True)
    for one in measured:
        look = {"yerr": 100 * one.standard_error, "fmt": "o", "capsize": 3, "label": one.name}
        over_parameters.errorbar(one.trained, 100 * one.accuracy, **look)
        over_macs.errorbar(100 * one.all_macs, 100 * one.accuracy, **look)
    over_parameters.set(xscale="log", xlabel="trained parameters", ylabel="accuracy on the test split, %")
    over_macs.set(xlabel="MACs of the whole model, % of the bare backbone's")
    for axes in (over_parameters, over_macs):
        axes.margins(x=0.1, y=0.1)
        axes.grid(color="0.92")
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    over_macs.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)
    figure.savefig(path, dpi=120)


def _draw_types(measured, path):
    from matplotlib.figure import Figure

    types = list(measured[0].by_type)
    figure = Figure(figsize=(12, 5), layout="constrained")
    axes = figure.add_subplot(ylabel="accuracy on the test split, %")
    width = 0.8 / len(measured)
    for index, one in enumerate(measured):
        places = [kind + (index - len(measured) / 2 + 0.5) * width for kind in range(len(types))]
        axes.bar(places, [100 * one.by_type[kind].accuracy for kind in types], width, label=one.name)
    for place, kind in enumerate(types):
        rate = 100 * measured[0].by_type[kind].majority
        axes.plot([place - 0.42, place + 0.42], [rate, rate], "k--", label="" if place else "most frequent answer")
    axes.set_xticks(range(len(types)), types)
    axes.margins(x=0.02)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)
    figure.savefig(path, dpi=120)
