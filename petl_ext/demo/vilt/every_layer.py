"""How good a layer did the demo's search choose? The training of the DAS row with every single layer skipped."""

import argparse
from dataclasses import replace

from tqdm.auto import tqdm

from petl_ext.demo.charts import markdown
from petl_ext.demo.training import one_quiet_thread
from petl_ext.demo.vilt.depth_search import DAS, find_layers
from petl_ext.demo.vilt.run import train
from petl_ext.demo.vilt.training import ViltRun


def compare(run):
    """A table: each layer's preference after the search, and the accuracies of the training that skips it."""
    search = find_layers(DAS, run)
    layers = range(len(search.layers))
    scores = [_scores(layer, run) for layer in tqdm(layers, desc="layers", disable=not run.progress)]
    rows = [
        (
            f"{layer}{', the choice of the search' * (layer in search.selection())}",
            f"{search.bandit.preferences[layer]:+.2f}",
            *(f"{score:.1%}" for score in scores[layer]),
        )
        for layer in layers
    ]
    means = [sum(column) / len(column) for column in zip(*scores, strict=True)]
    rows.append(("a random one, on average", "", *(f"{mean:.1%}" for mean in means)))
    return markdown([("skipped layer", "preference", "val", "test"), *rows])


def _scores(layer, run):
    config = replace(DAS.config, skip=(layer,), permanent=True)
    trained = train(replace(DAS, config=config, num_skip=0), run)
    return [run.task.score(trained.trainer, split).accuracy for split in ("val", "test")]


def main(arguments=None):
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", default="demo_out", help="folder for the data (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="few steps on little data, to see it run")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-progress", action="store_true", help="without progress bars")
    options = parser.parse_args(arguments)
    size = ViltRun.size_of(options.quick)
    with one_quiet_thread():
        print(compare(ViltRun.prepare(options.output, size, options.seed, not options.no_progress)))


if __name__ == "__main__":
    main()
