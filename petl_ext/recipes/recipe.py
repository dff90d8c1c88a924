"""A recipe: what one experiment is, read from YAML.

    like: vilt-vqa-apt          # optional: another recipe, whose sections stand where this one has none
    label: adapter              # the row of a table
    task: vqa
    model: {family: vilt, name: dandelin/vilt-b32-mlm, image_size: 384}
    method: {name: adapter, bottleneck: 96}
    keep: [classifier, pooler, token_type_embeddings]
    data: {train: [...], validation: [...], test: [...], max_length: 40}
    training: {epochs: 10, batch_size: 256, micro_batch: 64, learning_rate: 5e-4}
    search: {...}               # where layers are searched
    published: {table: ..., row: ...}

"{data}" in the names of a model stands for the folder that --data names.
"""

import dataclasses
import difflib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from petl_ext.attaching.patterns import check_patterns
from petl_ext.checks import check_choice, check_positive_integer, check_positive_number, check_probability
from petl_ext.recipes.methods import DVP, METHODS, as_values
from petl_ext.recipes.models import FAMILIES
from petl_ext.recipes.reading import Document, check_keys, filled, read_document
from petl_ext.recipes.tasks import TASKS
from petl_ext.search.depth import DepthConstants
from petl_ext.search.placement import PlacementConstants

SHIPPED = Path(__file__).parent / "shipped"
MOST_LIKE = 5  # recipes that follow each other by `like`


@dataclass(frozen=True)
class Model:
    """What is trained.

    Attributes:
        name: of a pre-trained model, on the hub or a folder.
        checkpoint: a file of the authors' code base; the model gets its weights and, where `name` is null, the
            published sizes.
        tokenizer, image_processor: of another name than `name`.
        image_size: of the shorter side (ViLT) or of both (METER); null: as the image processor says.
        vision_model: the encoder of a DVP.
    """

    family: str
    name: str | None = None
    checkpoint: str | None = None
    tokenizer: str | None = None
    image_processor: str | None = None
    image_size: int | None = None
    vision_model: str | None = None

    def __post_init__(self):
        check_choice("family", self.family, FAMILIES)
        if self.name is None and self.checkpoint is None:
            raise ValueError("name or checkpoint must be given, got neither")

    def below(self, data: str | Path) -> "Model":
        """With "{data}" replaced."""
        named = {key: value.replace("{data}", str(data)) for key, value in vars(self).items() if isinstance(value, str)}
        return dataclasses.replace(self, **named)


@dataclass(frozen=True)
class Answers:
    """Where the vocabulary comes from: answers that come at least `min_count` times in these files together."""

    files: tuple[str, ...]
    min_count: int = 1


@dataclass(frozen=True)
class Data:
    """The official files of each split, below the folder that --data names.

    Attributes:
        train, validation, test: parts, of which each is given to the task's data set; its keys are that one's
            arguments.
        held_out: so many images of the last part of `train`, drawn with `seed`, are validation and not trained on, as
            the papers hold out 1000 of VQA's validation split.
        max_length: longest text in tokens; text_length: pads every text to so many, see `ImageTextCollator`.
        cache_images: keep preprocessed images in memory.
        workers: processes that read.
    """

    train: tuple[dict[str, Any], ...]
    validation: tuple[dict[str, Any], ...] = ()
    test: tuple[dict[str, Any], ...] = ()
    answers: Answers | None = None
    held_out: int = 0
    seed: int = 0
    max_length: int = 40
    text_length: int | None = None
    cache_images: bool = False
    workers: int = 0

    def __post_init__(self):
        if not self.train:
            raise ValueError("train must have at least one part, got none")
        if self.held_out and self.validation:
            raise ValueError("validation must be empty where images are held out, got both")


