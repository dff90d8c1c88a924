"""The DVP demo: MiniLM, a pre-trained BERT, answers questions about handwritten digits, shown to it as one prompt.

All rows of a task see the same data in the same order for the same number of steps. Everything in the report is
measured in the run that writes it.
"""

import math
import time
from dataclasses import dataclass, replace

from tqdm.auto import tqdm

from petl_ext.counting import count_macs, count_parameters
from petl_ext.demo.dvp.report import write_dvp_report
from petl_ext.demo.dvp.training import DVP_QUICK, LAYERS, DVPMethod, DVPRun, DVPSize, find_insert_layer
from petl_ext.demo.vilt.training import BarOnly, one_quiet_thread

TEXT_ONLY = DVPMethod("text only", "text only")
ALL_TOKENS = DVPMethod("all visual tokens as prompts", "all tokens", insert_layer=0)
MEAN = DVPMethod("control: mean of the tokens, no question", "mean")
DVP = DVPMethod("DVP", "prompt")
DVP_ADP = DVPMethod("DVP_adp", "prompt", use_adapters=True)
# Rows of each task; on VQA there is one of DVP for every layer.
ROWS = {
    "VQA": (TEXT_ONLY, ALL_TOKENS, MEAN, *(replace(DVP, insert_layer=layer) for layer in range(LAYERS)), DVP_ADP),
    "GQA": (TEXT_ONLY, MEAN, DVP, DVP_ADP),
    "SNLI-VE": (TEXT_ONLY, MEAN, DVP, DVP_ADP),
}


@dataclass(frozen=True)
class DVPMeasured:
    """What one row cost and learned. MACs are the language model's side, for one question; accuracies are in [0, 1]."""

    method: DVPMethod
    trained: int
    macs: int
    accuracy: float
    by_type: dict
    seconds: float

    @property
    def name(self):
        prompted = self.method.kind in ("mean", "prompt")
        return f"{self.method.name}, layer {self.method.insert_layer}" if prompted else self.method.name

    @property
    def standard_error(self):
        questions = sum(one.count for one in self.by_type.values())
        return math.sqrt(self.accuracy * (1 - self.accuracy) / questions)


@dataclass(frozen=True)
class DVPResults:
    """All rows by task, and the search before them."""

    rows: dict
    search: object
    search_seconds: float

    @property
    def every_layer(self):
        """DVP's rows on VQA, from layer 0."""
        return [row for row in self.rows["VQA"] if row.method.kind == "prompt" and not row.method.use_adapters]

    @property
    def chosen(self):
        """DVP's row on VQA at the search's choice."""
        return self.every_layer[self.search.selection()]

    def first(self, kind, use_adapters=False):
        """The first row on VQA of that kind."""
        rows = self.rows["VQA"]
        return next(row for row in rows if row.method.kind == kind and row.method.use_adapters == use_adapters)


def run_dvp_demo(output="demo_out", quick=False, seed=0, progress=True):
    """Searches for DVP's layer, trains every row and writes dvp-report.md and charts.

    Args:
        output: folder for the data, the report and the charts.
        quick: few steps on little data, to see it run.
        seed: of the data, the new parameters and the order of the batches.
        progress: shows progress bars.

    Returns:
        The report's text.
    """
    with one_quiet_thread():
        run = DVPRun.prepare(output, dvp_size_of(quick), seed, progress)
        start = time.perf_counter()
        search = find_insert_layer(run)
        seconds = time.perf_counter() - start
        methods = [(task, _at(method, search.selection())) for task, rows in ROWS.items() for method in rows]
        rows = {task: [] for task in ROWS}
        for task, method in tqdm(methods, desc="trainings", disable=not progress):
            rows[task].append(train_and_measure(method, task, run))
    return write_dvp_report(run, DVPResults(rows, search, seconds))


def dvp_size_of(quick, search_steps=None):
    size = DVP_QUICK if quick else DVPSize()
    return size if search_steps is None else replace(size, search_steps=search_steps)


def train_and_measure(method, task, run):
    """Trains one row, with the time that it took, and measures it on the test split."""
    start = time.perf_counter()
    model = run.make_model(method, task)
    trainer = run.trainer(model, task)
    if run.progress:
        trainer.add_callback(BarOnly)
    trainer.train()
    seconds = time.perf_counter() - start
    data = run.data.tasks[task]
    prediction = trainer.predict(data.datasets["test"])
    by_type = data.by_type(data.vocabulary.decode(prediction.predictions), data.datasets["test"])
    questions = sum(one.count for one in by_type.values())
    accuracy = sum(one.count * one.accuracy for one in by_type.values()) / questions
    macs = count_macs(model, run.data.batch(task, "test", 1)).total
    return DVPMeasured(method, count_parameters(model)[0], macs, accuracy, by_type, seconds)


def _at(method, insert_layer):
    """The method at the searched layer, where it has none of its own."""
    return replace(method, insert_layer=insert_layer) if method.insert_layer is None else method
