"""The demo of DVP on easy-VQA. Everything in the report is measured in the run that writes it."""

import json
import time
from dataclasses import dataclass, replace
from pathlib import Path

from tqdm.auto import tqdm

from petl_ext.counting import count_macs, count_parameters
from petl_ext.demo.charts import markdown
from petl_ext.demo.data import Score
from petl_ext.demo.easy_vqa.language_models import LANGUAGE_MODELS
from petl_ext.demo.easy_vqa.report import write_report
from petl_ext.demo.easy_vqa.search import find_layer
from petl_ext.demo.easy_vqa.training import FULL, QUICK, RATES, Row, Run
from petl_ext.demo.packages import EASY_VQA, EFFICIENTNET, EFFICIENTNET_CODE, require
from petl_ext.demo.training import one_quiet_thread
from petl_ext.saving import written_whole
from petl_ext.search import PlacementSearch

TEXT_ONLY = Row("text only", "nothing")
ALL_TOKENS = Row("all visual tokens", "all tokens")
MEAN = Row("control: mean of the tokens, no question", "mean")
DVP = Row("DVP", "prompt")
DVP_ADP = Row("DVP_adp", "prompt", "adapters")
LORA = Row("LoRA with the same prompt", "prompt", "LoRA")
TRIED_RATES = (1e-4, 3e-4, 1e-3)


@dataclass(frozen=True)
class Measured:
    """What one row cost and learned. MACs are the language model's side, for one question."""

    row: Row
    trained: int
    macs: int
    score: Score
    with_other_pictures: Score | None  # of DVP alone
    seconds: float


@dataclass(frozen=True)
class Results:
    """All rows, and the search before them."""

    rows: list
    search: PlacementSearch
    search_seconds: float
    layer: int  # the search's choice

    @property
    def every_layer(self):
        """DVP's rows, from the lowest layer."""
        return [one for one in self.rows if one.row.name == DVP.name]

    @property
    def chosen(self):
        """DVP's row at the search's choice."""
        return next(one for one in self.every_layer if one.row.layer == self.layer)

    @property
    def best(self):
        """DVP's row at the best layer."""
        return max(self.every_layer, key=lambda one: one.score.accuracy)


def check_packages(language_model):
    """Raises ModuleNotFoundError, with the line that installs them, where packages are missing, and ValueError where
    files of theirs are not the known ones."""
    packages = (EASY_VQA, EFFICIENTNET, EFFICIENTNET_CODE, *LANGUAGE_MODELS[language_model].packages)
    require(packages)
    for package in packages:
        package.check()


def run_easy_vqa_demo(output="demo_out", quick=False, seed=0, progress=True, language_model="minilm"):
    """Searches for DVP's layer, trains every row and writes a report and charts.

    Args:
        output: folder for the tokens of the pictures, the report and the charts.
        quick: few steps on few pictures, to see it run.
        seed: of the new parameters and the order of the questions.
        progress: shows progress bars.
        language_model: one of LANGUAGE_MODELS.

    Returns:
        The report's text.

    Raises:
        ModuleNotFoundError, ValueError: as `check_packages`.
    """
    check_packages(language_model)
    with one_quiet_thread():
        run = Run.prepare(output, QUICK if quick else FULL, language_model, seed, progress)
        start = time.perf_counter()
        search = find_layer(run)
        seconds = time.perf_counter() - start
        chosen = run.language_model.layers[search.selection()]
        rows = [run.with_layer(row, chosen) for row in _rows(run.language_model)]
        measured = [measure(row, run) for row in tqdm(rows, desc="trainings", disable=not progress)]
    results = Results(measured, search, seconds, chosen)
    _save_numbers(results, Path(output) / f"easy-vqa-{language_model}-seed{seed}.json")
    return write_report(Path(output), run, language_model, results)


def _rows(language_model):
    """The table's; on a language model in which DVP always trains adapters, DVP_adp is DVP."""
    every_layer = [replace(DVP, layer=layer) for layer in language_model.layers]
    return [TEXT_ONLY, ALL_TOKENS, MEAN, *every_layer, *([] if language_model.adapters_only else [DVP_ADP]), LORA]


def measure(row, run):
    """Trains one row and measures it on the test split."""
    model, test = run.make_model(row), run.data.splits["test"]
    seconds = run.train(model, RATES[row.trains], row.full_name)
    other = run.score(model, test.with_other_pictures()) if row.name == DVP.name else None
    return Measured(row, count_parameters(model)[0], _macs(model, row, run), run.score(model, test), other, seconds)


def tune(output="demo_out", seed=0, progress=True, language_model="minilm"):
    """Compares learning rates of what trains in the language model, on the validation split, at its last layer
    but one.

    Returns:
        A table.
    """
    check_packages(language_model)
    layers = LANGUAGE_MODELS[language_model].layers
    with one_quiet_thread():
        run = Run.prepare(output, FULL, language_model, seed, progress)
        rows = [run.with_layer(replace(row, layer=None), layers[-2]) for row in _rows(run.language_model)]
        tried = {row.name: row for row in rows}.values()
        lines = [("method", *(f"{rate:g}" for rate in TRIED_RATES))]
        for row in tqdm(tried, desc="methods", disable=not progress):
            lines.append((row.name, *(f"{_validated(row, rate, run).accuracy:.1%}" for rate in TRIED_RATES)))
    return markdown(lines)


def _validated(row, rate, run):
    model = run.make_model(row)
    run.train(model, rate, f"{row.name}, {rate:g}")
    return run.score(model, run.data.splits["val"])


def _macs(model, row, run):
    """Of the whole language model: those of the layers below the prompt, which were run before, included."""
    question = run.data.splits["test"][:1]
    length = int(run.texts.mask[question.texts].sum())
    whole = count_macs(run.texts.model, {"input_ids": run.texts.input_ids[question.texts][:, :length]})
    layers = "encoder.layer" if run.language_model.reads_first else "layers"
    below = sum(whole.of(f"{layers}.{layer}") for layer in range(row.layer))
    return below + count_macs(model, run.inputs(question)).total


def _save_numbers(results, path):
    rows = {one.row.full_name: one.score.accuracy for one in results.rows}
    other = results.chosen.with_other_pictures.accuracy
    numbers = {"chosen": results.layer, "best": results.best.row.layer, "accuracy": rows, "other pictures": other}
    numbers |= {"search seconds": results.search_seconds, "seconds": results.chosen.seconds}
    with written_whole(path) as unfinished:
        unfinished.write_text(json.dumps(numbers, indent=2) + "\n", encoding="utf-8")
