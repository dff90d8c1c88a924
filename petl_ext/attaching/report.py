"""What `Attachment.report` returns."""

from dataclasses import dataclass

from petl_ext.printing import table

COLUMNS = ("site", "layer", "parameters", "MACs", "kernel", "because")
LAYER_COLUMNS = ("layer that can be skipped", "MACs", "its bypass", "saved", "of the backbone")


@dataclass(frozen=True)
class ReportRow:
    """One site, or one entry of `keep`.

    Attributes:
        site: the dotted name of the new layer, or the entry.
        layer: what was put there, or "kept": the model's own parameters, which train.
        parameters: how many train.
        macs: multiply-accumulates added; None where it is not known for what.
        kernel: what computes there: "apt (cpu, avx512)", "reference" or "none", as where the layer does not run now;
            with ", frozen" where `Attachment.freeze` has derived weights.
        reason: why it is not a kernel.
    """

    site: str
    layer: str
    parameters: int
    macs: int | None
    kernel: str
    reason: str

    def cells(self):
        macs = "?" if self.macs is None else f"{self.macs:,}"
        return self.site, self.layer, f"{self.parameters:,}", macs, self.kernel, self.reason


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
    def savings(self):
        """What skipping each layer takes off."""
        return tuple(layer - bypass for layer, bypass in self.layers.values())

    def ratio(self, skipped):
        """Of the model with the layers of these indices skipped to the bare backbone."""
        return (self.unskipped - sum(self.savings[layer] for layer in skipped)) / self.backbone

    def cells(self):
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
    """

    title: str
    rows: list
    trained: int
    total: int
    counted_for: str | None = None
    all_macs: int | None = None
    backbone_macs: int | None = None
    layer_costs: LayerCosts | None = None

    @property
    def macs(self):
        """Multiply-accumulates of all new layers that run, or None."""
        return None if self.counted_for is None else sum(row.macs for row in self.rows)

    def __str__(self):
        share = self.trained / self.total if self.total else 0
        summary = f"{self.trained:,} of {self.total:,} parameters train ({share:.2%}); {self._macs_text()}"
        lines = [self.title, *table([COLUMNS, *(row.cells() for row in self.rows)]), summary]
        if self.layer_costs is not None:
            lines += ["", *table([LAYER_COLUMNS, *self.layer_costs.cells()])]
        return "\n".join(lines)

    def _macs_text(self):
        if self.counted_for is None:
            return "MACs: give report(tokens=...) or report(inputs=...)"
        text = f"{self.macs:,} MACs in the new layers for {self.counted_for}"
        if self.all_macs is not None:
            text = f"{text}, {self.all_macs:,} in all"
        if self.backbone_macs is not None:
            text = f"{text}, {self.all_macs / self.backbone_macs:.2%} of the backbone's {self.backbone_macs:,}"
        return text
