"""The DVP demo: MiniLM, a pre-trained BERT, answers questions about handwritten digits, shown to it as one prompt.

All rows of a task see the same data in the same order for the same number of steps. Everything in the report is
measured in the run that writes it.
"""

import time
from dataclasses import dataclass, replace

from tqdm.auto import tqdm

from petl_ext.counting import count_macs, count_parameters
from petl_ext.demo.data import Score
from petl_ext.demo.dvp.placement_search import find_insert_layer
from petl_ext.demo.dvp.report import write_report
from petl_ext.demo.dvp.training import LAYERS, DVPRun, Method
from petl_ext.demo.training import one_quiet_thread
from petl_ext.search import PlacementSearch

TEXT_ONLY = Method("text only", "text only")
ALL_TOKENS = Method("all visual tokens as prompts", "all tokens", insert_layer=0)
MEAN = Method("control: mean of the tokens, no question", "mean")
DVP = Method("DVP", "prompt")
DVP_ADP = Method("DVP_adp", "prompt", use_adapters=True)
# Rows of each task; on VQA there is one of DVP for every layer.
ROWS = {
    "VQA": (TEXT_ONLY, ALL_TOKENS, MEAN, *(replace(DVP, insert_layer=layer) for layer in range(LAYERS)), DVP_ADP),
    "GQA": (TEXT_ONLY, MEAN, DVP, DVP_ADP),
    "SNLI-VE": (TEXT_ONLY, MEAN, DVP, DVP_ADP),
}


@dataclass(frozen=True)
class Measured:
    """What one row cost and learned. MACs are the language model's side, for one question."""

    method: Method
    trained: int
    macs: int
    score: Score
    seconds: float

    @property
    def name(self):
        prompted = self.method.visual_input in ("mean", "prompt")
        return f"{self.method.name}, layer {self.method.insert_layer}" if prompted else self.method.name


@dataclass(frozen=True)
class Results:
    """All rows by task, and the search before them."""

    rows: dict
    search: PlacementSearch
    search_seconds: float

    @property
    def every_layer(self):
        """DVP's rows on VQA, from layer 0."""
        return [row for row in self.rows["VQA"] if row.method.visual_input == "prompt" and not row.method.use_adapters]

    @property
    def chosen(self):
        """DVP's row on VQA at the search's choice."""
        return self.every_layer[self.search.selection()]

    def first(self, visual_input, use_adapters=False):
        """The first row on VQA with that input."""
        rows = self.rows["VQA"]
        return next(
            row for row in rows if row.method.visual_input == visual_input and row.method.use_adapters == use_adapters
        )


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
        run = DVPRun.prepare(output, DVPRun.size_of(quick), seed, progress)
        start = time.perf_counter()
        search = find_insert_layer(run)
        seconds = time.perf_counter() - start
        methods = [(task, _at(method, search.selection())) for task, rows in ROWS.items() for method in rows]
        rows = {task: [] for task in ROWS}
        for task, method in tqdm(methods, desc="trainings", disable=not progress):
            rows[task].append(train_and_measure(method, task, run))
    return write_report(run, Results(rows, search, seconds))


def train_and_measure(method, task, run):
    """Trains one row, with the time that it took, and measures it on the test split."""
    start = time.perf_counter()
    model = run.make_model(method, task)
    trainer = run.trainer(model, task)
    run.train(trainer)
    seconds = time.perf_counter() - start
    task = run.tasks[task]
    score = task.score(trainer, "test")
    macs = count_macs(model, task.batch("test", 1)).total
    return Measured(method, count_parameters(model)[0], macs, score, seconds)


def _at(method, insert_layer):
    """The method at the searched layer, where it has none of its own."""
    return replace(method, insert_layer=insert_layer) if method.insert_layer is None else method
