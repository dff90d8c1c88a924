"""Hypotheses in SNLI-VE's file formats about scenes of handwritten digits; `write.write_digits` writes them.

What is in a dark cell is not seen: it may be any digit in any color, or nothing. So a hypothesis, which always says
that something is there, is entailed where the scene shows it, contradicted where no content of the dark cells could
make it true, and neutral otherwise. (Questions for VQAv2 and GQA take a dark cell for empty.)

Neither a hypothesis nor a scene alone tells the label: every template comes with every label equally often, and so does
every number of digits and of colors in a scene. Scenes without a dark cell have no hypotheses: none would be neutral.
"""

import base64
import json
from collections import Counter
from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass
from itertools import permutations
from pathlib import Path

import numpy as np

from petl_ext.demo.digits.scenes import (
    COLOR_NAMES,
    POSITIONS,
    RELATIONS,
    SIDES,
    DigitObject,
    SceneSplit,
    caption,
    images_folder,
    on_side,
    stands,
)

DIGITS = range(10)
# Every word of the hypotheses: what a tokenizer made for them has to know.
WORDS = (
    *(
        "a",
        "above",
        "an",
        "are",
        "at",
        "below",
        "bottom",
        "digit",
        "digits",
        "in",
        "is",
        "left",
        "of",
        "on",
        "one",
        "right",
    ),
    *("the", "there", "top", "two", *map(str, DIGITS), *COLOR_NAMES, *POSITIONS),
)
A_DIGIT = {digit: f"an {digit}" if digit == 8 else f"a {digit}" for digit in DIGITS}
FALSE, UNKNOWN, TRUE = 0, 1, 2  # so that "and" is min and "or" is max
LABEL_OF = {FALSE: "contradiction", UNKNOWN: "neutral", TRUE: "entailment"}

Cells = dict[str, DigitObject | None]  # by position; None where it is dark
Judged = Iterator[tuple[str, int]]


def _shows(cell: DigitObject | None, **wanted: int | str) -> int:
    """Whether the digit in a cell is as `wanted`: digit=3, color="red"."""
    if cell is None:
        return UNKNOWN
    return TRUE if all(getattr(cell, name) == value for name, value in wanted.items()) else FALSE


def _color_at(cells: Cells) -> Judged:
    for position, cell in cells.items():
        for color in COLOR_NAMES:
            yield f"there is a {color} digit in the {position}", _shows(cell, color=color)


def _digit_at(cells: Cells) -> Judged:
    for position, cell in cells.items():
        for digit in DIGITS:
            yield f"there is {A_DIGIT[digit]} in the {position}", _shows(cell, digit=digit)


def _object_at(cells: Cells) -> Judged:
    for position, cell in cells.items():
        for color in COLOR_NAMES:
            for digit in DIGITS:
                yield f"a {color} {digit} is in the {position}", _shows(cell, color=color, digit=digit)


def _color_on_side(cells: Cells) -> Judged:
    for side, there in _sides_of(cells).items():
        for color in COLOR_NAMES:
            yield f"one of the digits {side} is {color}", max(_shows(cell, color=color) for cell in there)


def _digit_on_side(cells: Cells) -> Judged:
    for side, there in _sides_of(cells).items():
        for digit in DIGITS:
            yield f"one of the digits {side} is {A_DIGIT[digit]}", max(_shows(cell, digit=digit) for cell in there)


def _two_of_a_color(cells: Cells) -> Judged:
    """At least two."""
    for color in COLOR_NAMES:
        yield f"two of the digits are {color}", sorted(_shows(cell, color=color) for cell in cells.values())[-2]


def _colors_related(cells: Cells) -> Judged:
    for color, relation, other, shown in _related(cells, "color", COLOR_NAMES):
        yield f"a {color} digit is {relation} a {other} digit", shown


def _digits_related(cells: Cells) -> Judged:
    for digit, relation, other, shown in _related(cells, "digit", DIGITS):
        yield f"{A_DIGIT[digit]} is {relation} {A_DIGIT[other]}", shown


def _sides_of(cells: Cells) -> dict[str, list[DigitObject | None]]:
    return {side: [cell for position, cell in cells.items() if on_side(position, side)] for side in SIDES}


def _related(cells: Cells, attribute: str, values: Sequence) -> Iterator[tuple]:
    """(value, relation, other value, whether digits with them stand so), for every two values of the attribute."""
    shows = {at: {value: _shows(cell, **{attribute: value}) for value in values} for at, cell in cells.items()}
    for relation in RELATIONS:
        pairs = [(shows[it], shows[other]) for it, other in permutations(cells, 2) if stands(it, relation, other)]
        for value, other in permutations(values, 2):
            yield value, relation, other, max(min(it[value], that[other]) for it, that in pairs)


