"""What `Patch.report` returns."""

from collections import Counter
from dataclasses import dataclass

import torch

from petl_ext.ops.kernels import kernel_for
from petl_ext.patching.dispatch import own_forward_below, own_forward_for_now
from petl_ext.printing import table

COLUMNS = ("module", "class", "kind", "computed by", "because")


@dataclass(frozen=True)
class PatchRow:
    """One module that was recognized.

    Attributes:
        name: its dotted name.
        class_name: its class.
        kind: what it was recognized as.
        kernel: "adapter (cpu, avx512)", and what PyTorch computes beside it; "its own forward" where it was left alone,
            or does not run the kernel in the state that it is in.
        reason: why it is its own forward.
        exception: for which calls its own forward runs all the same, since it is faster.
    """

    name: str
    class_name: str
    kind: str
    kernel: str
    reason: str = ""
    exception: str = ""

    @property
    def fused(self) -> bool:
        return not self.reason

    def cells(self) -> tuple[str, ...]:
        return self.name or "(the model)", self.class_name, self.kind, self.kernel, self.reason


@dataclass(frozen=True)
class PatchReport:
    """Prints as a table.

    Attributes:
        title: whose report it is.
        rows: a list of `PatchRow`, of all modules that were recognized.
    """

    title: str
    rows: list

    @property
    def fused(self) -> int:
        """How many modules run a kernel."""
        return sum(row.fused for row in self.rows)

    @property
    def left_alone(self) -> dict[str, int]:
        """{reason: how many modules run their own forward for it}."""
        return dict(Counter(row.reason for row in self.rows if not row.fused))

    def __str__(self):
        lines = [self.title, *table([COLUMNS, *(row.cells() for row in self.rows)])]
        lines.append(f"{self.fused} of {len(self.rows)} fused")
        lines += [f"{count} left alone: {reason}" for reason, count in self.left_alone.items()]
        faster = "the own forward, which is faster,"
        exceptions = dict.fromkeys((row.kernel, row.exception) for row in self.rows if row.exception)
        return "\n".join([*lines, *(f"{kernel} gives way to {faster} {calls}" for kernel, calls in exceptions)])


def patched_row(name, module, kind):
    """Of a module that has become one of a patched class."""
    weight = next(module.parameters(), torch.empty(0))
    device = weight.device.type
    if reason := own_forward_for_now(module, device, weight.dtype):
        return PatchRow(name, type(module).__name__, kind.petl_name, "its own forward", reason)
    kernel, beside = kernel_for(kind.petl_op, device, weight.dtype).name, kind.petl_composed(module)
    exception = own_forward_below(module, device, weight.dtype)
    computed_by = f"{kernel}, {beside} by PyTorch" if beside else kernel
    return PatchRow(name, type(module).__name__, kind.petl_name, computed_by, exception=exception)


def left_alone_row(name, module, recognized):
    return PatchRow(name, type(module).__name__, recognized.kind, "its own forward", recognized.reason)
