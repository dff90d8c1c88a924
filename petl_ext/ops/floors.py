"""Where plain PyTorch is faster than the kernels of a CPU, as measured."""

from typing import NamedTuple

import torch

from petl_ext.ops.kernels import cpu_path


class Floors(NamedTuple):
    """Rows below which plain PyTorch is faster on one thread of a CPU; None: it is at every number of rows.

    Attributes:
        forward: without gradients.
        trained: with them, whose backward pass counts too.
        dropping: with them and dropout, for which torch's own takes longer than the kernels'.
    """

    forward: int | None
    trained: int | None
    dropping: int | None

    def with_gradients(self, dropout):
        """Of calls that drop out at this probability."""
        return self.dropping if dropout > 0 else self.trained


_F32, _BF16 = torch.float32, torch.bfloat16
# By (op, dtype of the weights, of the products). Measured with 50 and 200 prompts, bottlenecks of 48 to 192, a dropout
# of 0.1 and a width of 768; two dtypes are those of modules under autocast. With bfloat16 products the measurement is
# kept, bench/results/amd-epyc-floors.md (bench/cpu_floors.py): above its floor a module loses 6 % at most; most gain.
# In matrix registers too, but bottlenecks of 48 lose up to 9 %.
# In float16 and on CUDA nothing has been measured, and no number of rows is too small.
FLOORS = {
    ("apt", _F32, _F32): Floors(128, 200, 200),
    ("apt", _BF16, _BF16): Floors(0, 512, 512),
    ("apt", _F32, _BF16): Floors(2048, 4096, 2048),
    ("adapter", _F32, _F32): Floors(128, 4096, 512),
    ("adapter", _BF16, _BF16): Floors(0, 240, 0),
    ("adapter", _F32, _BF16): Floors(0, 0, 0),
    ("attention_pool", _F32, _F32): Floors(0, 0, 0),
    ("attention_pool", _BF16, _BF16): Floors(0, 0, 0),
    ("attention_pool", _F32, _BF16): Floors(0, 0, 0),
}


def floors_of(op, device, weight_dtype, dtype):
    """The entry of `FLOORS`, or None where there is none.

    Args:
        dtype: of the products.
    """
    return FLOORS.get((op, weight_dtype, dtype)) if device == "cpu" else None


def adjust_floors():
    """Called before the floors are first asked for: at import a PETL_CPU_PATH that this processor lacks is no error
    yet, and in a forward torch.compile could not look into it."""
    path = cpu_path()
    if path == "avx512_bf16":
        return
    # In matrix registers those of bfloat16 adapters hold as they are (bench/results/intel-xeon-processor-floors.md).
    # Without bfloat16 products all were 1.3 to 3.4 times as fast, with 200 prompts at 16 rows 1.0 to 1.1. On 64-bit ARM
    # nothing has been measured.
    ops = ("apt",) if path == "amx" else ("apt", "adapter")
    FLOORS.update({(op, weights, _BF16): Floors(0, 0, 0) for op in ops for weights in (_F32, _BF16)})
