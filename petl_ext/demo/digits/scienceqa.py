"""Multiple choice in ScienceQA's file formats about scenes of handwritten digits; `write.write_digits` writes them.

A third of the problems is about the image, a third about a text that describes it, and a third gives no context. The
choices are sorted, and what a question asks for is drawn: a question alone tells nothing, but where it needs no
context.
"""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from petl_ext.demo.digits.scenes import COLOR_NAMES, POSITIONS, DigitObject, SceneSplit

CHOICES = 4
SUBJECTS = {"image": "natural science", "text": "social science", "none": "language science"}
GRADES = 12
# Every word of the problems' texts but digits, colors and positions: what a tokenizer made for them has to know.
WORDS = (
    *(
        "question",
        "context",
        "options",
        "response",
        "which",
        "color",
        "is",
        "the",
        "digit",
        "in",
        "comes",
        "after",
        "?",
    ),
    *("a", "b", "c", "d", "n", "/", ":", "(", ")", "and", "picture", "of", "digits", "."),
    *(*map(str, range(10)), *COLOR_NAMES, *POSITIONS),
)


def _choices(right: str, others: list[str], rng: np.random.Generator) -> tuple[list[str], int]:
    """`right` among some of `others`, sorted; the index of `right`."""
    wrong = [other for other in others if other != right]
    choices = sorted([right, *rng.permutation(wrong)[: CHOICES - 1].tolist()])
    return choices, choices.index(right)


def _about_scene(objects: list[DigitObject], rng: np.random.Generator) -> tuple[str, str, list[str]]:
    """A question, its answer and answers to such questions."""
    it = objects[rng.integers(len(objects))]
    if rng.random() < 0.5:
        return f"Which color is the digit in the {it.position}?", it.color, list(COLOR_NAMES)
    return f"Which digit is in the {it.position}?", str(it.digit), [str(digit) for digit in range(10)]


def _about_nothing(rng: np.random.Generator) -> tuple[str, str, list[str]]:
    digit = int(rng.integers(9))
    return f"Which digit comes after {digit}?", str(digit + 1), [str(other) for other in range(10)]


def _described(objects: list[DigitObject]) -> str:
    return " and ".join(f"{it.color} {it.digit} in the {it.position}" for it in objects) + "."


@dataclass(frozen=True)
class ScienceQADigitsFiles:
    """Where `write_digits` put the problems of all splits: what `ScienceQADataset` is given, beside `split`."""

    problems: Path
    splits: Path
    captions: Path
    images: Path

    @classmethod
    def of(cls, folder: str | Path) -> "ScienceQADigitsFiles":
        """The files under `folder`."""
        base = Path(folder) / "digits_scienceqa"
        return cls(base / "problems.json", base / "pid_splits.json", base / "captions.json", base / "images")


def write(split: SceneSplit, rng: np.random.Generator) -> None:
    """Adds the problems of a split to the files of all splits, which it begins if they are not there: one problem for
    each scene, and captions of the images that say how many digits there are."""
    files = ScienceQADigitsFiles.of(split.folder)
    files.images.mkdir(parents=True, exist_ok=True)
    problems, splits, captions = (_begun(path) for path in (files.problems, files.splits, files.captions))
    splits[split.name] = [str(split.image_id(index)) for index in range(len(split.scenes))]
    for index, pid in enumerate(splits[split.name]):
        objects, context = split.scenes.objects(index), list(SUBJECTS)[index % len(SUBJECTS)]
        question, right, others = _about_nothing(rng) if context == "none" else _about_scene(objects, rng)
        choices, answer = _choices(right, others, rng)
        problems[pid] = {
            "question": question,
            "choices": choices,
            "answer": answer,
            "hint": _described(objects) if context == "text" else "",
            "image": "image.png" if context == "image" else None,
            "task": "closed choice",
            "grade": f"grade{rng.integers(1, GRADES + 1)}",
            "subject": SUBJECTS[context],
            "topic": "digits",
            "category": "handwritten digits",
            "skill": "Read digits",
            "lecture": "",
            "solution": f"The picture shows {_described(objects)}" if context != "none" else "",
            "split": split.name,
        }
        if context == "image":
            captions.setdefault("captions", {})[pid] = f"a picture of {len(objects)} digits"
            folder = files.images / split.name / pid
            folder.mkdir(parents=True)
            shutil.copyfile(split.image_path(index), folder / "image.png")
    for path, content in ((files.problems, problems), (files.splits, splits), (files.captions, captions)):
        path.write_text(json.dumps(content), encoding="utf-8")


def _begun(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
