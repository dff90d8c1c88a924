"""What `Attachment.report` returns, and how it is made."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from petl_ext.attaching.patterns import is_part
from petl_ext.counting import count_macs, count_parameters
from petl_ext.printing import table

COLUMNS = ("layer", "class", "parameters", "MACs", "kernel", "because")
SKIPPING_COLUMNS = ("layer that can be skipped", "MACs", "its bypass", "saved", "of the backbone")
TOWER_COLUMNS = ("tower", "layers", "parameters", "MACs")
ADDS_NOTHING = "adds nothing to the model"


@dataclass(frozen=True)
class ReportRow:
    """One new layer, or one entry of `keep`.

    Attributes:
        layer: the dotted name of the new layer, or the entry.
        class_name: the layer's class, or "kept": the model's own parameters, which train.
        parameters: how many train.
        macs: multiply-accumulates added; None where nothing says for which inputs.
        kernel: what computes there: "apt (cpu, avx512)", "reference" or "none", as where the layer does not run now;
            with ", frozen" where `Attachment.freeze` has derived weights.
        reason: why it is not a kernel.
        tower: of the model's family, in which the layer stands, or None.
    """

    layer: str
    class_name: str
    parameters: int
    macs: int | None
    kernel: str
    reason: str
    tower: str | None = None

    def cells(self) -> tuple[str, ...]:
        macs = "?" if self.macs is None else f"{self.macs:,}"
        return self.layer, self.class_name, f"{self.parameters:,}", macs, self.kernel, self.reason


@dataclass(frozen=True)
class LayerCosts:
    """Multiply-accumulates of a model whose layers can be skipped, counted for some inputs.

    Attributes:
        backbone: of the bare model.
        unskipped: with what is attached, and no layer skipped.
        layers: {dotted name: [the layer's, its adapters included; its bypass's]}, in the order of the layers; ready
            for JSON.
    """

    backbone: int
    unskipped: int
    layers: dict

    @property
    def savings(self) -> tuple[int, ...]:
        """What skipping each layer takes off."""
        return tuple(layer - bypass for layer, bypass in self.layers.values())

    def ratio(self, skipped: Iterable[int]) -> float:
        """Of the model with the layers of these indices skipped to the bare backbone."""
        return (self.unskipped - sum(self.savings[layer] for layer in skipped)) / self.backbone

    def cells(self) -> Iterator[tuple[str, ...]]:
        for name, (layer, bypass) in self.layers.items():
            saved = layer - bypass
            yield name, f"{layer:,}", f"{bypass:,}", f"{saved:,}", f"{saved / self.backbone:.2%}"


@dataclass(frozen=True)
class Report:
    """Prints as a table.

    Attributes:
        title: the configuration and the model's class.
        rows: a list of `ReportRow`.
        trained, total: parameters of the model, those shared between modules once.
        counted_for: what MACs are counted for, in words, or None.
        all_macs: multiply-accumulates of the model as it is, where inputs were given.
        backbone_macs: of the bare model, likewise; None where layers have been removed for good.
        layer_costs: a `LayerCosts`, where layers can be skipped and inputs were given.
        limits: where the method does not go in models of this family, and why.
    """

    title: str
    rows: list
    trained: int
    total: int
    counted_for: str | None = None
    all_macs: int | None = None
    backbone_macs: int | None = None
    layer_costs: LayerCosts | None = None
    limits: tuple = ()

    @property
    def towers(self) -> dict[str, list[ReportRow]]:
        """{tower: rows of the new layers in it}, in the order of the rows."""
        names = dict.fromkeys(row.tower for row in self.rows if row.tower is not None)
        return {name: [row for row in self.rows if row.tower == name] for name in names}

    @property
    def macs(self) -> int | None:
        """Multiply-accumulates of all new layers that run, or None."""
        return None if self.counted_for is None else sum(row.macs for row in self.rows)

    def __str__(self):
        share = self.trained / self.total if self.total else 0
        summary = f"{self.trained:,} of {self.total:,} parameters train ({share:.2%}); {self._macs_text()}"
        lines = [self.title, *table([COLUMNS, *(row.cells() for row in self.rows)]), summary]
        if len(self.towers) > 1:
            lines += ["", *table([TOWER_COLUMNS, *self._tower_cells()])]
        lines += self.limits
        if self.layer_costs is not None:
            lines += ["", *table([SKIPPING_COLUMNS, *self.layer_costs.cells()])]
        return "\n".join(lines)

    def _tower_cells(self):
        for tower, rows in self.towers.items():
            macs = "?" if self.counted_for is None else f"{sum(row.macs for row in rows):,}"
            yield tower, str(len(rows)), f"{sum(row.parameters for row in rows):,}", macs

    def _macs_text(self):
        if self.counted_for is None:
            return "MACs: give report(tokens=...) or report(inputs=...)"
        text = f"{self.macs:,} MACs in the new layers for {self.counted_for}"
        if self.all_macs is not None:
            text = f"{text}, {self.all_macs:,} in all"
        if self.backbone_macs is not None:
            text = f"{text}, {self.all_macs / self.backbone_macs:.2%} of the backbone's {self.backbone_macs:,}"
        return text


def report_for_tokens(attachment, tokens):
    """With MACs by formulas, for one sequence of `tokens` rows; without MACs where that is None."""

    def macs_of(place, layer):
        idle = attachment.idle_because(place)
        return None if tokens is None else 0 if idle else place.site_class.macs(layer, tokens)

    return _report(attachment, macs_of, None if tokens is None else f"a sequence of {tokens} tokens")


def report_for_inputs(attachment, inputs, backbone):
    """With MACs counted while the model runs; `backbone` is the `MacCount` of the bare one, or None."""
    attached = count_macs(attachment.model, inputs)

    def macs_of(place, _):
        return place.site_class.counted_macs(place, attached, backbone)

    backbone_macs = None if backbone is None else backbone.total
    return _report(attachment, macs_of, "these inputs", all_macs=attached.total, backbone_macs=backbone_macs)


def _report(attachment, macs_of, counted_for, **totals):
    model, config = attachment.model, attachment.config
    trained, total = count_parameters(model)
    rows = [_layer_row(attachment, place, macs_of) for place in attachment.installed.places]
    rows += [_kept_row(attachment, entry) for entry in attachment.keep]
    if config.trains_all:
        rows = [ReportRow("the whole model", "its own", trained, 0, "none", ADDS_NOTHING)]
    totals["limits"] = _limits(attachment.family, config)
    return Report(f"{config} on {type(model).__name__}", rows, trained, total, counted_for, **totals)


def _limits(family, config):
    """What the family's record says of the method and of the towers where `config` leaves the choice to it."""
    towers = [tower for tower in family.towers if config.sites is None or tower in config.sites]
    is_familys = config.sites is None or bool(towers)
    return tuple(
        f"{name}: {family.limits[name]}" for name in (config.row, *towers) if is_familys and name in family.limits
    )


def _layer_row(attachment, place, macs_of):
    layer = attachment.model.get_submodule(place.layer_name)
    idle = attachment.idle_because(place)
    kernel, reason = ("none", idle) if idle else place.site_class.kernel(layer)
    if getattr(layer, "is_frozen", False):
        kernel = f"{kernel}, frozen"
    size = sum(parameter.numel() for parameter in layer.parameters() if parameter.requires_grad)
    tower = attachment.family.tower_of(place.name)
    return ReportRow(place.layer_name, type(layer).__name__, size, macs_of(place, layer), kernel, reason, tower)


def _kept_row(attachment, entry):
    size = sum(parameter.numel() for name, parameter in attachment.named_parameters() if is_part(entry, name))
    return ReportRow(entry, "kept", size, 0, "none", ADDS_NOTHING)
