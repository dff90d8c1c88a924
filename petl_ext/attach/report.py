"""What `Attachment.report` returns."""

from dataclasses import dataclass

COLUMNS = ("site", "layer", "parameters", "MACs", "kernel", "because")


@dataclass(frozen=True)
class ReportRow:
    """One site, or one entry of `keep`.

    Attributes:
        site: the dotted name of the new layer, or the entry.
        layer: what was put there, or "kept": the model's own parameters, which train.
        parameters: how many train.
        macs: multiply-accumulates added for one sequence; None where the number of tokens is not known.
        kernel: what computes there: "apt (cpu, avx512)", "reference" or "none", as where the layer does not run now.
        reason: why it is not a kernel.
    """

    site: str
    layer: str
    parameters: int
    macs: int | None
    kernel: str
    reason: str


@dataclass(frozen=True)
class Report:
    """Prints as a table.

    Attributes:
        title: the configuration and the model's class.
        rows: a list of `ReportRow`.
        trained, total: parameters of the model, those shared between modules once.
        tokens: rows of a sequence for which MACs are counted, or None.
    """

    title: str
    rows: list
    trained: int
    total: int
    tokens: int | None

    @property
    def macs(self):
        """Multiply-accumulates added for one sequence of `tokens` rows by all sites, or None."""
        return None if self.tokens is None else sum(row.macs for row in self.rows)

    def __str__(self):
        cells = [COLUMNS, *(_cells(row) for row in self.rows)]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        lines = ["  ".join(map(str.ljust, line, widths)).rstrip() for line in cells]
        share = self.trained / self.total if self.total else 0
        summary = f"{self.trained:,} of {self.total:,} parameters train ({share:.2%})"
        if self.tokens is None:
            macs = "MACs: give report(tokens=...)"
        else:
            macs = f"{self.macs:,} MACs added for a sequence of {self.tokens} tokens"
        return "\n".join([self.title, *lines, f"{summary}; {macs}"])


def _cells(row):
    macs = "?" if row.macs is None else f"{row.macs:,}"
    return row.site, row.layer, f"{row.parameters:,}", macs, row.kernel, row.reason
