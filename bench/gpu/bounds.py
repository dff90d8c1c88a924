"""What the committed counts say of a call: its launches, and what it takes at least, to stand beside what it took."""

from counting import record
from counting.analysis import bounds


def counted_launches(op, part, rows, inner, weights):
    """The launches of a forward or a backward call as they were counted, or None.

    Args:
        part: "forward" or "backward".
        weights: "float32"; what was counted only with bfloat16 weights, whose packing alone differs, stands for it.
    """
    counted = {str(case): sizes for case, sizes in record.load()[1].items()}
    names = [f"{op} {part} {inner} {dtype}" for dtype in (weights, "bfloat16")]
    return next((counted[name][rows] for name in names if rows in counted.get(name, {})), None)


def bound_of(op, direction, rows, inner, weights):
    """The largest bound of each launch, added up, in microseconds; None where such a call was not counted.

    Args:
        direction: a key of `gpu.speed.DIRECTIONS`.
    """
    parts = [counted_launches(op, part, rows, inner, weights) for part in direction.split("_")]
    if None in parts:
        return None
    return round(sum(max(bounds(launch).values()) for launches in parts for launch in launches) / 1000, 1)