# All hypotheses of a template about a scene, each with FALSE, UNKNOWN or TRUE.
TEMPLATES: dict[str, Callable[[Cells], Judged]] = {
    "color at": _color_at,
    "digit at": _digit_at,
    "object at": _object_at,
    "color on side": _color_on_side,
    "digit on side": _digit_on_side,
    "two of a color": _two_of_a_color,
    "colors related": _colors_related,
    "digits related": _digits_related,
}


class HypothesisMaker:
    """Makes hypotheses: each template, and each count of digits and colors, has every label about equally often."""

    def __init__(self, rng: np.random.Generator):
        self.rng = rng
        self.by_template, self.by_scene = Counter(), Counter()

    def about(self, objects: list[DigitObject], count: int) -> list[tuple[str, str, str]]:
        """`count` hypotheses of different templates about a scene: (template, hypothesis, label); [] if all is seen."""
        seen = {it.position: it for it in objects}
        cells = {position: seen.get(position) for position in POSITIONS}
        made = {}
        while None in cells.values() and len(made) < min(count, len(TEMPLATES)):
            template, label, hypothesis = next(self._possible(cells, made))
            made[template] = (template, hypothesis, LABEL_OF[label])
            self.by_template[template, label] += 1
            self.by_scene[_counts(cells), label] += 1
        return list(made.values())

    def _possible(self, cells: Cells, made: Container[str]) -> Iterator[tuple[str, int, str]]:
        """A hypothesis of each template not in `made` and each label that the scene allows, the rarest first."""
        wanted = [(template, label) for template in TEMPLATES if template not in made for label in LABEL_OF]
        order = [wanted[index] for index in self.rng.permutation(len(wanted))]
        for template, label in sorted(order, key=lambda pair: self._frequency(_counts(cells), *pair)):
            candidates = [text for text, judged in TEMPLATES[template](cells) if judged == label]
            if candidates:
                yield template, label, candidates[self.rng.integers(len(candidates))]

    def _frequency(self, counts: tuple[int, int], template: str, label: int) -> int:
        return self.by_template[template, label] * len(TEMPLATES) + self.by_scene[counts, label]


def _counts(cells: Cells) -> tuple[int, int]:
    """What of a scene could give the label away: how many digits and how many colors it shows."""
    objects = [cell for cell in cells.values() if cell is not None]
    return len(objects), len({it.color for it in objects})


@dataclass(frozen=True)
class SNLIVEDigitsFiles:
    """Where `write_digits` put one split's SNLI-VE files: the same pairs in both formats.

    `SNLIVEDataset` is given `jsonl`, `images` and `image_name`, or `tsv` and no images.
    """

    jsonl: Path
    tsv: Path
    images: Path
    image_name: str

    @classmethod
    def of(cls, folder: str | Path, split: str) -> "SNLIVEDigitsFiles":
        """The files of `split` (train, val, test) under `folder`."""
        base = Path(folder) / f"digits_{split}_snli_ve"
        images = images_folder(folder, split)
        return cls(base.with_suffix(".jsonl"), base.with_suffix(".tsv"), images, "{image_id}.png")


def write(split: SceneSplit, rng: np.random.Generator) -> None:
    """Writes the jsonl and the tsv file of a split. The caption, which readers ignore, is a true one."""
    files, maker = SNLIVEDigitsFiles.of(split.folder, split.name), HypothesisMaker(rng)
    with files.jsonl.open("w", encoding="utf-8", newline="") as jsonl, files.tsv.open("wb") as tsv:
        for index in range(len(split.scenes)):
            objects, image = split.scenes.objects(index), split.image_path(index)
            encoded = base64.urlsafe_b64encode(image.read_bytes()).decode()
            premise = caption(objects, rng)
            for number, (_, hypothesis, label) in enumerate(maker.about(objects, split.questions_per_scene)):
                pair_id = f"{image.name}#{number}"
                jsonl.write(json.dumps(_official(pair_id, image, premise, hypothesis, label)) + "\n")
                tsv.write("\t".join([pair_id, image.stem, encoded, hypothesis, premise, label]).encode() + b"\n")


def _official(pair_id: str, image: Path, premise: str, hypothesis: str, label: str) -> dict:
    return {
        "Flickr30K_ID": image.stem,
        "annotator_labels": [label],
        "captionID": f"{image.name}#0",
        "gold_label": label,
        "pairID": pair_id,
        "sentence1": premise,
        "sentence2": hypothesis,
    }
