"""The picture of a depth search: preferences over steps, and what was drawn and selected."""

import itertools

KEPT = "0.75"
DRAWN, SELECTED = "#c6d4e6", "#1f3b63"


def plot_depth(search, path):
    """See `DepthSearch.plot`."""
    from matplotlib.figure import Figure

    if not search.history:
        raise ValueError("DepthSearch: no update has been made, so there is nothing to plot")
    figure = Figure(figsize=(9, 5.5 + 0.16 * len(search.layers)), layout="constrained")
    heights = (5, 1 + 0.16 * len(search.layers))
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=heights)
    _draw_preferences(above, search)
    _draw_choices(below, search)
    figure.savefig(path, dpi=150)


def _draw_preferences(axes, search):
    from matplotlib import colormaps

    steps = [0, *_edges(search)]
    curves = [[0.0, 0.0, *values] for values in zip(*(entry["preferences"] for entry in search.history), strict=True)]
    selection = search.selection()
    colors = colormaps["turbo"]
    for layer, curve in enumerate(curves):
        if layer not in selection:
            axes.plot(steps, curve, color=KEPT, linewidth=1)
    for rank, layer in enumerate(sorted(selection, key=lambda layer: -curves[layer][-1])):
        color = colors(0.95 - 0.9 * rank / len(selection))
        axes.plot(steps, curves[layer], color=color, linewidth=2, label=_short_names(search.layers)[layer])
    axes.plot([], [], color=KEPT, linewidth=1, label="kept")
    axes.set_ylabel("preference for skipping")
    axes.set_title(f"{len(selection)} of {len(search.layers)} layers to skip, after {len(search.history)} updates")
    axes.legend(title="to skip", loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False, fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)


def _draw_choices(axes, search):
    from matplotlib.patches import Patch

    edges = _edges(search)
    for row in range(len(search.layers)):
        for times, color, height in ((_drawn(search, row), DRAWN, 0.9), (_selected(search, row), SELECTED, 0.4)):
            spans = [(edges[time], edges[time + 1] - edges[time]) for time in times]
            axes.broken_barh(spans, (row - height / 2, height), facecolors=color, linewidth=0)
    axes.set_yticks(range(len(search.layers)), _short_names(search.layers), fontsize=8)
    for row in search.selection():
        axes.get_yticklabels()[row].set_fontweight("bold")
    axes.set_ylim(len(search.layers) - 0.5, -0.5)
    axes.set_xlim(0, edges[-1])
    axes.set_xlabel("training step (micro-batches)")
    patches = [Patch(color=DRAWN, label="drawn and compared"), Patch(color=SELECTED, label="selected")]
    axes.legend(handles=patches, loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False, fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)


def _edges(search):
    """An update's column reaches back to the update before it, that of the first one by one interval."""
    steps = [entry["step"] for entry in search.history]
    return [max(0, steps[0] - search.constants.interval), *steps]


def _drawn(search, layer):
    return [time for time, entry in enumerate(search.history) if any(layer in subset for subset in entry["subsets"])]


def _selected(search, layer):
    return [time for time, entry in enumerate(search.history) if layer in entry["selection"]]


def _short_names(layers):
    """Names without the whole components that all of them begin with."""
    parts = [name.split(".") for name in layers]
    columns = itertools.takewhile(lambda column: len(set(column)) == 1, zip(*parts, strict=False))
    shared = min(sum(1 for _ in columns), min(map(len, parts)) - 1)
    return [".".join(name[max(shared - 1, 0) :]) for name in parts]
