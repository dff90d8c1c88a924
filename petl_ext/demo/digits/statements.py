"""True statements about scenes, for pre-training. None is a question."""

from collections.abc import Callable, Iterator, Sequence
from itertools import permutations

import numpy as np

from petl_ext.demo.digits.scenes import COLOR_NAMES, POSITIONS, RELATIONS, DigitObject, one_of_several, stands, unique

# What a masked word may be: the words by which a statement is true.
TOLD_WORDS = frozenset(
    (
        *(*"0123456789", *COLOR_NAMES, *POSITIONS),
        *("above", "below", "left", "right", "top", "bottom", "same"),
    )
)

Objects = Sequence[DigitObject]


def _color_or_digit(objects: Objects) -> Iterator[str]:
    for it in unique(objects, "digit"):
        yield f"the {it.digit} is {it.color}"
    for it in unique(objects, "color"):
        yield f"the {it.color} digit is {it.digit}"


def _at_position(objects: Objects) -> Iterator[str]:
    for it in objects:
        yield f"the digit in the {it.position} is {it.color}"
        yield f"the digit in the {it.position} is {it.digit}"


def _at_side(objects: Objects) -> Iterator[str]:
    for color in COLOR_NAMES:
        for side, it in one_of_several([it for it in objects if it.color == color]):
            yield f"the {color} digit {side} is {it.digit}"
    for digit in range(10):
        for side, it in one_of_several([it for it in objects if it.digit == digit]):
            yield f"the {digit} {side} is {it.color}"


def _exists(objects: Objects) -> Iterator[str]:
    for it in objects:
        yield f"there is a {it.color} {it.digit}"
        yield f"there is a {it.color} digit in the {it.position}"


def _two_exist(objects: Objects) -> Iterator[str]:
    for color, other in permutations(sorted({it.color for it in objects}), 2):
        yield f"there is a {color} digit and a {other} digit"


def _related(objects: Objects) -> Iterator[str]:
    for attribute, name in (("digit", "the {}"), ("color", "the {} digit")):
        for it, other in permutations(unique(objects, attribute), 2):
            first, second = (name.format(getattr(one, attribute)) for one in (it, other))
            for relation in RELATIONS:
                if stands(it.position, relation, other.position):
                    yield f"{first} is {relation} {second}"


def _alike(objects: Objects) -> Iterator[str]:
    for it, other in permutations(unique(objects, "digit"), 2):
        if it.color == other.color:
            yield f"the {it.digit} and the {other.digit} are the same color"


def _counts(objects: Objects) -> Iterator[str]:
    yield f"there are {len(objects)} digits"
    for color in sorted({it.color for it in objects}):
        yield f"there are {sum(it.color == color for it in objects)} {color} digits"


# All true statements of a template about a scene.
TEMPLATES: dict[str, Callable[[Objects], Iterator[str]]] = {
    "color or digit": _color_or_digit,
    "at a position": _at_position,
    "at a side": _at_side,
    "exists": _exists,
    "two exist": _two_exist,
    "related": _related,
    "alike": _alike,
    "counts": _counts,
}


def statement(objects: Objects, rng: np.random.Generator) -> str:
    """One true statement about a scene, of a random template."""
    for index in rng.permutation(len(TEMPLATES)):
        found = list(list(TEMPLATES.values())[index](objects))
        if found:
            return found[rng.integers(len(found))]
    raise ValueError(f"objects must be a scene of one digit or more, got {objects}")
