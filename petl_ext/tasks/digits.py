"""Small real data in the file formats of VQAv2, GQA and SNLI-VE: scenes of handwritten digits, questions and captions.

A scene is a grid of 2 x 2 cells; a cell is empty or holds one of scikit-learn's 1797 handwritten digits in a color. The
splits share no digit picture. Captions are for pre-training and never contain one of the questions asked here. GQA's
questions are in digits_gqa.py, SNLI-VE's hypotheses in digits_snli_ve.py.
"""

import json
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm.auto import tqdm

BACKBONE = Path(__file__).parent / "digits_backbone"  # pre-trained by pretrain_digits.py
CELL = 16  # pixels; a scene is twice as wide and high
POSITIONS = ("northwest", "northeast", "southwest", "southeast")
COLORS = {
    "red": (230, 40, 40),
    "green": (40, 200, 60),
    "blue": (60, 90, 255),
    "yellow": (240, 220, 40),
    "white": (240, 240, 240),
}
COLOR_NAMES = tuple(COLORS)
DIGIT_SIZES = (14, 16)
NOISE = 0.05  # standard deviation of the pixel noise, as a share of full brightness
IMAGE_NAME = "digits_{split}_{{image_id:012d}}.png"  # formatted twice: by split, then by image
PICTURES = {"train": 1197, "val": 300, "test": 300}
SPLIT_SEED = 1797  # the split of the pictures never changes, or a shipped backbone would have seen test digits
FIRST_IMAGE_ID = {"train": 1, "val": 1_000_001, "test": 2_000_001}
QUESTIONS_PER_IMAGE_ID = 1000  # question_id = image_id * 1000 + number, as in VQAv2
ANNOTATORS = 10
# (0 for the row, 1 for the column; how much it exceeds the other cell's)
RELATIONS = {"left of": (1, -1), "right of": (1, 1), "above": (0, -1), "below": (0, 1)}
# (0 for the row, 1 for the column; which it is)
SIDES = {"on the left": (1, 0), "on the right": (1, 1), "at the top": (0, 0), "at the bottom": (0, 1)}

Answered = tuple[str, str]


@dataclass(frozen=True)
class Scenes:
    """Scenes and what is in them: `images` uint8 [n, 32, 32, 3]; `digits`, `colors` int [n, 4], -1 in an empty cell."""

    images: np.ndarray
    digits: np.ndarray
    colors: np.ndarray

    def __len__(self) -> int:
        return len(self.images)

    def objects(self, index: int) -> list["DigitObject"]:
        """The digits of one scene, in the order of `POSITIONS`."""
        cells = zip(POSITIONS, self.digits[index], self.colors[index], strict=True)
        return [DigitObject(int(digit), COLOR_NAMES[color], where) for where, digit, color in cells if digit >= 0]


@dataclass(frozen=True)
class DigitObject:
    """One digit of a scene."""

    digit: int
    color: str
    position: str


def stands(position: str, relation: str, other: str) -> bool:
    """Whether `position` is "left of", "right of", "above" or "below" `other`, be it in the other row or column."""
    axis, difference = RELATIONS[relation]
    return _row_and_column(position)[axis] - _row_and_column(other)[axis] == difference


def on_side(position: str, side: str) -> bool:
    """Whether `position` is "on the left", "on the right", "at the top" or "at the bottom"."""
    axis, value = SIDES[side]
    return _row_and_column(position)[axis] == value


def _row_and_column(position: str) -> tuple[int, int]:
    return divmod(POSITIONS.index(position), 2)


def split_pictures() -> dict[str, np.ndarray]:
    """The indices of scikit-learn's digit pictures that belong to train, val and test: disjoint, always the same."""
    order = np.random.default_rng(SPLIT_SEED).permutation(sum(PICTURES.values()))
    ends = np.cumsum(list(PICTURES.values()))[:-1]
    return dict(zip(PICTURES, np.split(order, ends), strict=True))


class SceneMaker:
    """Draws scenes from the digit pictures of one split.

    Raises ValueError for a split other than train, val, test.
    """

    def __init__(self, split: str):
        from sklearn.datasets import load_digits

        if split not in PICTURES:
            raise ValueError(f"split: expected one of {sorted(PICTURES)}, got {split!r}")
        data = load_digits()
        mine = split_pictures()[split]
        self.labels = data.target[mine]
        self.cells = _placements(data.images[mine])

    def make(self, count: int, rng: np.random.Generator) -> Scenes:
        """`count` scenes of two to four digits; the same `rng` state gives the same scenes."""
        filled = _filled_cells(count, rng)
        pictures = rng.integers(len(self.labels), size=(count, len(POSITIONS)))
        placements = rng.integers(len(self.cells), size=pictures.shape)
        colors = rng.integers(len(COLORS), size=pictures.shape)
        ink = self.cells[placements, pictures] * filled[..., None, None]
        cells = ink[..., None] * np.array(list(COLORS.values()), dtype=np.float32)[colors][:, :, None, None]
        images = cells.reshape(count, 2, 2, CELL, CELL, 3).swapaxes(2, 3).reshape(count, 2 * CELL, 2 * CELL, 3)
        images = images + rng.normal(0, 255 * NOISE, images.shape).astype(np.float32)
        return Scenes(
            images.round().clip(0, 255).astype(np.uint8),
            np.where(filled, self.labels[pictures], -1),
            np.where(filled, colors, -1),
        )


def _filled_cells(count: int, rng: np.random.Generator) -> np.ndarray:
    """Bool [count, 4]: two random cells of each scene are filled, each of the others with probability 1/2."""
    rank = rng.random((count, len(POSITIONS))).argsort(axis=1)
    return (rank < 2) | (rng.random(rank.shape) < 0.5)


