"""Dropout inside the kernels: what is dropped follows from two integers and from where a value stands.

The value at (row, column), rows counted over all leading axes, is dropped where its draw, an integer of 32 bits, is
below p 2^32, and else multiplied by 1 / (1 - p). The draw is word `column % 4` of what Philox4x32-10 makes of the
counter (column // 4, the row's lower 32 bits, its upper ones, the lower 32 bits of seeds[1]) by the key seeds[0].
Source of Philox: "Parallel Random Numbers: As Easy as 1, 2, 3" (SC 2011).
"""

import torch
from torch import Tensor

from petl_ext.checks import check_probability

_WORD = 0xFFFFFFFF
_MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
_KEY_STEPS = 0x9E3779B9, 0xBB67AE85
_ROUNDS = 10


def new_seeds(device):
    """Two integers from torch's generator of the device, [2], on it: a CUDA graph draws anew at each replay."""
    return torch.randint(2**63 - 1, (2,), device=device)


def check_seeds(op, seeds):
    """Raises a RuntimeError where a given `seeds` cannot be such a tensor."""
    if seeds is not None and (seeds.dtype is not torch.int64 or seeds.shape != (2,)):
        raise RuntimeError(f"{op}: seeds must be int64 with shape [2], got {seeds.dtype} with {list(seeds.shape)}")


def dropout_mask(seeds: Tensor, rows: int, columns: int, dropout: float) -> Tensor:
    """Which values the kernels keep, in plain PyTorch.

    Args:
        seeds: int64 [2], as for `adapter` and `apt`.
        rows: R, of all leading axes.
        columns: of the hidden units or of the scores.
        dropout: the probability p.

    Returns:
        bool [rows, columns], on the device of seeds; False where a value is dropped.

    Raises:
        RuntimeError: seeds is not as above.
        ValueError: dropout is no number in [0, 1).
    """
    check_seeds("dropout_mask", seeds)
    check_probability("dropout_mask: dropout", dropout)
    row = torch.arange(rows, device=seeds.device)[:, None]
    quad = torch.arange((columns + 3) // 4, device=seeds.device)
    counter = [quad, row & _WORD, row >> 32, seeds[1] & _WORD]
    key = [seeds[0] & _WORD, (seeds[0] >> 32) & _WORD]
    for _ in range(_ROUNDS):
        first, second = (word * multiplier for word, multiplier in zip(counter[::2], _MULTIPLIERS, strict=True))
        counter = [
            _upper(second) ^ counter[1] ^ key[0],
            second & _WORD,
            _upper(first) ^ counter[3] ^ key[1],
            first & _WORD,
        ]
        key = [(word + step) & _WORD for word, step in zip(key, _KEY_STEPS, strict=True)]
    draws = torch.stack(torch.broadcast_tensors(*counter), -1).flatten(1)[:, :columns]
    return draws >= threshold_of(dropout)


def threshold_of(dropout):
    """Draws below it are dropped."""
    return int(dropout * 2**32)


def _upper(product):
    """The upper 32 bits of a product of 64, which int64 holds with the right bits, but perhaps as a negative number."""
    return (product >> 32) & _WORD


def dropped_out(values, dropout, seeds):
    """Dropout of `values` [..., columns] as the kernels do it, or as torch does where seeds is None."""
    if seeds is None or dropout == 0:
        return torch.dropout(values, dropout, dropout > 0)
    columns = values.size(-1)
    kept = dropout_mask(seeds, values.numel() // columns, columns, dropout)
    return values * (kept * (1 / (1 - dropout))).to(values.dtype).view_as(values)
