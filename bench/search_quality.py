"""How good is the layer that a search chooses? Every layer is tried, and beside it every way of choosing, at its cost.

    python bench/search_quality.py                  # digits, seeds 0 to 4: two hours of a core
    python bench/search_quality.py --quick          # the demo's quick size: a quarter of an hour
    python bench/search_quality.py --seeds 0 1      # some

The problem is the demo's: which of the four layers of its ViLT can be left out (`petl-ext demo`), each choice followed
by the same training. The regret is the accuracy with the best layer left out less that with the chosen one, on the test
split. Writes search-quality.json and search-quality.md to bench/results/search; what is there of a seed and size is not
measured again.
"""

import argparse
import json
import math
import statistics
import time
from dataclasses import replace
from pathlib import Path

from petl_ext.demo.charts import markdown
from petl_ext.demo.training import one_quiet_thread
from petl_ext.demo.vilt.depth_search import DAS, DigitsDepthSearch
from petl_ext.demo.vilt.run import train
from petl_ext.demo.vilt.training import ViltRun
from petl_ext.saving import written_whole
from petl_ext.search import block_influence, one_by_one

RESULTS = Path(__file__).parent / "results" / "search"
WAYS = (
    "a random one",
    "the last",
    "block influence",
    "DAS's search",
    "each alone, after DAS's search",
    "DAS's search, begun with block influence",
)
INTRODUCTION = """What `python bench/search_quality.py` measured: which of the four layers of the demo's ViLT can be
left out, each choice followed by the same training. The regret is the accuracy with the best layer left out less that
with the chosen one, on the test split. Times are of the runs, beside whatever else the machine did."""
COMPARED = 4  # validation batches by which each is tried alone


def measure(run):
    """All of one seed: {"accuracies": one per layer, "seconds": of a training, "choices": {way: [layer, seconds]}}."""
    accuracies, seconds = [], []
    for layer in range(4):
        config = replace(DAS.config, skip=(layer,), permanent=True)
        trained = train(replace(DAS, config=config, num_skip=0), run)
        accuracies.append(run.task.score(trained.trainer, "test").accuracy)
        seconds.append(trained.seconds)
    return {"accuracies": accuracies, "seconds": statistics.mean(seconds), "choices": choose(run)}


def choose(run):
    """{way: [layer, seconds that it took]} but for the random one."""
    task, size = run.task, run.size
    batches = [task.batch("val", count * size.batch) for count in range(1, COMPARED + 1)]
    choices = {"the last": [3, 0.0]}
    search = DigitsDepthSearch.new_search(run, {"num_skip": 1})
    start = time.perf_counter()
    influence = block_influence(search, lambda: search.model.eval()(**batches[-1]))
    of_influence = time.perf_counter() - start
    choices["block influence"] = [influence.index(max(influence)), of_influence]
    start = time.perf_counter()
    DigitsDepthSearch.train_search(search, run)
    searched = time.perf_counter() - start
    choices["DAS's search"] = [search.selection()[0], searched]
    start = time.perf_counter()
    alone = one_by_one(search, lambda: search.model(**batches[-1]).loss)
    choices["each alone, after DAS's search"] = [alone.index(max(alone)), searched + time.perf_counter() - start]
    search = DigitsDepthSearch.new_search(run, {"num_skip": 1})
    search.warm_start(influence)
    start = time.perf_counter()
    DigitsDepthSearch.train_search(search, run)
    choices["DAS's search, begun with block influence"] = [
        search.selection()[0],
        of_influence + time.perf_counter() - start,
    ]
    return choices


def regrets_of(measured, way):
    """Of one seed, in points; that of a random choice is the mean of all layers'."""
    best = max(measured["accuracies"])
    if way == "a random one":
        return 100 * (best - statistics.mean(measured["accuracies"]))
    return 100 * (best - measured["accuracies"][measured["choices"][way][0]])


def table(kept):
    """One row for each way: its regret of each seed, their mean ± its standard error, and its share of a training."""
    seeds = sorted(kept, key=int)
    header = ("chosen by", *(f"seed {seed}" for seed in seeds), "mean regret", "time, of a training's")
    rows = [header]
    for way in WAYS:
        regrets = [regrets_of(kept[seed], way) for seed in seeds]
        error = f" ± {statistics.stdev(regrets) / math.sqrt(len(regrets)):.1f}" if len(regrets) > 1 else ""
        shares = [kept[s]["choices"][way][1] / kept[s]["seconds"] for s in seeds if way in kept[s]["choices"]]
        share = statistics.mean(shares) if shares else 0.0
        cells = [f"{regret:.1f}" for regret in regrets]
        rows.append((way, *cells, f"{statistics.mean(regrets):.1f}{error}", f"{share:.0%}"))
    return markdown(rows)


def layers_table(kept):
    """The accuracies of all layers."""
    rows = [("left out", *(f"layer {layer}" for layer in range(4)))]
    rows += [(f"seed {seed}", *(f"{a:.1%}" for a in kept[seed]["accuracies"])) for seed in sorted(kept, key=int)]
    return markdown(rows)


def written(all_kept):
    """The text of search-quality.md."""
    parts = ["# How good is the layer that a search chooses?", INTRODUCTION]
    for name, steps, batch in (("quick", ViltRun.quick.steps, ViltRun.quick.batch), ("full", *full_size())):
        if name in all_kept:
            parts.append(f"## {steps} steps of {batch} questions\n\nRegret in points, ± one standard error over seeds:")
            parts += [
                table(all_kept[name]),
                "Accuracy of the training without each layer:",
                layers_table(all_kept[name]),
            ]
    return "\n\n".join(parts) + "\n"


def full_size():
    return ViltRun.full.steps, ViltRun.full.batch


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--output", default="search_quality", help="folder of the data (default: %(default)s)")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where the tables are (default: %(default)s)")
    options = parser.parse_args(arguments)
    options.results.mkdir(parents=True, exist_ok=True)
    path = options.results / "search-quality.json"
    kept = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    of_size = kept.setdefault("quick" if options.quick else "full", {})
    for seed in options.seeds:
        if str(seed) in of_size:
            continue
        with one_quiet_thread():
            run = ViltRun.prepare(options.output, ViltRun.size_of(options.quick), seed, progress=False)
            of_size[str(seed)] = measure(run)
        for file, text in ((path, json.dumps(kept, indent=1) + "\n"), (path.with_suffix(".md"), written(kept))):
            with written_whole(file) as unfinished:
                unfinished.write_text(text, encoding="utf-8")
    print(written(kept))


if __name__ == "__main__":
    main()
