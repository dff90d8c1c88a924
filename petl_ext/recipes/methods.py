"""The methods of recipes: those of `petl_ext.attach`, LoRA by PEFT, and DVP, which is a model of its own."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

import petl_ext
from petl_ext.attaching.methods import CONFIGS
from petl_ext.attaching.patterns import is_part, whole_name
from petl_ext.checks import check_positive_integer, check_probability
from petl_ext.counting import count_macs
from petl_ext.saving import fill, read_files


@dataclass(frozen=True)
class LoRA:
    """Low-rank updates of some linear layers (arXiv 2106.09685), by PEFT.

    Attributes:
        alpha: the update is multiplied by alpha / rank; None: it is not multiplied.
        modules: regular expressions of the ends of the layers' names, from a dot or from the start.
    """

    rank: int = 4
    alpha: float | None = None
    dropout: float = 0.1
    modules: tuple[str, ...] = ("query", "value")

    def __post_init__(self):
        check_positive_integer("rank", self.rank)
        check_probability("dropout", self.dropout)


@dataclass(frozen=True)
class DVP:
    """Dynamic visual prompting (arXiv 2306.00409): the arguments of `DVPBert`, `DVPT5` and `DVPLlama`."""

    insert_layer: int = 0
    use_adapters: bool = False
    adapter_bottleneck: int | None = None
    dropout: float = 0.1
    original: bool = False


METHODS: dict[str, type] = {**CONFIGS, "lora": LoRA, "dvp": DVP}
NAMES = {cls: name for name, cls in METHODS.items()}


@dataclass(frozen=True)
class Prepared:
    """A model with a method in it.

    Attributes:
        model: what is trained.
        save: writes what has trained to a folder.
        load: fills `model` from such a folder.
        added_macs: what the method adds to one forward pass, given the inputs of one sample; None where nothing says
            what there was before.
    """

    model: nn.Module
    save: Callable[[Path], None]
    load: Callable[[Path], Any]
    added_macs: Callable[[Any], int | None]

    def new_parameters(self, keep: tuple[str, ...]) -> int:
        """How many parameters train beside the modules that `keep` names: those that the papers' tables count."""
        trained = [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]
        return sum(p.numel() for name, p in trained if not any(is_part(entry, name) for entry in keep))


def prepare(model: nn.Module, method: Any, keep: tuple[str, ...]) -> Prepared:
    """Puts the method into `model`, which a `DVPModel` has already been made with, and freezes all else but `keep`."""
    if isinstance(method, DVP):
        return _dvp(model)
    if isinstance(method, LoRA):
        return _lora(model, method, keep)
    attachment = petl_ext.attach(model, method, keep=keep)

    def added_macs(inputs):
        return attachment.report(inputs=inputs).macs

    return Prepared(model, attachment.save, lambda folder: petl_ext.load(model, folder), added_macs)


def _dvp(model):
    def load(folder):
        _, tensors = read_files(folder, dict)
        trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        fill(trained, tensors, folder)

    return Prepared(model, model.save, load, lambda _: None)


def _lora(model, method, keep):
    try:
        import peft
    except ModuleNotFoundError as error:
        raise ValueError("method lora needs peft: pip install peft") from error
    config = peft.LoraConfig(
        r=method.rank,
        lora_alpha=method.rank if method.alpha is None else method.alpha,
        lora_dropout=method.dropout,
        target_modules=whole_name("|".join(method.modules)),
        modules_to_save=list(keep),
    )
    wrapped = peft.get_peft_model(model, config)

    def load(folder):
        result = peft.set_peft_model_state_dict(wrapped, peft.load_peft_weights(str(folder)))
        if result.unexpected_keys:
            raise ValueError(f"{folder} must fit the model, got {len(result.unexpected_keys)} tensors that it lacks")

    def added_macs(inputs):
        attached = count_macs(wrapped, inputs).total
        with wrapped.disable_adapter():
            return attached - count_macs(wrapped, inputs).total

    return Prepared(wrapped, wrapped.save_pretrained, load, added_macs)


def as_values(method: Any) -> dict[str, Any]:
    """A method as a recipe has it."""
    return {"name": NAMES[type(method)], **dataclasses.asdict(method)}
