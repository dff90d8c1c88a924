"""One table of several runs, like the papers': what each method costs and how well it does, beside published rows."""

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from petl_ext.recipes.reading import read_document
from petl_ext.recipes.runs import Run, open_run
from petl_ext.recipes.tasks import TASKS
from petl_ext.saving import written_whole
from petl_ext.tasks.files import write_text

PUBLISHED = Path(__file__).parent / "published.yaml"
ABSENT = "-"
COSTS = ("new parameters", "trained", "added MACs", "all MACs")
TIMES = ("step, ms", "memory, MiB", "inference, ms")


@dataclass(frozen=True)
class Row:
    """One method on one model.

    Attributes:
        costs, times: cells, in the order of `COSTS` and `TIMES`.
        scores: {column: the accuracies, in [0, 1], of its runs}.
    """

    name: str
    model: str
    costs: tuple[str, ...]
    scores: dict[str, list[float]]
    times: tuple[str, ...]

    def cells(self, columns: Sequence[str]) -> tuple[str, ...]:
        """Of a table with these columns of scores; the average is over all of them."""
        means = [statistics.mean(self.scores[column]) for column in columns if column in self.scores]
        average = f"{100 * statistics.mean(means):.2f}" if len(means) == len(columns) else ABSENT
        return (self.name, self.model, *self.costs, *map(self._score, columns), average, *self.times)

    def _score(self, column):
        """The mean, with the standard deviation of several runs."""
        found = [100 * score for score in self.scores.get(column, ())]
        if not found:
            return ABSENT
        spread = f" ± {statistics.stdev(found):.2f}" if len(found) > 1 else ""
        return f"{statistics.mean(found):.2f}{spread}"


@dataclass(frozen=True)
class Comparison:
    """What `petl-ext compare` shows; `rows` are of runs, each followed by the published one that is its own."""

    rows: list[Row]
    sources: list[str]

    @property
    def columns(self) -> list[str]:
        """Of the scores: those that any row has, in the order of the tasks."""
        known = [column for task in TASKS.values() for column in task.columns.values()]
        return [column for column in known if any(column in row.scores for row in self.rows)]

    def cells(self) -> list[tuple[str, ...]]:
        """All of the table, its header first."""
        header = ("method", "model", *COSTS, *self.columns, "average", *TIMES)
        return [header, *(row.cells(self.columns) for row in self.rows)]

    def markdown(self) -> str:
        """The table, and where published rows are from."""
        header, *body = self.cells()
        lines = [header, ["---", "---", *["---:"] * (len(header) - 2)], *body]
        table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
        return "\n\n".join([table, *(f"Published: {source}." for source in self.sources)]) + "\n"

    def save(self, folder: str | Path) -> None:
        """Writes table.md and table.png, each whole or not at all."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / "table.md", self.markdown())
        self._draw(folder / "table.png")

    def _draw(self, path):
        from matplotlib.figure import Figure

        header, *body = self.cells()
        figure = Figure(figsize=(1.25 * len(header), 0.4 * (len(body) + 2)), layout="constrained")
        axes = figure.add_subplot()
        axes.set_axis_off()
        table = axes.table(cellText=body, colLabels=header, loc="center", edges="horizontal")
        table.auto_set_font_size(False)
        table.set_fontsize(9)
        table.auto_set_column_width(range(len(header)))
        with written_whole(path) as unfinished:
            figure.savefig(unfinished, dpi=150)


def compare(folders: Iterable[str | Path], split: str = "test") -> Comparison:
    """The table of finished runs; those of one label and model, on other tasks or with other seeds, share a row.

    Raises ValueError or FileNotFoundError if a folder is of no finished run, or a run has not been evaluated.
    """
    together: dict[tuple[str, str], list[Run]] = {}
    for folder in folders:
        run = open_run(folder)
        run.training()
        if not _metrics(run, split):
            raise ValueError(f"{folder} must have been evaluated on {split}, got no results: petl-ext eval {folder}")
        together.setdefault((run.recipe.label, _model(run)), []).append(run)
    tables, rows, sources = read_document(PUBLISHED).values, [], {}
    for (label, model), runs in together.items():
        rows.append(_row(label, model, runs, split))
        for published in {run.recipe.published for run in runs if run.recipe.published is not None}:
            table = _table(tables, published)
            rows.append(_published_row(published, table, model))
            sources[published.table] = table["source"]
    return Comparison(rows, list(sources.values()))


def _model(run):
    given = run.recipe.model
    return f"{given.family} {Path(given.name or given.checkpoint).name}"


def _metrics(run, split):
    return run.metrics(split) or run.metrics(f"{split}-0")


def _row(label, model, runs, split):
    trainings = [run.training() for run in runs]
    measured = [_metrics(run, split) for run in runs]
    scores: dict[str, list[float]] = {}
    for run, metrics in zip(runs, measured, strict=True):
        for name, column in TASKS[run.recipe.task].columns.items():
            if name in metrics:
                scores.setdefault(column, []).append(metrics[name])
    costs = [_mean(trainings, name) for name in ("new_parameters", "trained_parameters", "added_macs", "all_macs")]
    inference = _mean(measured, "inference_seconds")
    times = (
        _shown(_mean(trainings, "step_seconds"), 1e3),
        _shown(_mean(trainings, "peak_memory"), 2**-20, 0),
        _shown(inference, 1e3, 2),
    )
    return Row(label, model, tuple(map(_count, costs)), scores, times)


def _mean(entries: Iterable[dict[str, Any]], name: str) -> float | None:
    known = [entry[name] for entry in entries if entry[name] is not None]
    return statistics.mean(known) if known else None


def _shown(value, factor, digits=1):
    return ABSENT if value is None else f"{factor * value:.{digits}f}"


def _count(number):
    """ "1.92M": as the papers' tables have it."""
    if number is None:
        return ABSENT
    for size, letter in ((1e9, "G"), (1e6, "M")):
        if number >= size / 100:
            return f"{number / size:.2f}{letter}"
    return f"{number:.0f}"


def _table(tables, published):
    if published.table not in tables or published.row not in tables[published.table]["rows"]:
        raise ValueError(f"published must name a table and a row of {PUBLISHED.name}, got {published}")
    return tables[published.table]


def _published_row(published, table, model):
    row = table["rows"][published.row]
    scores = {column: [score / 100] for column, score in zip(table["columns"], row["scores"], strict=True)}
    costs = (row["parameters"], ABSENT, row["macs"], ABSENT)
    return Row(f"{published.row}, published", model, costs, scores, (ABSENT,) * len(TIMES))
