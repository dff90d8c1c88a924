"""Tables and charts of both demos' reports."""

from petl_ext.saving import written_whole

BESIDE = {"loc": "upper left", "bbox_to_anchor": (1.0, 1.0), "frameon": False}
MOST_FREQUENT = "most frequent answer"


def markdown(rows):
    """A table of Markdown; `rows` are tuples of strings, the first the header."""
    header, *body = rows
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *body]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def types_table(scores, majority=False):
    """A table of accuracies by type of question.

    Args:
        scores: {name: `Score`}, all of the same types.
        majority: whether the first row is that of the type's most frequent answer.
    """
    first = next(iter(scores.values())).by_type
    rows = [(name, *(f"{one.accuracy:.0%}" for one in score.by_type.values())) for name, score in scores.items()]
    if majority:
        rows.insert(0, (MOST_FREQUENT, *(f"{one.majority:.0%}" for one in first.values())))
    return markdown([("method", *first), *rows])


def draw_types(scores, path, majority=False):
    """A chart of what `types_table` tells."""
    figure = new_figure(12, 5)
    axes = figure.add_subplot(ylabel="accuracy on the test split, %")
    types = next(iter(scores.values())).by_type
    width = 0.8 / len(scores)
    for index, (name, score) in enumerate(scores.items()):
        positions = [position + (index - len(scores) / 2 + 0.5) * width for position in range(len(types))]
        axes.bar(positions, [100 * one.accuracy for one in score.by_type.values()], width, label=name)
    for position, one in enumerate(types.values() if majority else ()):
        label = "" if position else MOST_FREQUENT
        axes.plot([position - 0.42, position + 0.42], [100 * one.majority] * 2, "k--", label=label)
    axes.set_xticks(range(len(types)), types)
    axes.margins(x=0.02)
    frame(axes)
    axes.legend(**BESIDE)
    save_figure(figure, path)


def new_figure(width, height):
    """An empty figure; sizes in inches."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def frame(axes, grid=None):
    """Draws axes on the left and below only; `grid`: "x", "y" or "both"."""
    axes.spines[["top", "right"]].set_visible(False)
    if grid:
        axes.grid(axis=grid, color="0.92")
        axes.set_axisbelow(True)


def save_figure(figure, path):
    """The picture is written whole; after an error the file is as it was."""
    with written_whole(path) as unfinished:
        figure.savefig(unfinished, dpi=120)


def save_report(parts, path):
    """Writes the parts of a report, with an empty line between them, and returns its text; whole or not at all."""
    text = "\n\n".join(parts) + "\n"
    with written_whole(path) as unfinished:
        unfinished.write_text(text, encoding="utf-8")
    return text
