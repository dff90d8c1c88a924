"""How the demo trains: all rows see the same questions in the same order for the same number of steps."""

import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm.auto import tqdm
from transformers import set_seed

from petl_ext.demo.data import Score
from petl_ext.demo.easy_vqa.data import EasyVQA, read
from petl_ext.demo.easy_vqa.language_models import LANGUAGE_MODELS, ReadTexts
from petl_ext.demo.easy_vqa.models import AllTokens, give_lora, give_mean_prompt, make_dvp
from petl_ext.demo.training import groups_by_rate

ANSWERED_AT_ONCE = 200
# Of the language model's layers, of adapters and norms in it, and of LoRA in it: `petl-ext demo dvp --tune` compares
# others.
RATES = {"layers": 3e-4, "adapters": 1e-3, "LoRA": 1e-3}
NEW_RATE = 2e-3  # of prompts and head


@dataclass(frozen=True)
class Size:
    """How much is read and trained; `pictures` is {split: how many}."""

    steps: int
    batch: int
    search_steps: int
    search_batch: int
    compared: int
    pictures: dict


FULL = Size(
    steps=250,
    batch=32,
    search_steps=100,
    search_batch=16,
    compared=96,
    pictures={"train": 3600, "val": 200, "test": 300},
)
QUICK = Size(
    steps=8,
    batch=16,
    search_steps=10,
    search_batch=8,
    compared=16,
    pictures={"train": 60, "val": 10, "test": 20},
)


@dataclass(frozen=True)
class Row:
    """A row of the tables.

    Attributes:
        sees: "nothing", "all tokens", "mean" or "prompt".
        trains: what of the language model: "layers", "adapters" or "LoRA".
        layer: where the picture enters, from which on something is trained; None stands for the search's choice.
    """

    name: str
    sees: str
    trains: str = "layers"
    layer: int | None = None

    @property
    def full_name(self):
        return f"{self.name}, layer {self.layer}"


@dataclass(frozen=True)
class Run:
    """What all trainings of one command have in common."""

    size: Size
    seed: int
    progress: bool
    data: EasyVQA
    texts: ReadTexts

    @classmethod
    def prepare(cls, output, size, language_model, seed, progress):
        """Reads packages and, once, what does not train: the tokens of the pictures and the states of the texts."""
        Path(output).mkdir(parents=True, exist_ok=True)
        data = read(output, size.pictures, progress)
        return cls(size, seed, progress, data, ReadTexts.of(LANGUAGE_MODELS[language_model], data.texts))

    @property
    def language_model(self):
        return self.texts.language_model

    def make_model(self, row):
        """A new model of a row, in training mode."""
        set_seed(self.seed)
        options = {"use_adapters": row.trains == "adapters"}
        sizes = len(self.data.vocabulary), self.data.visual_dim
        model = make_dvp(self.texts, row.layer, *sizes, **options)
        if row.trains == "LoRA":
            give_lora(model)
        if row.sees == "mean":
            give_mean_prompt(model)
        if row.sees in ("nothing", "all tokens"):
            visual_dim = self.data.visual_dim if row.sees == "all tokens" else None
            model = AllTokens(model, self.language_model.reads_first, visual_dim)
        return model

    def inputs(self, questions):
        """What the models take of a `Split`."""
        inputs = self.texts.rows_of(questions.texts) | {"visual_features": questions.tokens[questions.pictures]}
        if not self.language_model.reads_first:
            inputs["question_end"] = self.texts.ends[questions.texts]
        return inputs

    def loss(self, model, questions):
        """Cross-entropy of the answers."""
        return F.cross_entropy(model(**self.inputs(questions)).logits, questions.labels)

    def batches(self, steps, batch):
        """As many `Split`s of train, the same for every model, each question equally often."""
        generator, train, order = torch.Generator().manual_seed(self.seed), self.data.splits["train"], []
        while len(order) < steps * batch:
            order += torch.randperm(len(train), generator=generator).tolist()
        for step in range(steps):
            yield train[torch.tensor(order[step * batch : (step + 1) * batch])]

    def train(self, model, rate, description):
        """Trains to the end; returns the seconds that it took."""
        optimizer, schedule = self.optimizer(model, rate, self.size.steps)
        batches = self.batches(self.size.steps, self.size.batch)
        start = time.perf_counter()
        for questions in tqdm(batches, description, self.size.steps, leave=False, disable=not self.progress):
            self.loss(model, questions).backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
        return time.perf_counter() - start

    def optimizer(self, model, rate, steps):
        """(AdamW, a schedule that rises for a tenth of the steps and then falls to zero)."""
        trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
        groups = groups_by_rate(trained, lambda name: rate if name.startswith("language_model.") else NEW_RATE)
        optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=0.01)
        rise = steps // 10

        def share(step):
            return (step + 1) / rise if step < rise else (steps - step) / (steps - rise)

        return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, share)

    @torch.no_grad()
    def score(self, model, questions):
        """The `Score` of a model on a `Split`."""
        model.eval()
        starts = range(0, len(questions), ANSWERED_AT_ONCE)
        parts = [questions[start : start + ANSWERED_AT_ONCE] for start in starts]
        answers = torch.cat([model(**self.inputs(part)).logits.argmax(1) for part in parts])
        return Score(questions.accuracy_by_type(answers))

    def with_layer(self, row, chosen):
        """The row at the searched layer, where it has none of its own, and with what of the language model trains in
        every row."""
        trains = "adapters" if self.language_model.adapters_only and row.trains == "layers" else row.trains
        return replace(row, layer=chosen if row.layer is None else row.layer, trains=trains)