@dataclass(frozen=True)
class Training:
    """How the model is trained, by AdamW.

    Attributes:
        epochs, steps: one of the two; steps are those of the optimizer.
        batch_size: samples of an optimizer step, over all processes; micro_batch: of one process at a time.
        rates: {regular expression: the learning rate of what has it in its name}, the first that fits; `learning_rate`
            is that of the rest.
        no_decay: regular expressions likewise, of what has no weight decay.
        schedule: "linear" or "cosine" to zero, or "constant", after a warm-up over this share of all steps.
        precision: "fp32", "fp16" or "bf16".
        evaluate_every, checkpoint_every, log_every: steps; null: never, never, 10.
        patience: evaluations without a better one after which training stops; null: none.
        report_to: "tensorboard" and others, as transformers' Trainer takes them.
    """

    batch_size: int
    micro_batch: int
    learning_rate: float
    epochs: float | None = None
    steps: int | None = None
    rates: dict[str, float] = field(default_factory=dict)
    weight_decay: float = 0.01
    no_decay: tuple[str, ...] = ("bias$", "[Nn]orm")
    betas: tuple[float, ...] = (0.9, 0.98)
    epsilon: float = 1e-8
    schedule: str = "linear"
    warmup: float = 0.1
    precision: str = "fp32"
    gradient_checkpointing: bool = False
    max_grad_norm: float = 0.0
    evaluate_every: int | None = None
    checkpoint_every: int | None = None
    log_every: int = 10
    patience: int | None = None
    report_to: tuple[str, ...] = ()
    seed: int = 0

    def __post_init__(self):
        if (self.epochs is None) == (self.steps is None):
            raise ValueError(f"epochs or steps must be given, got {self.epochs} and {self.steps}")
        check_positive_number("epochs or steps", self.epochs or self.steps or 0)
        for name in ("batch_size", "micro_batch", "log_every"):
            check_positive_integer(name, getattr(self, name))
        for name in ("evaluate_every", "checkpoint_every", "patience"):
            if getattr(self, name) is not None:
                check_positive_integer(name, getattr(self, name))
        check_probability("warmup", self.warmup)
        check_patterns("rates and no_decay", (*self.rates, *self.no_decay))
        check_choice("schedule", self.schedule, ("linear", "cosine", "constant"))
        check_choice("precision", self.precision, ("fp32", "fp16", "bf16"))
        if self.patience is not None and self.evaluate_every is None:
            raise ValueError("evaluate_every must be given with patience, got null")
        # Else the first loss that a resumed run logs would be of fewer steps than without the interruption.
        self._check_multiple("checkpoint_every", "log_every")
        # So that there is a checkpoint of the best evaluation.
        self._check_multiple("checkpoint_every", "evaluate_every")

    def _check_multiple(self, longer, shorter):
        every, of = getattr(self, longer), getattr(self, shorter)
        if every is not None and of is not None and every % of:
            raise ValueError(f"{longer} must be a multiple of {shorter}={of}, got {every}")


@dataclass(frozen=True)
class Search:
    """How layers are searched: `DepthSearch` where the method is das, `PlacementSearch` where it is dvp.

    Attributes:
        training: keys of the training section that the search has otherwise.
        warmup_epochs: before the first update; null: as the paper's.
        num_skip, max_macs: what a depth search looks for: a number of layers, or a share of the backbone's MACs.
        constants: of the search: interval, step_size and others.
    """

    training: dict[str, Any] = field(default_factory=dict)
    warmup_epochs: float | None = None
    num_skip: int | None = None
    max_macs: float | None = None
    constants: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Published:
    """The row of a published table (published.yaml) that is this experiment's."""

    table: str
    row: str


@dataclass(frozen=True)
class Recipe:
    """One experiment. `label` is its row in a table; `method` is a configuration of `petl_ext.attach`, or of
    `petl_ext.recipes.methods`."""

    label: str
    task: str
    model: Model
    method: Any
    data: Data
    training: Training
    keep: tuple[str, ...] = ()
    search: Search | None = None
    published: Published | None = None

    def __post_init__(self):
        check_choice("task", self.task, TASKS)
        family = FAMILIES[self.model.family]
        if self.task not in family.tasks:
            raise ValueError(f"task must be one of {sorted(family.tasks)} for a {self.model.family}, got {self.task}")
        if isinstance(self.method, DVP) != family.is_dvp:
            raise ValueError(
                f"method must be {'dvp' if family.is_dvp else 'another than dvp'} for a {self.model.family}, got "
                f"{as_values(self.method)['name']}"
            )

    def as_values(self) -> dict[str, Any]:
        """Plain values, as in the file of a complete recipe."""
        values = dataclasses.asdict(self) | {"method": as_values(self.method)}
        return _plain({key: value for key, value in values.items() if value is not None})

    def as_yaml(self) -> str:
        """The complete recipe."""
        return yaml.safe_dump(self.as_values(), sort_keys=False, width=120, allow_unicode=True)

    def for_search(self) -> "Recipe":
        """With the training of its search, and a label of its own. Raises ValueError if it has none."""
        if self.search is None:
            raise ValueError(f"{self.label}: a recipe must have the section 'search' for a search, got none")
        changes = dict(self.search.training)
        if {"epochs", "steps"} & changes.keys():
            changes = {"epochs": None, "steps": None} | changes
        training = dataclasses.replace(self.training, **changes)
        return dataclasses.replace(self, label=f"{self.label}: search", training=training)


