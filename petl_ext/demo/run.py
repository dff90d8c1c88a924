"""The demo: a small pre-trained ViLT learns to answer questions about pictures of handwritten digits, by each method.

All methods see the same data in the same order for the same number of steps. Everything in the report is measured in
the run that writes it.
"""

import statistics
import time
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from tqdm.auto import tqdm
from transformers import (
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainingArguments,
    ViltConfig,
    ViltForQuestionAnswering,
    ViltProcessor,
    set_seed,
)
from transformers.utils import logging as transformers_logging

from petl_ext import APTConfig, ClassifierOnlyConfig, DeepPromptConfig, FullTuningConfig, attach
from petl_ext.attach.attachment import Attachment
from petl_ext.demo.report import Measured, write_report
from petl_ext.tasks.digits import BACKBONE, DigitsFiles, write_digits
from petl_ext.tasks.vqa import AnswerVocabulary, VQACollator, VQADataset, accuracy_by_type, compute_metrics

SPLITS = ("train", "val", "test")
# What every method trains besides its own parameters, as the paper's baselines do.
HEAD = ("classifier", "pooler", "token_type_embeddings")
TIMED_ROUNDS = 15
# What --tune tries: the learning rate of the classifier, and that of what a method trains besides the head.
HEAD_RATES = (2e-3, 5e-3, 1e-2, 2e-2)
RATES = (2e-4, 5e-4, 1e-3, 2e-3, 4e-3, 1e-2)


@dataclass(frozen=True)
class Method:
    """A row of the table. The learning rates are those that did best on the validation split (petl-ext demo --tune)."""

    name: str
    config: object
    learning_rate: float
    head_learning_rate: float
    pretrained: bool = True


METHODS = (
    Method("classifier only", ClassifierOnlyConfig(), 0.0, 5e-3),
    Method("deep prompts, 16", DeepPromptConfig(num_prompts=16), 4e-3, 1e-2),
    Method("APT, 50 prompts", APTConfig(num_prompts=50), 4e-3, 5e-3),
    Method("APT, 200 prompts", APTConfig(num_prompts=200), 4e-3, 1e-2),
    Method("full tuning", FullTuningConfig(), 5e-4, 5e-3),
    Method("full, not pre-trained", FullTuningConfig(), 2e-4, 2e-3, pretrained=False),
)


@dataclass(frozen=True)
class Size:
    """How much is generated and trained."""

    steps: int = 600
    batch: int = 32
    scenes: dict = field(default_factory=lambda: {"train": 5000, "val": 500, "test": 1000})


QUICK = Size(steps=100, scenes={"train": 1500, "val": 100, "test": 300})


@dataclass(frozen=True)
class Data:
    """The three splits, and what turns their items into batches."""

    datasets: dict
    collator: VQACollator
    vocabulary: AnswerVocabulary

    @classmethod
    def prepare(cls, folder, size, seed, progress):
        """Writes the data to `folder`, or reads what an earlier run wrote there."""
        if not folder.exists():
            write_digits(folder, size.scenes, seed=seed, progress=progress)
        files = {split: DigitsFiles.of(folder, split) for split in SPLITS}
        processor = ViltProcessor.from_pretrained(BACKBONE)
        vocabulary = AnswerVocabulary.from_annotations([files["train"].annotations])
        datasets = {
            split: VQADataset(
                file.questions,
                file.images,
                processor,
                vocabulary,
                file.annotations,
                image_name=file.image_name,
                cache_images=True,
            )
            for split, file in files.items()
        }
        return cls(datasets, VQACollator(processor), vocabulary)

    def batch(self, split, count):
        dataset = self.datasets[split]
        return self.collator([dataset[index] for index in range(count)])


@dataclass(frozen=True)
class Trained:
    """A method's model after training."""

    method: Method
    attachment: Attachment
    trainer: Trainer

    def score(self, dataset):
        """(mean score, score by question type) on `dataset`."""
        prediction = self.trainer.predict(dataset)
        answers = dataset.vocabulary.decode(prediction.predictions)
        return prediction.metrics["test_vqa_score"], accuracy_by_type(answers, dataset.annotations)


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
    size, output = QUICK if quick else Size(), Path(output)
    with _one_quiet_thread():
        data = _prepare(output, size, seed, progress)
        bar = tqdm(METHODS, desc="methods", disable=not progress)
        trained = [_train(method, data, size, seed, output, progress) for method in bar]
        measured = _measure(trained, data, size)
    return write_report(output, measured, size, seed)


