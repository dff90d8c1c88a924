"""Goes on with the demo's ViLT for the recipes: `python -m petl_ext.demo.digits.pretrain_statements --output DIR`.

The model reads true and false statements about scenes of the training digits (`statements.py`), restores their masked
words, and tells which are true; between them it goes on with captions. It never sees a question, an answer or an
official file. It has a row for every word of every task: those that only NLVR2's sentences, ScienceQA's problems and
questions have keep the embeddings that they were drawn with.
"""

import argparse
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import ViltModel

from petl_ext.demo.digits import BACKBONE, gqa, nlvr2, retrieval, scienceqa, snli_ve
from petl_ext.demo.digits.pretrain_vilt import (
    VOCABULARY,
    Captions,
    PretrainingModel,
    caption_stage_loss,
    save,
    vilt_config,
)
from petl_ext.demo.digits.pretraining import Optimization, Optimizer
from petl_ext.demo.digits.scenes import SceneMaker, Scenes
from petl_ext.demo.digits.statements import TOLD_WORDS, statement
from petl_ext.tasks.labels import IGNORED

logger = logging.getLogger("petl_ext")

TASKS = (nlvr2, retrieval, scienceqa, gqa, snli_ve)
WORDS = tuple(dict.fromkeys([*VOCABULARY, *(word for task in TASKS for word in task.WORDS)]))
WORD_ID = {word: index for index, word in enumerate(WORDS)}
NUM_TOKENS = 160  # the longest prompt of ScienceQA has 120
MATCH_WEIGHT, CAPTION_WEIGHT = 2.0, 0.3


@dataclass(frozen=True)
class Schedule(Optimization):
    """Steps, the batches of a step, and the optimizer's settings."""

    steps: int = 4000
    captions: int = 16
    statements: int = 64


def new_model() -> PretrainingModel:
    """The demo's backbone with a row for every word of the tasks; the heads are new."""
    model = PretrainingModel(vilt_config(len(WORDS), NUM_TOKENS))
    before = ViltModel.from_pretrained(BACKBONE).state_dict()
    with torch.no_grad():
        for name, tensor in model.vilt.state_dict().items():
            tensor[tuple(slice(size) for size in before[name].shape)] = before[name]
    return model


def make_statements(scenes: Scenes, rng: np.random.Generator) -> Captions:
    """One statement per scene, whole. Behind them, in the same order, stand those that are true, a word masked."""
    told = [statement(scenes.objects(index), rng) for index in range(len(scenes))]
    rows = [_ids(text.split()) for text, _ in told]
    labels = [torch.full_like(row, IGNORED) for row in rows]
    for (_, is_true), row in zip(told, list(rows), strict=True):
        if is_true:
            masked, label = _masked(row, rng)
            rows.append(masked)
            labels.append(label)
    return Captions(
        nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=WORD_ID["[PAD]"]),
        nn.utils.rnn.pad_sequence(labels, batch_first=True, padding_value=IGNORED),
        torch.tensor([int(is_true) for _, is_true in told]),
    )


def _ids(words: Sequence[str]) -> Tensor:
    return torch.tensor([WORD_ID[word] for word in ("[CLS]", *words, "[SEP]")])


def _masked(row: Tensor, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """The row with one of the words masked that make it true, and that word."""
    at = int(rng.choice([at for at, word in enumerate(row.tolist()) if WORDS[word] in TOLD_WORDS]))
    masked, label = row.clone(), torch.full_like(row, IGNORED)
    masked[at], label[at] = WORD_ID["[MASK]"], row[at]
    return masked, label


def with_masked(scenes: Scenes, statements: Captions) -> Scenes:
    """The scenes of the statements, and again those of the true ones."""
    again = np.concatenate([np.arange(len(scenes)), np.flatnonzero(statements.matches.numpy())])
    return Scenes(scenes.images[again], scenes.digits[again], scenes.colors[again])


def statement_results(
    model: PretrainingModel, scenes: Scenes, statements: Captions
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Logits and labels of which statements are true, and of the masked words."""
    output = model(statements.input_ids, with_masked(scenes, statements))
    whole = model.matches(output.pooler_output[: len(scenes)])
    return (whole, statements.matches), model.word_results(output, statements)


def train(model: PretrainingModel, schedule: Schedule, seed: int, progress: bool = True) -> None:
    """Steps of captions and statements."""
    rng, maker, optimizer = np.random.default_rng(seed), SceneMaker("train"), Optimizer(model, schedule)
    model.train()
    for _ in optimizer.steps(schedule.steps, "statements", progress):
        loss = CAPTION_WEIGHT * caption_stage_loss(model, maker.make(schedule.captions, rng), rng)
        scenes = maker.make(schedule.statements, rng)
        matching, words = statement_results(model, scenes, make_statements(scenes, rng))
        optimizer.minimize(loss + MATCH_WEIGHT * F.cross_entropy(*matching) + F.cross_entropy(*words))


@torch.no_grad()
def measure(model: PretrainingModel, num_scenes: int = 1500) -> dict[str, float]:
    """Accuracy on statements about scenes of the validation digits."""
    model.eval()
    rng = np.random.default_rng(0)
    scenes = SceneMaker("val").make(num_scenes, rng)
    results = statement_results(model, scenes, make_statements(scenes, rng))
    return {
        name: (logits.argmax(dim=-1) == labels).float().mean().item()
        for name, (logits, labels) in zip(("true or false", "masked word"), results, strict=True)
    }


README = """# A small pre-trained ViLT for the recipes

Made from the demo's by `python -m petl_ext.demo.digits.pretrain_statements --seed {seed}` in {minutes:.0f} minutes on
one busy CPU thread: {steps} steps of true and false statements about scenes, masked words of the true ones, captions.

- {parameters:,} parameters, stored as float16; `from_pretrained` gives float32.
- Of the digits it saw those that the demo's saw, so none of validation and test. It never saw a question, but some
  statements read like hypotheses of SNLI-VE, which are statements too. Words that only questions, NLVR2's sentences
  and ScienceQA's problems have keep the embeddings that they were drawn with.

Accuracy on 1500 scenes of the validation digits, from the stored float16 weights (float32 in brackets); of the
statements half are true, and several words may fit a mask:

| | |
|---|---|
{rows}
"""


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Goes on with the demo's ViLT, in the words of all tasks.")
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=Schedule.steps)
    parser.add_argument("--no-progress", action="store_true", help="no progress bar")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)  # more are slower on matrices this small, and would change the result
    torch.manual_seed(options.seed)
    schedule = Schedule(steps=options.steps)
    model, start = new_model(), time.monotonic()
    train(model, schedule, options.seed, progress=not options.no_progress)
    minutes = (time.monotonic() - start) / 60
    full = measure(model)
    half = measure(model.half().float())
    save(model, options.output, WORD_ID)
    rows = "\n".join(f"| {name} | {half[name]:.3f} ({full[name]:.3f}) |" for name in full)
    parameters = sum(weight.numel() for weight in model.vilt.parameters())
    facts = {"seed": options.seed, "minutes": minutes, "steps": schedule.steps, "parameters": parameters, "rows": rows}
    (options.output / "README.md").write_text(README.format(**facts), encoding="utf-8")
    logger.info("wrote %s: %s", options.output, half)


if __name__ == "__main__":
    main()
