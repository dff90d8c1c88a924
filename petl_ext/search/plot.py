"""The pictures of searches: preferences over steps, and what came of them."""

import itertools

import torch

from petl_ext.saving import written_whole

KEPT = "0.75"
DRAWN, SELECTED = "#c6d4e6", "#1f3b63"
BESIDE = {"loc": "upper left", "bbox_to_anchor": (1.0, 1.0), "frameon": False, "fontsize": 9}


def plot_depth(search, path):
    """See `DepthSearch.plot`."""
    figure, above, below = _figure(search, len(search.layers))
    selection = search.selection()
    _draw_preferences(above, search, selection, _short_names(search.layers))
    above.plot([], [], color=KEPT, linewidth=1, label="kept")
    above.set_ylabel("preference for skipping")
    above.set_title(f"{len(selection)} of {len(search.layers)} layers to skip, after {len(search.history)} updates")
    above.legend(title="to skip", **BESIDE)
    _draw_choices(below, search)
    _save(figure, path)


def plot_placement(search, path):
    """See `PlacementSearch.plot`."""
    figure, above, below = _figure(search, search.num_layers)
    winner = search.selection()
    _draw_preferences(above, search, [winner], [f"layer {layer}" for layer in range(search.num_layers)])
    above.plot([], [], color=KEPT, linewidth=1, label="others")
    above.set_ylabel("preference")
    above.set_title(f"The prompt enters at layer {winner} of 0 to {search.num_layers - 1}, after {search.step} steps")
    above.legend(**BESIDE)
    figure.colorbar(_draw_probabilities(below, search), cax=below.inset_axes((1.03, 0, 0.02, 1)), label="probability")
    below.set_ylabel("layer")
    _label_rows(below, search, range(search.num_layers), [winner])
    _save(figure, path)


def _save(figure, path):
    """The picture is written whole; after an error the file is as it was."""
    with written_whole(path) as unfinished:
        figure.savefig(unfinished, dpi=150)


def _figure(search, rows):
    """A figure with axes for curves above and for a row per layer below, which share the steps."""
    if not search.history:
        raise ValueError(f"{type(search).__name__}: no update has been made, so there is nothing to plot")
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "matplotlib":
            raise
        name = type(search).__name__
        raise ImportError(f"{name}.plot needs matplotlib: pip install matplotlib") from error

    figure = Figure(figsize=(9, 5.5 + 0.16 * rows), layout="constrained")
    return figure, *figure.subplots(2, 1, sharex=True, height_ratios=(5, 1 + 0.16 * rows))


def _draw_preferences(axes, search, selection, names):
    from matplotlib import colormaps

    steps = [0, *_edges(search)]
    curves = [[0.0, 0.0, *values] for values in zip(*(entry["preferences"] for entry in search.history), strict=True)]
    colors = colormaps["turbo"]
    for layer, curve in enumerate(curves):
        if layer not in selection:
            axes.plot(steps, curve, color=KEPT, linewidth=1)
    for rank, layer in enumerate(sorted(selection, key=lambda layer: -curves[layer][-1])):
        color = colors(0.95 - 0.9 * rank / len(selection))
        axes.plot(steps, curves[layer], color=color, linewidth=2, label=names[layer])
    axes.spines[["top", "right"]].set_visible(False)


def _draw_probabilities(axes, search):
    """A cell for each layer and update, the darker the likelier."""
    preferences = torch.tensor([entry["preferences"] for entry in search.history], dtype=torch.float64)
    probabilities = (preferences / search.constants.temperature).softmax(1)
    rows = [layer - 0.5 for layer in range(search.num_layers + 1)]
    return axes.pcolormesh(_edges(search), rows, probabilities.T.numpy(), cmap="Blues", vmin=0, rasterized=True)


def _label_rows(axes, search, names, selection):
    axes.set_yticks(range(len(names)), names, fontsize=8)
    for row in selection:
        axes.get_yticklabels()[row].set_fontweight("bold")
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_xlim(0, _edges(search)[-1])
    axes.set_xlabel("training step (micro-batches)")


def _draw_choices(axes, search):
    from matplotlib.patches import Patch

    edges = _edges(search)
    for row in range(len(search.layers)):
        for times, color, height in ((_drawn(search, row), DRAWN, 0.9), (_selected(search, row), SELECTED, 0.4)):
            spans = [(edges[time], edges[time + 1] - edges[time]) for time in times]
            axes.broken_barh(spans, (row - height / 2, height), facecolors=color, linewidth=0)
    _label_rows(axes, search, _short_names(search.layers), search.selection())
    patches = [Patch(color=DRAWN, label="drawn and compared"), Patch(color=SELECTED, label="selected")]
    axes.legend(handles=patches, **BESIDE)
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
