"""Questions in GQA's file format about scenes of handwritten digits; `write.write_digits` writes them.

A dark cell is empty: "is there a digit in the northwest?" is "no" there. A question alone tells nothing about its
answer: a yes-no question is asked only where its type has true and false ones to choose from, and a fair coin chooses;
a choice names the right answer first or second equally often; colors, digits and positions are drawn alike.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import permutations
from pathlib import Path

import numpy as np

from petl_ext.demo.digits.scenes import (
    COLOR_NAMES,
    POSITIONS,
    QUESTIONS_PER_IMAGE_ID,
    RELATIONS,
    DigitObject,
    SceneSplit,
    images_folder,
    one_of_several,
    stands,
    unique,
)

YES_NO = ("yes", "no")
DIGITS = tuple("0123456789")
# Every word of the questions: what a tokenizer made for them has to know.
WORDS = (
    *("?", "a", "above", "and", "are", "at", "below", "bottom", "color", "digit", "in", "is", "left", "of", "on", "or"),
    *("right", "same", "the", "there", "to", "top", "what", "which", *DIGITS, *COLOR_NAMES, *POSITIONS),
)
# Every answer: left, right, above and below are the choices between relations.
ANSWERS = (*YES_NO, *COLOR_NAMES, *DIGITS, "left", "right", "above", "below")

Objects = Sequence[DigitObject]
Asked = Iterator[tuple[str, str]]


def _color_of(objects: Objects) -> Asked:
    for it in unique(objects, "digit"):
        yield f"what color is the {it.digit}?", it.color


def _color_at(objects: Objects) -> Asked:
    for it in objects:
        yield f"what color is the digit in the {it.position}?", it.color


def _digit_of(objects: Objects) -> Asked:
    for it in unique(objects, "color"):
        yield f"which digit is {it.color}?", str(it.digit)


def _one_digit_of_several(objects: Objects) -> Asked:
    for color in COLOR_NAMES:
        for side, it in one_of_several([it for it in objects if it.color == color]):
            yield f"which {color} digit is {side}?", str(it.digit)


def _one_color_of_several(objects: Objects) -> Asked:
    for digit in range(10):
        for side, it in one_of_several([it for it in objects if it.digit == digit]):
            yield f"what color is the {digit} {side}?", it.color


def _color_by_relation(objects: Objects) -> Asked:
    for relation, other, it in _related(objects, "digit"):
        yield f"what color is the digit {relation} the {other.digit}?", it.color


def _digit_by_relation(objects: Objects) -> Asked:
    for relation, other, it in _related(objects, "color"):
        yield f"which digit is {relation} the {other.color} digit?", str(it.digit)


def _is_color(objects: Objects) -> Asked:
    for it in unique(objects, "digit"):
        for color in COLOR_NAMES:
            yield f"is the {it.digit} {color}?", _yes(it.color == color)


def _exists(objects: Objects) -> Asked:
    """Colors and digits that are there, if not always together: else a color or a digit alone would give it away."""
    present = {(it.color, it.digit) for it in objects}
    for color in sorted({it.color for it in objects}):
        for digit in sorted({it.digit for it in objects}):
            yield f"is there a {color} {digit}?", _yes((color, digit) in present)


def _exists_at(objects: Objects) -> Asked:
    filled = {it.position for it in objects}
    for position in POSITIONS:
        yield f"is there a digit in the {position}?", _yes(position in filled)


def _is_related(objects: Objects) -> Asked:
    for it, other in permutations(unique(objects, "digit"), 2):
        for relation in RELATIONS:
            holds = stands(it.position, relation, other.position)
            if holds or stands(other.position, relation, it.position):
                yield f"is the {it.digit} {relation} the {other.digit}?", _yes(holds)


def _which_color(objects: Objects) -> Asked:
    for it in unique(objects, "digit"):
        for first, second in permutations(COLOR_NAMES, 2):
            if it.color in (first, second):
                yield f"is the {it.digit} {first} or {second}?", it.color


def _which_relation(objects: Objects) -> Asked:
    choices = {
        "to the left or right of": {"left": "left of", "right": "right of"},
        "above or below": {"above": "above", "below": "below"},
    }
    for it, other in permutations(unique(objects, "digit"), 2):
        for words, answers in choices.items():
            for answer, relation in answers.items():
                if stands(it.position, relation, other.position):
                    yield f"is the {it.digit} {words} the {other.digit}?", answer


def _both_exist(objects: Objects) -> Asked:
    present = {it.color for it in objects}
    for first, second in permutations(COLOR_NAMES, 2):
        yield f"is there a {first} digit and a {second} digit?", _yes({first, second} <= present)


def _either_exists(objects: Objects) -> Asked:
    present = {it.color for it in objects}
    for first, second in permutations(COLOR_NAMES, 2):
        yield f"is there a {first} digit or a {second} digit?", _yes(bool({first, second} & present))


def _same_color(objects: Objects) -> Asked:
    for it, other in permutations(unique(objects, "digit"), 2):
        yield f"are the {it.digit} and the {other.digit} the same color?", _yes(it.color == other.color)


def _yes(holds: bool) -> str:
    return YES_NO[not holds]


def _related(objects: Objects, attribute: str) -> Iterator[tuple[str, DigitObject, DigitObject]]:
    """(relation, object known by its `attribute`, the only object that stands in the relation to it)."""
    for other in unique(objects, attribute):
        for relation in RELATIONS:
            there = [it for it in objects if stands(it.position, relation, other.position)]
            if len(there) == 1:
                yield relation, other, there[0]


@dataclass(frozen=True)
class QuestionType:
    """All questions of a type about a scene, with their answers, and GQA's `types` of them."""

    ask: Callable[[Objects], Asked]
    structural: str
    semantic: str


