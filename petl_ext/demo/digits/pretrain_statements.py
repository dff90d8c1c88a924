"""Goes on with the demo's ViLT for the recipes: `python -m petl_ext.demo.digits.pretrain_statements --output DIR`.

The model reads true statements about scenes of the training digits (`statements.py`) and restores a masked word of
each; meanwhile it goes on with captions. It never sees a question, an answer or an official file. It has a row for
every word of every task: words that only questions, NLVR2's sentences and ScienceQA's problems have keep the embeddings
that they were drawn with.
"""

import argparse
import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
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
CAPTION_WEIGHT = 0.3


@dataclass(frozen=True)
class Schedule(Optimization):
    """Steps, the batches of a step, and the optimizer's settings."""

    steps: int = 1000
    captions: int = 16
    statements: int = 32


def new_model() -> PretrainingModel:
    """The demo's backbone with a row for every word of the tasks; the heads are new."""
    model = PretrainingModel(vilt_config(len(WORDS), NUM_TOKENS))
    before = ViltModel.from_pretrained(BACKBONE).state_dict()
    with torch.no_grad():
        for name, tensor in model.vilt.state_dict().items():
            tensor[tuple(slice(size) for size in before[name].shape)] = before[name]
    return model


def make_statements(scenes: Scenes, rng: np.random.Generator) -> Captions:
    """One statement per scene, a word masked."""
    rows, labels = [], []
    for index in range(len(scenes)):
        words = ("[CLS]", *statement(scenes.objects(index), rng).split(), "[SEP]")
        row = torch.tensor([WORD_ID[word] for word in words])
        at = int(rng.choice([at for at, word in enumerate(words) if word in TOLD_WORDS]))
        label = torch.full_like(row, IGNORED)
        label[at], row[at] = row[at], WORD_ID["[MASK]"]
        rows.append(row)
        labels.append(label)
    return Captions(
        nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=WORD_ID["[PAD]"]),
        nn.utils.rnn.pad_sequence(labels, batch_first=True, padding_value=IGNORED),
        matches=torch.tensor([], dtype=torch.long),
    )


def train(model: PretrainingModel, schedule: Schedule, seed: int, progress: bool = True) -> None:
    """Steps of captions and statements."""
    rng, maker, optimizer = np.random.default_rng(seed), SceneMaker("train"), Optimizer(model, schedule)
    model.train()
    for _ in optimizer.steps(schedule.steps, "statements", progress):
        loss = CAPTION_WEIGHT * caption_stage_loss(model, maker.make(schedule.captions, rng), rng)
        scenes = maker.make(schedule.statements, rng)
        statements = make_statements(scenes, rng)
        words = model.word_results(model(statements.input_ids, scenes), statements)
        optimizer.minimize(loss + F.cross_entropy(*words))


@torch.no_grad()
def masked_word_accuracy(model: PretrainingModel, num_scenes: int = 1500) -> float:
    """Of statements about scenes of the validation digits."""
    model.eval()
    rng = np.random.default_rng(0)
    scenes = SceneMaker("val").make(num_scenes, rng)
    statements = make_statements(scenes, rng)
    logits, labels = model.word_results(model(statements.input_ids, scenes), statements)
    return (logits.argmax(dim=-1) == labels).float().mean().item()


README = """# A small pre-trained ViLT for the recipes

Made from the demo's by `python -m petl_ext.demo.digits.pretrain_statements --seed {seed}` on one
CPU thread: {steps} steps of masked words of true statements about scenes, and of captions.

- {parameters:,} parameters, stored as float16; `from_pretrained` gives float32.
- Of the digits it saw those that the demo's saw, so none of validation and test. It never saw a question, but some
  statements read like hypotheses of SNLI-VE, which are statements too. Words that only questions, NLVR2's sentences
  and ScienceQA's problems have keep the embeddings that they were drawn with.
- It restores {half:.1%} of masked words of statements about 1500 scenes of the validation digits, where several words
  may fit ({full:.1%} in float32).
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
    model = new_model()
    train(model, schedule, options.seed, progress=not options.no_progress)
    full = masked_word_accuracy(model)
    half = masked_word_accuracy(model.half().float())
    save(model, options.output, WORD_ID)
    parameters = sum(weight.numel() for weight in model.vilt.parameters())
    facts = {"seed": options.seed, "steps": schedule.steps, "parameters": parameters}
    facts |= {"full": full, "half": half}
    (options.output / "README.md").write_text(README.format(**facts), encoding="utf-8")
    logger.info("wrote %s: %.3f of masked words", options.output, half)


if __name__ == "__main__":
    main()
