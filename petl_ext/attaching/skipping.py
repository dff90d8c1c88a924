"""The handle of a `DASConfig`: which layers are skipped, now and for good."""

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from petl_ext.attaching.handle import Attachment
from petl_ext.attaching.methods.config import Config
from petl_ext.attaching.methods.das import SkippableLayer, strip
from petl_ext.attaching.report import LayerCosts, Report
from petl_ext.attaching.saved import Saved, check_same
from petl_ext.attaching.stacks import Stacks
from petl_ext.counting import count_macs


class SkippingAttachment(Attachment):
    """What `attach` put into a model for a `DASConfig`.

    A skipped layer's own adapters get no gradients, and neither do the bypasses of the layers that run:
    DistributedDataParallel needs `find_unused_parameters=True`, and where the set changes from step to step not
    `static_graph`. torch.compile compiles anew for every set.

    Attributes:
        layers: dotted names of the layers that can be skipped; their indices are those of `skip`.
    """

    def __init__(self, model: nn.Module, config: Config, selection: Any, layers: Mapping[Any, nn.Module]):
        bypasses = [place for place in layers if issubclass(place.site_class, SkippableLayer)]
        self.layers = tuple(place.name for place in bypasses)
        self._stacks = Stacks(model, {place.name: place.site_class for place in bypasses})
        self._chosen = ()
        self._removed = False
        super().__init__(model, config, selection, layers)
        self.skip(config.skip)
        if config.permanent:
            self.remove_skipped()

    @property
    def config(self) -> Config:
        """The `DASConfig`, with the layers that are skipped now."""
        return dataclasses.replace(self._config, skip=self._chosen, permanent=self._removed)

    @config.setter
    def config(self, config: Config) -> None:
        # Made when it is asked for: its checks take longer than switching the layers, which every step may do.
        self._config = config

    @property
    def skipped(self) -> tuple[int, ...]:
        """Indices of the layers that are skipped, inside `disable` those that will be again, ascending."""
        return self._chosen

    def skip(self, layers: Iterable[int | str], decodes: bool = True) -> None:
        """Skips these layers from the next forward on, and no others.

        Args:
            layers: indices into `layers`, or names from it, in any order.
            decodes: whether the model may decode with a cache until the next call.

        Raises:
            ValueError: not a layer that can be skipped; or the model's cache has several types of slots, the layers of
                one type would all be skipped, and with decodes a cache would then count no tokens.
            RuntimeError: the model is disabled, or skipped layers have been removed.
        """
        self._check_attached()
        self._check_switchable("skip")
        chosen = self._indices_of(layers)
        if decodes:
            self._stacks.check_decodes(self._names_of(chosen))
        self._switch(chosen)
        self._chosen = chosen

    def remove_skipped(self) -> None:
        """Deletes the weights of the skipped layers and the bypasses of all others, for good.

        State dict, memory and saved folders shrink; `load` does the same to a fresh model. Call it before an optimizer
        is made. After it the set is fixed, and `disable` and `detach` raise: the backbone is gone.

        Raises:
            RuntimeError: the model is disabled, or this has been done.
            ValueError: no layer is skipped.
        """
        self._check_attached()
        self._check_switchable("remove_skipped")
        skipped = self._names_of(self.skipped)
        if not skipped:
            raise ValueError(f"remove_skipped: none of the {len(self.layers)} layers is skipped; call skip first")
        gone = {place for place in self.installed.places if not _remains(place, skipped)}
        self._reinstall(lambda installed: installed.minus(gone))
        for name in skipped:
            strip(self._layer(name))
        self._saved_names = tuple(self._tensors())
        self._stacks = None  # it holds parts of the layers
        self._removed = True

    def layer_costs(self, inputs: Any) -> LayerCosts:
        """Multiply-accumulates of every layer, of its bypass and of the bare backbone.

        Args:
            inputs: what `petl_ext.counting.count_macs` takes.

        Returns:
            A `LayerCosts`.

        Raises:
            RuntimeError: the model is disabled, or skipped layers have been removed.
            ValueError: the layers' savings do not add up, as where a layer contains another one.
        """
        self._check_attached()
        self._check_switchable("layer_costs")
        return self._count_layers(inputs, self._count_backbone(inputs).total)

    def report(self, tokens: int | None = None, inputs: Any = None) -> Report:
        report = super().report(tokens, inputs)
        if inputs is None or self._removed or self._disabled:
            return report
        return dataclasses.replace(report, layer_costs=self._count_layers(inputs, report.backbone_macs))

    @contextmanager
    def disable(self) -> Iterator["SkippingAttachment"]:
        self._check_attached()
        self._check_whole("disable")
        if not self._disabled:
            self._switch(())
        try:
            with super().disable():
                yield self
        finally:
            if self._is_attached() and not self._disabled:
                self._switch(self._chosen)

    def detach(self) -> None:
        self._check_attached()
        self._check_whole("detach")
        self._switch(())
        for name in self.layers:
            vars(self._layer(name)).pop("skipped", None)
        super().detach()

    def _count_backbone(self, inputs):
        return None if self._removed else super()._count_backbone(inputs)

    def _count_layers(self, inputs, backbone_macs):
        try:
            self._switch(())
            whole = count_macs(self.model, inputs)
            self._switch(range(len(self.layers)))
            bypassed = count_macs(self.model, inputs)
        finally:
            self._switch(self._chosen)
        macs = {name: [whole.of(name), bypassed.of(name)] for name in self.layers}
        costs = LayerCosts(backbone_macs, whole.total, macs)
        if whole.total - sum(costs.savings) != bypassed.total:
            raise ValueError("layer_costs: what the layers save does not add up; does a layer contain another one?")
        return costs

    def idle_because(self, place: Any) -> str:
        if self._disabled:
            return super().idle_because(place)
        inside = _is_inside(place, self._names_of(self.skipped))
        if issubclass(place.site_class, SkippableLayer):
            return "" if inside else "its layer is not skipped"
        return "its layer is skipped" if inside else ""

    def take_over(self, saved: Saved, folder: str | Path) -> None:
        ours, theirs = self.config, saved.config
        check_same(saved._replace(config=_with_skips_of(ours, theirs)), ours, self.keep, folder)
        if ours.permanent:
            self.fill(saved.tensors, folder)
            return
        self._check_switchable("load")
        chosen = self._indices_of(theirs.skip)
        self.fill(saved.tensors, folder)
        self.skip(chosen)

    def _layer(self, name):
        return self.model.get_submodule(name)

    def _indices_of(self, layers):
        if isinstance(layers, str) or not isinstance(layers, Iterable):
            raise ValueError(f"skip: layers must be a list of indices or names of layers, got {layers!r}")
        return tuple(sorted({self._index_of(layer) for layer in layers}))

    def _index_of(self, layer):
        if type(layer) is int and 0 <= layer < len(self.layers):
            return layer
        if layer in self.layers:
            return self.layers.index(layer)
        raise ValueError(f"skip: layers must be indices below {len(self.layers)} or names of layers, got {layer!r}")

    def _names_of(self, indices):
        return {self.layers[index] for index in indices}

    def _switch(self, skipped):
        """Makes these layers, and no others, the ones that are skipped at this moment."""
        self._stacks.switch(self._names_of(skipped))

    def _check_switchable(self, method):
        self._check_whole(method)
        if self._disabled:
            raise RuntimeError(f"{method}: the attachment is disabled")

    def _check_whole(self, method):
        if self._removed:
            raise RuntimeError(f"{method}: the layers {list(self.skipped)} have been removed for good")


def _is_inside(place, layers):
    """Whether the place is one of the layers of these names, or inside one."""
    return any(f"{place.name}.".startswith(f"{name}.") for name in layers)


def _remains(place, skipped):
    """Whether the layer at that place is still there once the layers of these names are removed."""
    return _is_inside(place, skipped) == issubclass(place.site_class, SkippableLayer)


def _with_skips_of(ours, theirs):
    """`theirs` with the skips of `ours`, which may differ between two configurations of which neither is permanent."""
    if type(ours) is not type(theirs) or ours.permanent or theirs.permanent:
        return theirs
    return dataclasses.replace(theirs, skip=ours.skip)
