"""One table of several runs of `petl-ext demo dvp`, which differ in the seed.

petl-ext demo dvp --seed 0; petl-ext demo dvp --seed 1; petl-ext demo dvp --seed 2
python -m petl_ext.demo.easy_vqa.seeds
"""

import argparse
import json
import math
import statistics
from pathlib import Path

from petl_ext.demo.charts import markdown


def compare(runs):
    """A table of what runs have written, {seed: numbers}: of each row its accuracies, their mean and standard error."""
    seeds = sorted(runs)
    rows = [("", *(f"seed {seed}" for seed in seeds), "mean")]
    for title, key in (("layer that the search chose", "chosen"), ("best layer", "best")):
        rows.append((title, *(str(runs[seed][key]) for seed in seeds), ""))
    shares = [runs[seed]["search seconds"] / runs[seed]["seconds"] for seed in seeds]
    rows.append(("time of the search, of that of the fine-tuning", *(f"{share:.0%}" for share in shares), ""))
    for title, values in _accuracies([runs[seed] for seed in seeds]).items():
        rows.append((title, *(f"{100 * value:.1f}" for value in values), _mean(values)))
    return markdown(rows)


def _accuracies(runs):
    """{row: its accuracy of each run}; rows at the search's choice have one name, wherever that is."""
    named = {}
    for run in runs:
        at_choice = {
            name.removesuffix(f", layer {run['chosen']}"): accuracy
            for name, accuracy in run["accuracy"].items()
            if name.endswith(f", layer {run['chosen']}")
        }
        at_choice["DVP with another picture"] = run["other pictures"]
        at_choice["DVP at the best layer"] = run["accuracy"][f"DVP, layer {run['best']}"]
        at_choice["regret of the search"] = at_choice["DVP at the best layer"] - at_choice["DVP"]
        for name, accuracy in at_choice.items():
            named.setdefault(name, []).append(accuracy)
    return named


def _mean(values):
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return f"{100 * statistics.mean(values):.1f} ± {100 * error:.1f}"


def main(arguments=None):
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default="demo_out", help="of the runs (default: %(default)s)")
    parser.add_argument("--language-model", default="minilm", help="theirs (default: %(default)s)")
    options = parser.parse_args(arguments)
    prefix = f"easy-vqa-{options.language_model}-seed"
    files = {int(file.stem.removeprefix(prefix)): file for file in options.output.glob(f"{prefix}*.json")}
    if not files:
        raise SystemExit(f"{options.output} must hold what petl-ext demo dvp has written, got no {prefix}*.json")
    print(compare({seed: json.loads(file.read_text(encoding="utf-8")) for seed, file in files.items()}))


if __name__ == "__main__":
    main()
