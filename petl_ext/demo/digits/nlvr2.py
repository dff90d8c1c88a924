"""Sentences in NLVR2's file format about pairs of scenes of handwritten digits; `write.write_digits` writes them.

As in NLVR2, eight scenes make four pairs, and a sentence about them is true of two and false of the other two: it alone
tells nothing about its label.
"""

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np

from petl_ext.demo.digits.scenes import COLOR_NAMES, DigitObject, SceneSplit

DIGITS = range(10)
PAIRS = 4  # of a set
SENTENCES = 2  # about a set, at most
SIDES = ("left", "right")
COUNTS = range(4, 9)  # of digits in two scenes
# Every word of the sentences: what a tokenizer made for them has to know.
WORDS = (
    *("a", "all", "are", "as", "both", "digit", "digits", "hold", "holds", "image", "images", "in", "left", "many"),
    *("more", "one", "only", "right", "than", "the", "there", *map(str, DIGITS), *COLOR_NAMES),
)

Pair = Sequence[list[DigitObject]]  # the left and the right scene
Judged = Iterator[tuple[str, bool]]


def _one_side(pair: Pair) -> Judged:
    for (side, objects), color in product(zip(SIDES, pair, strict=True), COLOR_NAMES):
        yield f"the {side} image holds a {color} digit", any(it.color == color for it in objects)


def _colors_in_both(pair: Pair) -> Judged:
    for color in COLOR_NAMES:
        held = [any(it.color == color for it in objects) for objects in pair]
        yield f"both images hold a {color} digit", all(held)
        yield f"only one image holds a {color} digit", sum(held) == 1


def _digits_in_both(pair: Pair) -> Judged:
    for digit in DIGITS:
        held = [any(it.digit == digit for it in objects) for objects in pair]
        yield f"both images hold a {digit}", all(held)
        yield f"only one image holds a {digit}", sum(held) == 1


def _more(pair: Pair) -> Judged:
    left, right = map(len, pair)
    yield "the left image holds more digits than the right image", left > right
    yield "the right image holds more digits than the left image", right > left
    yield "both images hold as many digits", left == right


def _in_all(pair: Pair) -> Judged:
    for count in COUNTS:
        yield f"there are {count} digits in all", sum(map(len, pair)) == count


# All sentences of a template, the same for every pair, each with whether it is true of the pair.
TEMPLATES: dict[str, Callable[[Pair], Judged]] = {
    "one side": _one_side,
    "colors in both": _colors_in_both,
    "digits in both": _digits_in_both,
    "more": _more,
    "in all": _in_all,
}


def sentences_about(pairs: Sequence[Pair], count: int, rng: np.random.Generator) -> list[tuple[str, list[bool]]]:
    """At most `count` sentences of different templates, each with its truth of every pair: of half of them."""
    chosen = []
    for index in rng.permutation(len(TEMPLATES)):
        truths = [dict(list(TEMPLATES.values())[index](pair)) for pair in pairs]
        candidates = [text for text in truths[0] if sum(truth[text] for truth in truths) == len(pairs) / 2]
        if candidates and len(chosen) < count:
            text = candidates[rng.integers(len(candidates))]
            chosen.append((text, [truth[text] for truth in truths]))
    return chosen


@dataclass(frozen=True)
class NLVR2DigitsFiles:
    """Where `write_digits` put one split's NLVR2 files: what `NLVR2Dataset` is given."""

    examples: Path
    images: Path

    @classmethod
    def of(cls, folder: str | Path, split: str) -> "NLVR2DigitsFiles":
        """The files of `split` (train, val, test) under `folder`."""
        base = Path(folder) / f"digits_{split}_nlvr2"
        return cls(base.with_suffix(".json"), base)


def write(split: SceneSplit, rng: np.random.Generator) -> None:
    """Writes the examples file of a split and the images under their official names, those of train in folders.

    Scenes that do not fill a set are left out.
    """
    files = NLVR2DigitsFiles.of(split.folder, split.name)
    files.images.mkdir()
    with files.examples.open("w", encoding="utf-8", newline="") as lines:
        for image_set in range(len(split.scenes) // (2 * PAIRS)):
            scenes = range(2 * PAIRS * image_set, 2 * PAIRS * (image_set + 1))
            pairs = list(zip(scenes[::2], scenes[1::2], strict=True))
            where = {"directory": image_set % 2} if split.name == "train" else {}
            folder = files.images / str(where.get("directory", ""))
            folder.mkdir(exist_ok=True)
            for number, pair in enumerate(pairs):
                for side, scene in enumerate(pair):
                    name = f"{split.name}-{image_set}-{number}-img{side}.png"
                    shutil.copyfile(split.image_path(scene), folder / name)
            objects = [[split.scenes.objects(scene) for scene in pair] for pair in pairs]
            count = min(SENTENCES, split.questions_per_scene)
            for sentence, (text, truths) in enumerate(sentences_about(objects, count, rng)):
                for number, truth in enumerate(truths):
                    identifier = f"{split.name}-{image_set}-{number}-{sentence}"
                    example = {"identifier": identifier, "sentence": text, "label": str(truth)}
                    lines.write(json.dumps(example | where) + "\n")
