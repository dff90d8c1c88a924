"""How the DVP demo trains: a transformers.Trainer that is the same for all rows, and the search for the layer."""

import math
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from transformers import set_seed

from petl_ext.demo.digits.write import write_digits
from petl_ext.demo.dvp.data import READERS, DVPData
from petl_ext.demo.dvp.models import (
    MeanPromptLayer,
    PromptedBert,
    freeze_below,
    make_dvp,
    read_language_model,
    share_prompt_layers,
)
from petl_ext.demo.vilt.search import ResumableSearch, for_search, train_with_search
from petl_ext.demo.vilt.training import quiet_trainer
from petl_ext.search import PlacementSearch

LAYERS = 6  # of MiniLM
# The authors' are 1, no steps and, for accuracies over thousands of updates, 0.005. Before, losses hardly differ.
SEARCH_INTERVAL, SEARCH_WARMUP, SEARCH_STEP_SIZE = 4, 0.4, 1.0


@dataclass(frozen=True)
class DVPMethod:
    """A row of the tables.

    Attributes:
        kind: "text only", "all tokens", "mean" or "prompt".
        insert_layer: where the prompt enters and the lowest layer of which something is trained; None stands for the
            search's choice.
    """

    name: str
    kind: str
    insert_layer: int | None = None
    use_adapters: bool = False


@dataclass(frozen=True)
class DVPSize:
    """How much is generated and trained: on VQA, and for half as many steps on GQA and SNLI-VE."""

    steps: int = 320
    search_steps: int = 120
    batch: int = 32
    search_batch: int = 16
    questions_per_scene: int = 3
    scenes: dict = field(default_factory=lambda: {"train": 2500, "val": 300, "test": 500})


DVP_QUICK = DVPSize(steps=8, search_steps=8, batch=16, scenes={"train": 60, "val": 20, "test": 30})


@dataclass(frozen=True)
class Rates:
    """Learning rates: of the language model, of its adapters and norms, of new layers and of the head."""

    language_model: float = 1e-4
    adapters: float = 1e-3
    new: float = 2e-3
    head: float = 2e-3


RATES = Rates()


@dataclass(frozen=True)
class DVPRun:
    """What all trainings of one command have in common."""

    output: Path
    size: DVPSize
    seed: int
    progress: bool
    data: DVPData

    @classmethod
    def prepare(cls, output, size, seed, progress, tasks=tuple(READERS)):
        """Writes the data below `output`, or reads what an earlier run wrote there."""
        output, folder = Path(output), cls.folder_of(output, size, seed)
        if not folder.exists():
            formats = ("vqa", "gqa", "snli_ve")
            write_digits(folder, size.scenes, size.questions_per_scene, seed, progress, formats)
        return cls(output, size, seed, progress, DVPData.read(folder, tasks))

    @staticmethod
    def folder_of(output, size, seed):
        """Where the data lie."""
        return Path(output) / f"digits-dvp-{size.scenes['train']}-seed{seed}"

    def make_model(self, method, task, **options):
        """A new model of a method, on CPU and in training mode."""
        set_seed(self.seed)
        num_labels, width = len(self.data.tasks[task].vocabulary), self.visual_dim
        if method.kind in ("text only", "all tokens"):
            model = PromptedBert(read_language_model(), num_labels, width if method.kind == "all tokens" else None)
            freeze_below(model.language_model, method.insert_layer)
            return model.train()
        options = {"insert_layer": method.insert_layer, "use_adapters": method.use_adapters, **options}
        model = make_dvp(num_labels, width, self.data.texts(task), **options)
        freeze_below(model.language_model, method.insert_layer)
        if method.kind == "mean":
            model.visual_prompts[0] = MeanPromptLayer.like(model.visual_prompts[0])
        return model

    @property
    def visual_dim(self):
        """Dv."""
        task = next(iter(self.data.tasks.values()))
        return task.datasets["train"][0]["visual_features"].size(1)

    def trainer(self, model, task, **arguments):
        """The Trainer of a model of `make_model`."""
        run = self if task == "VQA" else replace(self, size=replace(self.size, steps=self.size.steps // 2))
        task = self.data.tasks[task]
        optimizer = torch.optim.AdamW(_groups(model), betas=(0.9, 0.98), weight_decay=0.01)
        data = {"data_collator": self.data.collator, "train_dataset": task.datasets["train"]}
        return quiet_trainer(run, model, optimizer, **data, compute_metrics=task.compute_metrics, **arguments)


def _groups(model):
    groups = {}
    adapted = any(".adapter." in name for name, _ in model.named_parameters())
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        of_language_model = RATES.adapters if adapted else RATES.language_model
        rates = {"language_model": of_language_model, "classifier": RATES.head}
        groups.setdefault(rates.get(name.partition(".")[0], RATES.new), []).append(parameter)
    return [{"params": parameters, "lr": rate} for rate, parameters in groups.items()]


class PlacementDigitsSearch(ResumableSearch):
    """`petl-ext search placement`: a `PlacementSearch` on digits VQA; there is no goal, {}."""

    name, picture, interval = "placement", "placement.png", SEARCH_INTERVAL

    def result(self):
        """What was found, ready for JSON: `DVPBert(..., insert_layer=result["insert_layer"])`."""
        return {"insert_layer": self.search.selection()}

    @classmethod
    def _new_search(cls, run, goal):
        model = run.make_model(DVPMethod("search", "prompt", 0), "VQA", candidates="all")
        # Layers below the last make the candidates' queries; without the last, the head learns little of the prompt.
        freeze_below(model.language_model, LAYERS - 1)
        share_prompt_layers(model)
        steps = run.size.search_steps
        constants = {"warmup_steps": int(steps * SEARCH_WARMUP), "search_steps": steps, "interval": cls.interval}
        return PlacementSearch(model, run.seed, **goal, **constants, step_size=SEARCH_STEP_SIZE)

    @staticmethod
    def _train(search, run, checkpoint=None, **arguments):
        trainer = for_search(run, batch=run.size.search_batch).trainer(search.model, "VQA", **arguments)
        train_with_search(trainer, search, run.data.tasks["VQA"].datasets["val"], checkpoint, _likelihood)


def _likelihood(model, batch):
    """100 * exp(-loss), the authors' score for ScienceQA: so early, the accuracy on 16 questions is mostly chance."""
    return 100 * math.exp(-model(**batch).loss.item())


def find_insert_layer(run):
    """The `PlacementSearch` that has chosen a layer, on a model of its own."""
    search = PlacementDigitsSearch._new_search(run, {})
    PlacementDigitsSearch._train(search, run)
    return search
