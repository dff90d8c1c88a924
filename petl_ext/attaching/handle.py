"""The handle on what `attach` has put into a model, which knows how to take it out again."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from petl_ext.attaching.methods.config import Config
from petl_ext.attaching.report import Report, report_for_inputs, report_for_tokens
from petl_ext.attaching.saved import Saved, check_same, write_folder
from petl_ext.attaching.sites.installed import Installed
from petl_ext.checks import check_positive_integer, check_switch
from petl_ext.composing import HANDLE
from petl_ext.counting import count_macs
from petl_ext.nn.frozen import FreezingLayer
from petl_ext.saving import fill


class Attachment:
    """What `attach` put into a model. Made by `attach` and `load`.

    Attributes:
        model: the model.
        config: the configuration that was attached.
        family: the model's `Family`.
        keep: the entries given to `attach`.
        installed: the new layers and their places, an `Installed`.
    """

    def __init__(self, model: nn.Module, config: Config, selection: Any, layers: Mapping[Any, nn.Module]):
        self.model = model
        self.config = config
        self.family = selection.family
        self.keep = selection.keep
        self._kept = selection.kept
        self._disabled = 0  # how many `disable` contexts are open
        self._required_grad = {
            name: parameter.requires_grad for name, parameter in model.named_parameters(remove_duplicate=False)
        }
        model.requires_grad_(False)
        for name, parameter in model.named_parameters(remove_duplicate=False):
            if name in self._kept:
                parameter.requires_grad_(True)
        self.installed = Installed(model).plus(layers)
        self.installed.enter()
        self._saved_names = tuple(self._tensors())
        setattr(model, HANDLE, self)

    @property
    def sites(self) -> tuple:
        """Dotted names of the modules that carry layers."""
        return self.installed.sites

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """(name in the model, parameter) of all that trains: the new layers' and the kept ones, each once."""
        self._check_attached()
        seen = set()
        for name, parameter in self.model.named_parameters(remove_duplicate=False):
            if parameter.requires_grad and self._owns(name) and id(parameter) not in seen:
                seen.add(id(parameter))
                yield name, parameter

    def parameters(self) -> Iterator[nn.Parameter]:
        """The parameters of `named_parameters`, as an optimizer takes them."""
        return (parameter for _, parameter in self.named_parameters())

    def parameter_groups(self, **learning_rates: float) -> list[dict[str, Any]]:
        """What trains, as an optimizer takes it: a list of {"params", "lr", "name"}, one for each learning rate.

            optimizer = torch.optim.AdamW(attachment.parameter_groups(vision=1e-4, language=5e-5, kept=1e-4))
            Trainer(model, arguments, train_dataset=train, optimizers=(optimizer, None)).train()

        Args:
            learning_rates: by the family's towers that train, and `kept` for what `keep` names outside of the new
                layers.

        Raises:
            ValueError: something that trains would be in no group, or a group would be empty.
        """
        found = {}
        for name, parameter in self.named_parameters():
            found.setdefault(self._group_of(name), []).append(parameter)
        if found.keys() != learning_rates.keys():
            raise ValueError(
                f"parameter_groups: learning rates must be those of {', '.join(found)}, which train, got "
                f"{', '.join(learning_rates) or 'none'}"
            )
        return [{"params": found[name], "lr": rate, "name": name} for name, rate in learning_rates.items()]

    def report(self, tokens: int | None = None, inputs: Any = None) -> Report:
        """A `Report`: every new layer, its parameters, the MACs it adds, which kernel runs there and, if none, why.

        Args:
            tokens: rows N of the sequence that the encoder sees (ViLT: text, image class token and patches), for
                which MACs follow from formulas.
            inputs: in its place, what `petl_ext.counting.count_macs` takes: the model runs, and MACs are counted.
                Models whose sites see sequences of different lengths, such as METER, CLIP, T5 and UNets, need it.

        Raises:
            ValueError: both are given, or tokens is no positive integer.
        """
        self._check_attached()
        if tokens is not None and inputs is not None:
            raise ValueError("report: give tokens or inputs, not both")
        if tokens is not None:
            check_positive_integer("report: tokens", tokens)
        if inputs is not None:
            return report_for_inputs(self, inputs, self._count_backbone(inputs))
        return report_for_tokens(self, tokens)

    def save(self, folder: str | Path) -> None:
        """Writes the new layers and the kept modules, nothing else of the model, and how to attach them.

        The folder is complete or, after an error, as it was. With several processes, call it in one; where
        `fully_shard` has spread the parameters over them, call it in all: they gather the tensors, the first writes.
        The model's own `save_pretrained` would write the layers too, but `from_pretrained` would leave them out: use
        `load`.

        Raises:
            RuntimeError: a layer or a kept module has been replaced or wrapped since `attach`, and its parameters have
                other names.
        """
        self._check_attached()
        tensors = self._tensors()
        gone = [name for name in self._saved_names if name not in tensors]
        if gone:
            raise RuntimeError(
                f"save: {len(gone)} tensors are gone from {type(self.model).__name__}, such as {gone[0]}; "
                "a module there has been replaced or wrapped since attach"
            )
        write_folder(folder, Saved(self.config, self.family.name, self.keep, tensors))

    def freeze(self, dtype: torch.dtype | None = None, overlap: bool = False) -> None:
        """For serving: weights that are derived from parameters, such as APT's keys, are made once.

        `report` shows where. Undone by `thaw`, by training mode, and by all that undoes `APTLayer.freeze`. Layers that
        derive nothing stay as they are: a class token, and adapters on a CPU.

        Args:
            dtype: of the activations that CUDA's packed weights are for; None: as `APTLayer.freeze` says.
            overlap: on CUDA, where a CUDA graph is captured, whether APT on few rows begins beside the attention that
                it joins, or in BERT, ViLT and METER beside the attention's output projection, on a second stream.

        Raises:
            RuntimeError: the model is in training mode.
            ValueError: overlap is neither True nor False, or True where no layer can.
        """
        check_switch("freeze: overlap", overlap)
        layers = self._layers_that_freeze()
        if overlap and not any(layer.can_overlap for layer in layers):
            raise ValueError(f"freeze: overlap must be False without layers of APT, got {overlap}")
        for layer in layers:
            layer.freeze(dtype, **({"overlap": overlap} if layer.can_overlap else {}))

    def thaw(self) -> None:
        """Undoes `freeze`."""
        for layer in self._layers_that_freeze():
            layer.thaw()

    @contextmanager
    def disable(self) -> Iterator["Attachment"]:
        """Inside the `with`, the model computes what it would without the new layers, bit for bit.

        Kept modules keep what they have learned. Parameters, their names and requires_grad stay as they are.
        """
        self._check_attached()
        self.installed.leave()
        self._disabled += 1
        try:
            yield self
        finally:
            self._disabled -= 1
            if self._is_attached() and not self._disabled:
                self.installed.enter()

    def detach(self) -> None:
        """Takes the new layers out for good and gives every parameter the requires_grad that it had before `attach`.

        Kept modules keep what they have learned.
        """
        self._check_attached()
        self.installed.leave()
        self.installed.minus(self.installed.places)
        for name, parameter in self.model.named_parameters(remove_duplicate=False):
            parameter.requires_grad_(self._required_grad.get(name, parameter.requires_grad))
        delattr(self.model, HANDLE)

    def __repr__(self):
        return f"Attachment({self.config} on {type(self.model).__name__}, {len(self.sites)} sites, keep={self.keep})"

    def idle_because(self, place: Any) -> str:
        """Why the layer at that place does not run now, or an empty string."""
        return "disabled" if self._disabled else ""

    def add(self, config: Config, layers: Mapping[Any, nn.Module]) -> None:
        """Puts in the layers that `config` has beyond those that are attached, {place: layer}."""
        self._reinstall(lambda installed: installed.plus(layers))
        self.config = config

    def take_over(self, saved: Saved, folder: str | Path) -> None:
        """Fills what is attached from what a folder of the same configuration holds, a `Saved`.

        Raises:
            ValueError: another configuration is attached, or the tensors do not fit. Nothing has changed.
        """
        check_same(saved, self.config, self.keep, folder)
        self.fill(saved.tensors, folder)

    def fill(self, tensors: Mapping[str, Tensor], folder: str | Path) -> None:
        """Fills new layers and kept modules.

        Raises:
            ValueError: the tensors do not fit. Nothing has changed.
        """
        fill(self._tensors(), tensors, folder)
        self.thaw()

    def _reinstall(self, change):
        """Replaces what is installed by what `change` returns for it; it is called while the sites are left."""
        self.installed.leave()
        self.installed = change(self.installed)
        if not self._disabled:
            self.installed.enter()
        self._saved_names = tuple(self._tensors())

    def _layers_that_freeze(self):
        self._check_attached()
        return [layer for layer in self.installed.layers if isinstance(layer, FreezingLayer)]

    def _is_attached(self):
        return getattr(self.model, HANDLE, None) is self

    def _check_attached(self):
        if not self._is_attached():
            raise RuntimeError(f"{self.config} has been detached from {type(self.model).__name__}")

    def _owns(self, name):
        return name in self._kept or self.installed.holds(name)

    def _group_of(self, name):
        """The tower of a new layer's parameter, "layers" where its family has no towers, or "kept"."""
        return (self.family.tower_of(name) or "layers") if self.installed.holds(name) else "kept"

    def _tensors(self):
        """What is saved, by state-dict name: new layers and kept modules, buffers too."""
        return {name: tensor for name, tensor in self.model.state_dict().items() if self._owns(name)}

    def _count_backbone(self, inputs):
        with self.disable():
            return count_macs(self.model, inputs)