# By GQA's `detailed` type. "One of several" picks one of several objects of the same color, or digit, by its side.
QUESTION_TYPES = {
    "colorQuery": QuestionType(_color_of, "query", "attr"),
    "colorAtQuery": QuestionType(_color_at, "query", "attr"),
    "digitQuery": QuestionType(_digit_of, "query", "obj"),
    "oneOfSeveralDigitQuery": QuestionType(_one_digit_of_several, "query", "obj"),
    "oneOfSeveralColorQuery": QuestionType(_one_color_of_several, "query", "attr"),
    "relColorQuery": QuestionType(_color_by_relation, "query", "rel"),
    "relDigitQuery": QuestionType(_digit_by_relation, "query", "rel"),
    "colorVerify": QuestionType(_is_color, "verify", "attr"),
    "existVerify": QuestionType(_exists, "verify", "obj"),
    "existAtVerify": QuestionType(_exists_at, "verify", "obj"),
    "relVerify": QuestionType(_is_related, "verify", "rel"),
    "colorChoose": QuestionType(_which_color, "choose", "attr"),
    "relChoose": QuestionType(_which_relation, "choose", "rel"),
    "existAnd": QuestionType(_both_exist, "logical", "obj"),
    "existOr": QuestionType(_either_exists, "logical", "obj"),
    "sameColor": QuestionType(_same_color, "compare", "attr"),
}


def questions_about(objects: Objects, count: int, rng: np.random.Generator) -> list[tuple[str, str, str]]:
    """`count` questions of different types about one scene: (detailed type, question, answer)."""
    names, asked = list(QUESTION_TYPES), []
    for index in rng.permutation(len(names)):
        candidates = _balanced(list(QUESTION_TYPES[names[index]].ask(objects)), rng)
        if candidates and len(asked) < count:
            asked.append((names[index], *candidates[rng.integers(len(candidates))]))
    return asked


def _balanced(candidates: list[tuple[str, str]], rng: np.random.Generator) -> list[tuple[str, str]]:
    """Yes-no questions of one answer, drawn by a fair coin, none where the other answer is not to be had."""
    answers = {answer for _, answer in candidates}
    if not answers & set(YES_NO):
        return candidates
    wanted = YES_NO[rng.integers(2)]
    return [asked for asked in candidates if asked[1] == wanted] if len(answers) == 2 else []


@dataclass(frozen=True)
class GQADigitsFiles:
    """Where `write_digits` put one split's GQA files: what `GQADataset` is given."""

    questions: Path
    images: Path
    image_name: str

    @classmethod
    def of(cls, folder: str | Path, split: str) -> "GQADigitsFiles":
        """The files of `split` (train, val, test) under `folder`."""
        images = images_folder(folder, split)
        return cls(Path(folder) / f"digits_{split}_balanced_questions.json", images, "{image_id}.png")


def write(split: SceneSplit, rng: np.random.Generator) -> None:
    """Writes the questions file of a split."""
    questions = {}
    for index in range(len(split.scenes)):
        asked = questions_about(split.scenes.objects(index), split.questions_per_scene, rng)
        for number, (detailed, question, answer) in enumerate(asked):
            types = QUESTION_TYPES[detailed]
            questions[str(split.image_id(index) * QUESTIONS_PER_IMAGE_ID + number)] = {
                "question": question,
                "imageId": split.image_path(index).stem,
                "answer": answer,
                "isBalanced": True,
                "types": {
                    "structural": types.structural,
                    "semantic": types.semantic,
                    "detailed": detailed,
                },
            }
    files = GQADigitsFiles.of(split.folder, split.name)
    files.questions.write_text(json.dumps(questions), encoding="utf-8")