def tune(output="demo_out", seed=0, progress=True):
    """Compares learning rates on the validation split: each method's own, and at the best of them that of the head.

    Returns:
        A table of all that was tried.
    """
    size, output = Size(), Path(output)
    with _one_quiet_thread():
        data = _prepare(output, size, seed, progress)

        def score(method):
            return _train(method, data, size, seed, output, progress=False).score(data.datasets["val"])[0]

        tried = [trial for method in tqdm(METHODS, disable=not progress) for trial in _search(method, score)]
    return "\n".join(
        f"{method.name:24} rate {method.learning_rate:<8g} head rate {method.head_learning_rate:<8g} val {accuracy:.1%}"
        for method, accuracy in tried
    )


def _search(method, score):
    tried = []
    for field_name, rates in (("learning_rate", RATES), ("head_learning_rate", HEAD_RATES)):
        if getattr(method, field_name):
            trials = [replace(method, **{field_name: rate}) for rate in rates]
            tried += [(trial, score(trial)) for trial in trials if trial not in dict(tried)]
            method = max(tried, key=lambda trial: trial[1])[0]
    return tried


class _BarOnly(ProgressCallback):
    """transformers' progress bar without the figures that it prints between the steps."""

    def on_log(self, *arguments, **named):
        pass


@contextmanager
def _one_quiet_thread():
    """On matrices of this size several threads are slower than one; and a head that is new is no news here."""
    threads, verbosity = torch.get_num_threads(), transformers_logging.get_verbosity()
    torch.set_num_threads(1)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        transformers_logging.set_verbosity(verbosity)
        transformers_logging.enable_progress_bar()


def _prepare(output, size, seed, progress):
    return Data.prepare(output / f"digits-{size.scenes['train']}-seed{seed}", size, seed, progress)


def _make_model(method, num_labels):
    if method.pretrained:
        return ViltForQuestionAnswering.from_pretrained(BACKBONE, num_labels=num_labels)
    return ViltForQuestionAnswering(ViltConfig.from_pretrained(BACKBONE, num_labels=num_labels))


def _train(method, data, size, seed, output, progress):
    set_seed(seed)
    model = _make_model(method, len(data.vocabulary))
    attachment = attach(model, method.config, keep=HEAD)
    arguments = TrainingArguments(
        output_dir=str(output),
        max_steps=size.steps,
        per_device_train_batch_size=size.batch,
        per_device_eval_batch_size=2 * size.batch,
        lr_scheduler_type="linear",
        warmup_steps=size.steps // 10,
        use_cpu=True,
        seed=seed,
        save_strategy="no",
        logging_strategy="no",
        report_to=[],
        disable_tqdm=not progress,
        remove_unused_columns=False,
        label_names=["labels"],
    )
    trainer = Trainer(
        model,
        arguments,
        data_collator=data.collator,
        train_dataset=data.datasets["train"],
        compute_metrics=compute_metrics,
        optimizers=(torch.optim.AdamW(_groups(attachment, method), betas=(0.9, 0.98), weight_decay=0.01), None),
    )
    trainer.remove_callback(PrinterCallback)
    if progress:
        trainer.remove_callback(ProgressCallback)
        trainer.add_callback(_BarOnly)
    trainer.train()
    model.eval()
    return Trained(method, attachment, trainer)


def _groups(attachment, method):
    """The classifier is new and learns fastest; the rest of the head is pre-trained and takes half its rate."""
    groups = {}
    for name, parameter in attachment.named_parameters():
        part = next((part for part in HEAD if f".{part}." in f".{name}."), None)
        rates = {"classifier": method.head_learning_rate, None: method.learning_rate}
        groups.setdefault(rates.get(part, method.head_learning_rate / 2), []).append(parameter)
    return [{"params": parameters, "lr": rate} for rate, parameters in groups.items()]


def _measure(trained, data, size):
    test, batch = data.datasets["test"], data.batch("test", size.batch)
    scores = [one.score(test) for one in trained]
    inference = _race([_inference(one, batch) for one in trained])
    steps = _race([_training_step(one, data.batch("train", size.batch)) for one in trained])
    tokens = batch["input_ids"].size(1) + 1 + 4  # text, the image's class token, patches
    return [
        Measured.of(one.method.name, one.attachment.report(tokens), *score, step, seconds / size.batch)
        for one, score, step, seconds in zip(trained, scores, steps, inference, strict=True)
    ]


def _inference(trained, batch):
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}

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
