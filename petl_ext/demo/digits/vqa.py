"""Questions in VQAv2's file formats about scenes of handwritten digits; `write.write_digits` writes them."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from petl_ext.demo.digits.scenes import (
    COLOR_NAMES,
    COLORS,
    QUESTIONS_PER_IMAGE_ID,
    DigitObject,
    SceneSplit,
    image_name,
    images_folder,
)

ANNOTATORS = 10

Answered = tuple[str, str]


def _digit_at(objects: list[DigitObject], rng: np.random.Generator) -> Answered:
    it = _any(objects, rng)
    return f"which digit is in the {it.position}?", str(it.digit)


def _color_at(objects: list[DigitObject], rng: np.random.Generator) -> Answered:
    it = _any(objects, rng)
    return f"what color is the digit in the {it.position}?", it.color


def _color_of(objects: list[DigitObject], rng: np.random.Generator) -> Answered | None:
    it = _only_one(objects, "digit", rng)
    return it and (f"what color is the {it.digit}?", it.color)


def _digit_of(objects: list[DigitObject], rng: np.random.Generator) -> Answered | None:
    it = _only_one(objects, "color", rng)
    return it and (f"which digit is {it.color}?", str(it.digit))


def _position_of(objects: list[DigitObject], rng: np.random.Generator) -> Answered | None:
    it = _only_one(objects, "digit", rng)
    return it and (f"where is the {it.digit}?", it.position)


def _count(objects: list[DigitObject], rng: np.random.Generator) -> Answered:
    color = COLOR_NAMES[rng.integers(len(COLORS))]
    return f"how many digits are {color}?", str(sum(it.color == color for it in objects))


def _exist(objects: list[DigitObject], rng: np.random.Generator) -> Answered:
    present = {(it.color, it.digit) for it in objects}
    it = _any(objects, rng)
    digit = it.digit if rng.random() < 0.4 else _any(objects, rng).digit  # a mixture of two objects is mostly not there
    return f"is there a {it.color} {digit}?", "yes" if (it.color, digit) in present else "no"


def _any(objects: list[DigitObject], rng: np.random.Generator) -> DigitObject:
    return objects[rng.integers(len(objects))]


def _only_one(objects: list[DigitObject], attribute: str, rng: np.random.Generator) -> DigitObject | None:
    """A random object that shares its `attribute` with no other one, None where there is none."""
    values = [getattr(it, attribute) for it in objects]
    candidates = [it for it, value in zip(objects, values, strict=True) if values.count(value) == 1]
    return _any(candidates, rng) if candidates else None


@dataclass(frozen=True)
class QuestionType:
    """How one type of question is asked, its share of all questions, and VQAv2's `answer_type` of it."""

    ask: Callable[[list[DigitObject], np.random.Generator], Answered | None]
    share: float
    answer_type: str


QUESTION_TYPES = {
    "digit at": QuestionType(_digit_at, 0.2, "number"),
    "color at": QuestionType(_color_at, 0.2, "other"),
    "color of": QuestionType(_color_of, 0.2, "other"),
    "digit of": QuestionType(_digit_of, 0.2, "number"),
    "hard: position of": QuestionType(_position_of, 0.07, "other"),
    "hard: count": QuestionType(_count, 0.07, "number"),
    "hard: exist": QuestionType(_exist, 0.06, "yes/no"),
}


def questions_about(objects: list[DigitObject], count: int, rng: np.random.Generator) -> list[tuple[str, str, str]]:
    """`count` questions of different types about one scene: (question type, question, answer)."""
    shares = np.array([question_type.share for question_type in QUESTION_TYPES.values()])
    names = list(QUESTION_TYPES)
    asked = []
    for index in rng.choice(len(names), size=len(names), replace=False, p=shares / shares.sum()):
        answered = QUESTION_TYPES[names[index]].ask(objects, rng)
        if answered is not None and len(asked) < count:
            asked.append((names[index], *answered))
    return asked


@dataclass(frozen=True)
class DigitsFiles:
    """Where `write_digits` put one split: what `VQADataset` is given."""

    questions: Path
    annotations: Path
    images: Path
    image_name: str

    @classmethod
    def of(cls, folder: str | Path, split: str) -> "DigitsFiles":
        """The files of `split` (train, val, test) under `folder`."""
        folder = Path(folder)
        return cls(
            folder / f"digits_{split}_questions.json",
            folder / f"digits_{split}_annotations.json",
            images_folder(folder, split),
            image_name(split),
        )


def write(split: SceneSplit, rng: np.random.Generator) -> None:
    """Writes the questions and the annotations file of a split."""
    questions, annotations = [], []
    for index in range(len(split.scenes)):
        image_id = split.image_id(index)
        asked = questions_about(split.scenes.objects(index), split.questions_per_scene, rng)
        for number, (question_type, question, answer) in enumerate(asked):
            ids = {"image_id": image_id, "question_id": image_id * QUESTIONS_PER_IMAGE_ID + number}
            questions.append(ids | {"question": question})
            annotations.append(ids | _annotation(question_type, answer))
    files = DigitsFiles.of(split.folder, split.name)
    files.questions.write_text(json.dumps({"questions": questions}), encoding="utf-8")
    files.annotations.write_text(json.dumps({"annotations": annotations}), encoding="utf-8")


def _annotation(question_type: str, answer: str) -> dict:
    answers = [{"answer": answer, "answer_confidence": "yes", "answer_id": who + 1} for who in range(ANNOTATORS)]
    return {
        "question_type": question_type,
        "answer_type": QUESTION_TYPES[question_type].answer_type,
        "multiple_choice_answer": answer,
        "answers": answers,
    }
