"""True and false statements about scenes, for pre-training. None is a question.

A statement alone does not tell whether it is true: a fair coin chooses, where a template has both to choose from.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import permutations

import numpy as np

from petl_ext.demo.digits.scenes import COLOR_NAMES, POSITIONS, RELATIONS, DigitObject, one_of_several, stands, unique

DIGITS = tuple("0123456789")
COUNTS = range(1, 5)
# What a masked word may be: the words by which a statement is true or false.
TOLD_WORDS = frozenset(
    (
        *(*DIGITS, *COLOR_NAMES, *POSITIONS),
        *("above", "below", "left", "right", "top", "bottom", "or"),
    )
)

Objects = Sequence[DigitObject]
Judged = Iterator[tuple[str, bool]]


def _color_or_digit(objects: Objects) -> Judged:
    for it in unique(objects, "digit"):
        for color in COLOR_NAMES:
            yield f"the {it.digit} is {color}", it.color == color
    for it in unique(objects, "color"):
        for digit in DIGITS:
            yield f"the {it.color} digit is {digit}", str(it.digit) == digit


def _at_position(objects: Objects) -> Judged:
    for it in objects:
        for color in COLOR_NAMES:
            yield f"the digit in the {it.position} is {color}", it.color == color
        for digit in DIGITS:
            yield f"the digit in the {it.position} is {digit}", str(it.digit) == digit


def _at_side(objects: Objects) -> Judged:
    for color in COLOR_NAMES:
        for side, it in one_of_several([it for it in objects if it.color == color]):
            for digit in DIGITS:
                yield f"the {color} digit {side} is {digit}", str(it.digit) == digit
    for shown in DIGITS:
        for side, it in one_of_several([it for it in objects if str(it.digit) == shown]):
            for color in COLOR_NAMES:
                yield f"the {shown} {side} is {color}", it.color == color


def _exists(objects: Objects) -> Judged:
    present = {(it.color, it.digit) for it in objects}
    for color in sorted({it.color for it in objects}):
        for digit in sorted({it.digit for it in objects}):
            yield f"there is a {color} {digit}", (color, digit) in present


def _one_exists(objects: Objects) -> Judged:
    for color in COLOR_NAMES:
        yield f"there is a {color} digit", any(it.color == color for it in objects)
    for digit in DIGITS:
        yield f"there is a {digit}", any(str(it.digit) == digit for it in objects)
    for position in POSITIONS:
        yield f"there is a digit in the {position}", any(it.position == position for it in objects)


def _two_exist(objects: Objects) -> Judged:
    present = {it.color for it in objects}
    for first, second in permutations(COLOR_NAMES, 2):
        yield f"there is a {first} digit and a {second} digit", {first, second} <= present
        yield f"there is a {first} digit or a {second} digit", bool({first, second} & present)


def _related(objects: Objects) -> Judged:
    for attribute, name in (("digit", "the {}"), ("color", "the {} digit")):
        for it, other in permutations(unique(objects, attribute), 2):
            first, second = (name.format(getattr(one, attribute)) for one in (it, other))
            for relation in RELATIONS:
                holds = stands(it.position, relation, other.position)
                if holds or stands(other.position, relation, it.position):
                    yield f"{first} is {relation} {second}", holds


def _alike(objects: Objects) -> Judged:
    for it, other in permutations(unique(objects, "digit"), 2):
        yield f"the {it.digit} and the {other.digit} are the same color", it.color == other.color


def _counts(objects: Objects) -> Judged:
    for count in COUNTS[1:]:
        yield f"there are {count} digits", len(objects) == count
    for color in COLOR_NAMES:
        number = sum(it.color == color for it in objects)
        for count in COUNTS:
            yield f"there are {count} {color} digits", number == count


# All statements of a template about a scene, each with whether it is true.
TEMPLATES: dict[str, Callable[[Objects], Judged]] = {
    "color or digit": _color_or_digit,
    "at a position": _at_position,
    "at a side": _at_side,
    "exists": _exists,
    "one exists": _one_exists,
    "two exist": _two_exist,
    "related": _related,
    "alike": _alike,
    "counts": _counts,
}


def statement(objects: Objects, rng: np.random.Generator) -> tuple[str, bool]:
    """One statement about a scene, and whether it is true."""
    wanted = bool(rng.integers(2))
    for index in rng.permutation(len(TEMPLATES)):
        judged = list(list(TEMPLATES.values())[index](objects))
        fitting = [text for text, is_true in judged if is_true == wanted]
        if 0 < len(fitting) < len(judged):
            return fitting[rng.integers(len(fitting))], wanted
    raise ValueError(f"objects must be a scene of two to four digits, got {objects}")