def _placements(pictures: np.ndarray) -> np.ndarray:
    """Pictures [n, 8, 8] of ink 0..16 at every size and place in a cell: float32 [placements, n, CELL, CELL], 0..1."""
    cells = []
    images = [Image.fromarray(picture.astype(np.float32) / 16) for picture in pictures]
    for size in DIGIT_SIZES:
        ink = np.stack([np.asarray(image.resize((size, size), Image.BICUBIC)) for image in images]).clip(0, 1)
        slack = CELL - size
        for top in range(slack + 1):
            for left in range(slack + 1):
                cells.append(np.pad(ink, ((0, 0), (top, slack - top), (left, slack - left))))
    return np.stack(cells)


def caption(objects: list[DigitObject], rng: np.random.Generator) -> str:
    """A sentence about one or two of `objects`, for pre-training."""
    chosen = rng.permutation(len(objects))[: rng.integers(1, 3)]
    return " and ".join(_PHRASES[rng.integers(len(_PHRASES))].format_map(vars(objects[index])) for index in chosen)


_PHRASES = ("a {color} {digit} in the {position}", "the {position} holds a {color} {digit}")


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
    shares = np.array([kind.share for kind in QUESTION_TYPES.values()])
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
            folder / split,
            IMAGE_NAME.format(split=split),
        )


@dataclass(frozen=True)
class SceneSplit:
    """The scenes of one split, whose images are in `folder`, and how much is to be asked about each."""

    folder: Path
    name: str
    scenes: Scenes
    questions_per_scene: int

    def image_id(self, index: int) -> int:
        """The id of a scene's image."""
        return FIRST_IMAGE_ID[self.name] + index

    def image_path(self, index: int) -> Path:
        """The file of a scene's image."""
        files = DigitsFiles.of(self.folder, self.name)
        return files.images / files.image_name.format(image_id=self.image_id(index))


def write_digits(
    folder: str | Path,
    num_scenes: dict[str, int] | None = None,
    questions_per_scene: int = 2,
    seed: int = 0,
    progress: bool = True,
    formats: Sequence[str] = ("vqa",),
) -> dict[str, DigitsFiles]:
    """Writes scenes and questions about them; a seed always gives the same bytes, whichever other formats there are.

    `num_scenes` is the number of scenes of each split, 5000 train, 500 val and 1000 test if None. `folder` must not
    exist yet; it appears once everything in it is complete.

    `formats` are "vqa" (VQAv2's questions and annotations, at the paths returned; all ten annotators agree), "gqa" (at
    `digits_gqa.GQADigitsFiles.of(folder, split)`) and "snli_ve" (at `digits_snli_ve.SNLIVEDigitsFiles.of`), all about
    the same images.

    Raises FileExistsError if `folder` exists, ValueError for an unknown split or format.
    """
    folder, writers = Path(folder), _writers()
    if not set(formats) <= set(writers):
        raise ValueError(f"formats: expected some of {sorted(writers)}, got {list(formats)}")
    if folder.exists():
        raise FileExistsError(f"folder: expected one that does not exist yet, got {folder}")
    folder.parent.mkdir(parents=True, exist_ok=True)
    num_scenes = num_scenes or {"train": 5000, "val": 500, "test": 1000}
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        unfinished = Path(scratch) / folder.name
        for name, count in num_scenes.items():
            rng = np.random.default_rng([seed, *name.encode()])
            split = SceneSplit(unfinished, name, SceneMaker(name).make(count, rng), questions_per_scene)
            _write_images(split, tqdm(range(count), desc=f"digits {name}", disable=not progress))
            rngs = {"vqa": rng}  # VQAv2's questions go on where the scenes stopped
            for kind in formats:
                kind_rng = rngs.get(kind) or np.random.default_rng([seed, *name.encode(), *kind.encode()])
                writers[kind](split, kind_rng)
        unfinished.rename(folder)
    return {split: DigitsFiles.of(folder, split) for split in num_scenes}


def _writers() -> dict[str, Callable[[SceneSplit, np.random.Generator], None]]:
    from petl_ext.tasks import digits_gqa, digits_snli_ve  # which begin with the scenes of this module

    return {"vqa": _write_vqa, "gqa": digits_gqa.write, "snli_ve": digits_snli_ve.write}


def _write_images(split: SceneSplit, indices: Iterable[int]) -> None:
    DigitsFiles.of(split.folder, split.name).images.mkdir(parents=True)
    for index in indices:
        Image.fromarray(split.scenes.images[index]).save(split.image_path(index))


def _write_vqa(split: SceneSplit, rng: np.random.Generator) -> None:
    questions, annotations = [], []
    for index in range(len(split.scenes)):
        image_id = split.image_id(index)
        asked = questions_about(split.scenes.objects(index), split.questions_per_scene, rng)
        for number, (kind, question, answer) in enumerate(asked):
            ids = {"image_id": image_id, "question_id": image_id * QUESTIONS_PER_IMAGE_ID + number}
            questions.append(ids | {"question": question})
            annotations.append(ids | _annotation(kind, answer))
    files = DigitsFiles.of(split.folder, split.name)
    files.questions.write_text(json.dumps({"questions": questions}), encoding="utf-8")
    files.annotations.write_text(json.dumps({"annotations": annotations}), encoding="utf-8")


def _annotation(kind: str, answer: str) -> dict:
    answers = [{"answer": answer, "answer_confidence": "yes", "answer_id": who + 1} for who in range(ANNOTATORS)]
    return {
        "question_type": kind,
        "answer_type": QUESTION_TYPES[kind].answer_type,
        "multiple_choice_answer": answer,
        "answers": answers,
    }
