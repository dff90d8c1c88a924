"""How fast SmolLM2 decodes without some of its layers, for which nothing need be trained.

Greedy, one sequence, with the cache; the rows take turns, and each round has its own ratio.
"""

import argparse
import statistics
from dataclasses import replace

import torch
from transformers.utils import logging

from petl_ext.counting import count_macs
from petl_ext.demo.charts import markdown
from petl_ext.demo.llama.run import check, race
from petl_ext.demo.llama.training import DAS, QUICK, LlamaRun

FIRST = 10  # of the layers that are left out; which they are makes no difference to the time
COLUMNS = ("layers left out", "weights", "MACs", "tokens/s", "against bare, median", "quartiles")


def compare(run, numbers):
    """A table: bare, and with so many layers left out for good."""
    models = [run.new_model()[0]]
    for number in numbers:
        config = replace(DAS, skip=tuple(range(FIRST, FIRST + number)), permanent=True)
        models.append(run.new_model(config)[0].eval())
    block = {"input_ids": run.manual.test[:1], "use_cache": False}
    bare = count_macs(models[0], block).total
    speeds, rows = race(models, run), [COLUMNS]
    for number, model, rates in zip((0, *numbers), models, speeds, strict=True):
        ratios = [rate / of_bare for rate, of_bare in zip(rates, speeds[0], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        rows.append(
            (
                f"{number} of {len(run.whole.model.layers)}",
                f"{sum(parameter.nbytes for parameter in model.parameters()) / 2**20:.0f} MiB",
                f"{count_macs(model, block).total / bare:.1%}",
                f"{statistics.median(rates):.1f}",
                f"{middle:.2f}x",
                f"{low:.2f} to {high:.2f}",
            )
        )
    return markdown(rows)


def main(arguments=None):
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, nargs="+", default=[4, 8], help="how many are left out (default: 4 8)")
    parser.add_argument("--rounds", type=int, default=9, help="default: %(default)s")
    parser.add_argument("--tokens", type=int, default=32, help="of a round (default: %(default)s)")
    options = parser.parse_args(arguments)
    check()
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    size = replace(QUICK, rounds=options.rounds, generated=options.tokens)
    print(compare(LlamaRun.prepare(size, 0, progress=False), options.layers))


if __name__ == "__main__":
    main()
