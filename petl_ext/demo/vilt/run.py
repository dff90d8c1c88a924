"""The demo: a small pre-trained ViLT learns to answer questions about pictures of handwritten digits, by each method.

All methods see the same data in the same order for the same number of steps. Everything in the report is measured in
the run that writes it.
"""

import statistics
import time
from dataclasses import dataclass, replace

import torch
from tqdm.auto import tqdm
from transformers import Trainer

from petl_ext import AdapterConfig, APTConfig, ClassifierOnlyConfig, DeepPromptConfig, FullTuningConfig
from petl_ext.attaching.handle import Attachment
from petl_ext.counting import count_macs
from petl_ext.demo.training import one_quiet_thread
from petl_ext.demo.vilt.depth_search import DAS, find_layers
from petl_ext.demo.vilt.report import Measured, write_report
from petl_ext.demo.vilt.training import BOTTLENECK, Method, ViltRun
from petl_ext.search import DepthSearch

TIMED_ROUNDS = 15
# What --tune tries: the learning rate of the classifier, and that of what a method trains besides the head.
HEAD_RATES = (2e-3, 5e-3, 1e-2, 2e-2)
RATES = (2e-4, 5e-4, 1e-3, 2e-3, 4e-3, 1e-2, 2e-2)

METHODS = (
    Method("classifier only", ClassifierOnlyConfig(), 0.0, 5e-3),
    Method("deep prompts, 16", DeepPromptConfig(num_prompts=16), 4e-3, 1e-2),
    Method("APT, 50 prompts", APTConfig(num_prompts=50), 4e-3, 5e-3),
    Method("APT, 200 prompts", APTConfig(num_prompts=200), 4e-3, 1e-2),
    Method("adapter", AdapterConfig(bottleneck=BOTTLENECK), 1e-2, 5e-3),
    Method("parallel adapter", AdapterConfig(kind="parallel", bottleneck=BOTTLENECK), 4e-3, 5e-3),
    DAS,
    Method("full tuning", FullTuningConfig(), 5e-4, 5e-3),
    Method("full, not pre-trained", FullTuningConfig(), 2e-4, 2e-3, pretrained=False),
)


@dataclass(frozen=True)
class Trained:
    """A method's model after training, and the search that chose what it skips."""

    method: Method
    attachment: Attachment
    trainer: Trainer
    search: DepthSearch | None
    search_seconds: float
    seconds: float

    @property
    def name(self):
        skipped = f" ({', '.join(map(str, self.search.selection()))})" if self.search else ""
        return self.method.name + skipped


def run_demo(output="demo_out", quick=False, seed=0, progress=True):
    """Trains every method and writes report.md and charts.

    Args:
        output: folder for the data, the report and the charts.
        quick: few steps on little data, to see it run.
        seed: of the data, the new parameters and the order of the batches.
        progress: shows progress bars.

    Returns:
        The report's text.
    """
    with one_quiet_thread():
        run = ViltRun.prepare(output, ViltRun.size_of(quick), seed, progress)
        trained = [train(method, run) for method in tqdm(METHODS, desc="methods", disable=not progress)]
        measured = _measure(trained, run)
    return write_report(run, measured, next(one for one in trained if one.search))


def tune(output="demo_out", seed=0, progress=True):
    """Compares learning rates on the validation split: each method's own, and at the best of them that of the head.

    Returns:
        A table of all that was tried.
    """
    with one_quiet_thread():
        run = replace(ViltRun.prepare(output, ViltRun.full, seed, progress), progress=False)

        def score(method):
            return run.task.score(train(method, run).trainer, "val").accuracy

        tried = [trial for method in tqdm(METHODS, disable=not progress) for trial in _try_rates(method, score)]
    return "\n".join(
        f"{method.name:28} rate {method.learning_rate:<8g} head rate {method.head_learning_rate:<8g} val {accuracy:.1%}"
        for method, accuracy in tried
    )


def train(method, run):
    """Trains one method, after the search where it has one."""
    start = time.perf_counter()
    search = find_layers(method, run) if method.num_skip else None
    if search is not None:
        method = replace(method, config=replace(method.config, skip=search.selection(), permanent=True))
    found = time.perf_counter()
    attachment = run.attach(method)
    trainer = run.trainer(attachment, method)
    run.train(trainer)
    attachment.model.eval()
    return Trained(method, attachment, trainer, search, found - start, time.perf_counter() - found)


def _try_rates(method, score):
    tried = []
    for field_name, rates in (("learning_rate", RATES), ("head_learning_rate", HEAD_RATES)):
        if getattr(method, field_name):
            trials = [replace(method, **{field_name: rate}) for rate in rates]
            tried += [(trial, score(trial)) for trial in trials if trial not in dict(tried)]
            method = max(tried, key=lambda trial: trial[1])[0]
    return tried


def _measure(trained, run):
    task, batch = run.task, run.size.batch
    scores = [task.score(one.trainer, "test") for one in trained]
    inputs = task.inputs("test", batch)
    inference = _race([_inference(one, inputs) for one in trained])
    steps = _race([_training_step(one, task.batch("train", batch)) for one in trained])
    tokens = inputs["input_ids"].size(1) + 1 + 4  # text, the image's class token, patches
    question = {name: tensor[:1] for name, tensor in inputs.items()}
    macs = [count_macs(one.attachment.model, question).total for one in trained]
    bare = count_macs(run.attach(METHODS[0]).model, question).total
    return [
        Measured.of(one.name, one.attachment.report(tokens), its_macs / bare, score, step, seconds / batch)
        for one, its_macs, score, step, seconds in zip(trained, macs, scores, steps, inference, strict=True)
    ]


def _inference(trained, inputs):
    def run():
        with torch.no_grad():
            trained.trainer.model(**inputs)

    return run


def _training_step(trained, batch):
    model, optimizer = trained.trainer.model, trained.trainer.optimizer

    def run():
        model(**batch).loss.backward()
        optimizer.step()  # changes nothing: the schedule has ended at a learning rate of zero
        optimizer.zero_grad()

    return run


def _race(runs):
    """Median seconds of each, in turns: the machine's speed drifts, and then drifts for all."""
    for run in runs:
        run()
    seconds = [[] for _ in runs]
    for _ in range(TIMED_ROUNDS):
        for run, times in zip(runs, seconds, strict=True):
            start = time.perf_counter()
            run()
            times.append(time.perf_counter() - start)
    return [statistics.median(times) for times in seconds]