def _plain(value):
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    return [_plain(inner) for inner in value] if isinstance(value, list | tuple) else value


def shipped() -> list[str]:
    """The names of the recipes that come with petl_ext."""
    return sorted(path.stem for path in SHIPPED.glob("*.yaml"))


def recipe_file(name: str | Path) -> Path:
    """The file of a recipe, which is a path or the name of a shipped one.

    Raises FileNotFoundError, with the nearest name, if there is none.
    """
    path = Path(name)
    if path.is_file():
        return path
    if (SHIPPED / f"{name}.yaml").is_file():
        return SHIPPED / f"{name}.yaml"
    near = difflib.get_close_matches(str(name), shipped(), 3, 0.4)
    meant = f", such as {', '.join(near)}" if near else ""
    raise FileNotFoundError(f"recipe must be a file, or one of those that `petl-ext recipes` lists{meant}, got {name}")


def read_recipe(name: str | Path, settings: Sequence[str] = ()) -> Recipe:
    """The recipe of a file or of a shipped name, changed by settings "key.of.keys=value".

    Raises ValueError, with file, line and key, for what is unknown, mistyped or missing; FileNotFoundError if there is
    no such recipe.
    """
    document = _with_base(recipe_file(name), MOST_LIKE)
    for setting in settings:
        document.set(setting)
    return parsed(document)


def _with_base(path, most):
    document = read_document(path)
    base = document.values.pop("like", None)
    if base is None:
        return document
    if not isinstance(base, str) or not most:
        raise ValueError(f"{document.where(('like',))} must be another recipe, at most {MOST_LIKE} deep, got {base!r}")
    beside = path.parent / base
    return document.over(_with_base(beside if beside.is_file() else recipe_file(base), most - 1))


def parsed(document: Document) -> Recipe:
    """The recipe that a document is. Raises what `read_recipe` raises."""
    values = dict(document.values)
    method = values.get("method")
    if method is not None:
        values["method"] = _method(document, method)
    recipe = filled(document, Recipe, values)
    _check_parts(document, recipe)
    _check_search(document, recipe)
    return recipe


def _method(document, method):
    name = method.get("name") if isinstance(method, dict) else method
    if name not in METHODS:
        raise ValueError(f"{document.where(('method', 'name'))} must be one of {sorted(METHODS)}, got {name!r}")
    given = {key: value for key, value in method.items() if key != "name"}
    return filled(document, METHODS[name], given, ("method",))


def _check_parts(document, recipe):
    task = TASKS[recipe.task]
    for split in ("train", "validation", "test"):
        for index, part in enumerate(getattr(recipe.data, split)):
            check_keys(document, ("data", split, index), part, (*task.files, *task.options))
    if (recipe.data.answers is None) != (task.vocabulary is None):
        expected = "null" if task.vocabulary is None else "a section with files"
        raise ValueError(f"{document.where(('data', 'answers'))} must be {expected} for {recipe.task}")


def _check_search(document, recipe):
    if recipe.search is None:
        return
    constants = PlacementConstants if isinstance(recipe.method, DVP) else DepthConstants
    known = [one.name for one in dataclasses.fields(constants)]
    check_keys(document, ("search", "constants"), recipe.search.constants, known)
    changes = recipe.search.training
    length = {"epochs": None, "steps": None} if {"epochs", "steps"} & changes.keys() else {}
    filled(document, Training, document.values["training"] | length | changes, ("search", "training"))
