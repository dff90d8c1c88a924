"""True and false statements about scenes, in the words of all tasks, for pre-training. None is a question.

A statement alone does not tell whether it is true: a fair coin chooses, where a template has both to choose from.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import permutations

import numpy as np

from petl_ext.demo.digits.scenes import COLOR_NAMES, POSITIONS, RELATIONS, DigitObject, one_of_several, stands, unique

DIGITS = tuple("0123456789")
LETTERS = ("a", "b", "c", "d")
COUNTS = range(1, 5)
# What a masked word may be: the words by which a statement is true or false.
TOLD_WORDS = frozenset(
    (
        *(*DIGITS, *COLOR_NAMES, *POSITIONS, *LETTERS[1:]),
        *("above", "below", "left", "right", "top", "bottom", "more", "as", "one", "all", "same", "or"),
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
        yield f"the image holds a {color} digit", any(it.color == color for it in objects)
    for digit in DIGITS:
        yield f"the image holds a {digit}", any(str(it.digit) == digit for it in objects)
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
        yield f"the image holds {count} digits in all", len(objects) == count
    for color in COLOR_NAMES:
        number = sum(it.color == color for it in objects)
        for count in COUNTS:
            yield f"there are {count} {color} digits", number == count
        yield f"only one digit is {color}", number == 1
        yield f"all digits are {color}", number == len(objects)


def _compares(objects: Objects) -> Judged:
    numbers = {color: sum(it.color == color for it in objects) for color in COLOR_NAMES}
    for first, second in permutations(sorted({it.color for it in objects}), 2):
        yield f"the image holds more {first} than {second} digits", numbers[first] > numbers[second]
        yield f"there are as many {first} as {second} digits", numbers[first] == numbers[second]


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
    "compares": _compares,
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


def list_statement(objects: Objects, described: Objects | None, rng: np.random.Generator) -> tuple[str, bool]:
    """One statement by the letter of a list, and whether it is true.

    Args:
        described: another scene, which the text describes and the statement is about; None: it is about `objects`.
    """
    context = "" if described is None else f"context : {describe(described)} . "
    text, right, others = _asked_for(objects if described is None else described, rng)
    choices = [right, *(other for other in rng.permutation(others) if other != right)][: len(LETTERS)]
    order = rng.permutation(len(choices))
    options = " ".join(f"( {letter} ) {choices[index]}" for letter, index in zip(LETTERS, order, strict=True))
    is_true = bool(rng.integers(2))
    wrong = [letter for letter, index in zip(LETTERS, order, strict=True) if index != 0]
    letter = LETTERS[list(order).index(0)] if is_true else wrong[rng.integers(len(wrong))]
    return f"{context}options : {options} . {text} ( {letter} )", is_true


def describe(objects: Objects) -> str:
    """All digits of a scene in words."""
    return " and ".join(f"{it.color} {it.digit} in the {it.position}" for it in objects)


def _asked_for(objects: Objects, rng: np.random.Generator) -> tuple[str, str, list[str]]:
    """The beginning of a statement, how it rightly ends, and how such statements end."""
    it = objects[rng.integers(len(objects))]
    subject = rng.integers(3)
    if subject == 0:
        return f"the color of the digit in the {it.position} is", it.color, list(COLOR_NAMES)
    if subject == 1:
        return f"the digit in the {it.position} is", str(it.digit), list(DIGITS)
    digit = int(rng.integers(len(DIGITS) - 1))
    return f"after {digit} comes", str(digit + 1), list(DIGITS)
