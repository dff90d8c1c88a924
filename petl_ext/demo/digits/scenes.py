"""Scenes of handwritten digits, and captions of them.

A scene is a grid of 2 x 2 cells; a cell is empty or holds one of scikit-learn's 1797 handwritten digits in a color. The
splits share no digit picture. Captions are for pre-training and never contain one of the questions of vqa.py.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

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
PICTURES = {"train": 1197, "val": 300, "test": 300}
SPLIT_SEED = 1797  # the split of the pictures never changes, or a shipped backbone would have seen test digits
FIRST_IMAGE_ID = {"train": 1, "val": 1_000_001, "test": 2_000_001}
QUESTIONS_PER_IMAGE_ID = 1000  # question_id = image_id * 1000 + number, as in VQAv2
# (0 for the row, 1 for the column; how much it exceeds the other cell's)
RELATIONS = {"left of": (1, -1), "right of": (1, 1), "above": (0, -1), "below": (0, 1)}
# (0 for the row, 1 for the column; which it is)
SIDES = {"on the left": (1, 0), "on the right": (1, 1), "at the top": (0, 0), "at the bottom": (0, 1)}


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


def unique(objects: Sequence[DigitObject], attribute: str) -> list[DigitObject]:
    """The objects that share their `attribute` with no other."""
    values = [getattr(it, attribute) for it in objects]
    return [it for it, value in zip(objects, values, strict=True) if values.count(value) == 1]


def one_of_several(alike: Sequence[DigitObject]) -> Iterator[tuple[str, DigitObject]]:
    """Of several objects: those that are the only one on their side, with the side."""
    for side in SIDES if len(alike) > 1 else ():
        there = [it for it in alike if on_side(it.position, side)]
        if len(there) == 1:
            yield side, there[0]


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
            raise ValueError(f"split must be one of {sorted(PICTURES)}, got {split!r}")
        data = load_digits()
        mine = split_pictures()[split]
        self.labels = data.target[mine]
        self.cells = _laid_out(data.images[mine])

    def make(self, count: int, rng: np.random.Generator) -> Scenes:
        """`count` scenes of two to four digits; the same `rng` state gives the same scenes."""
        filled = _filled_cells(count, rng)
        pictures = rng.integers(len(self.labels), size=(count, len(POSITIONS)))
        layouts = rng.integers(len(self.cells), size=pictures.shape)
        colors = rng.integers(len(COLORS), size=pictures.shape)
        ink = self.cells[layouts, pictures] * filled[..., None, None]
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


def _laid_out(pictures: np.ndarray) -> np.ndarray:
    """Pictures [n, 8, 8] of ink 0..16 at every size and offset in a cell: float32 [layouts, n, CELL, CELL], 0..1."""
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
        name = image_name(self.name).format(image_id=self.image_id(index))
        return images_folder(self.folder, self.name) / name


def images_folder(folder: str | Path, split: str) -> Path:
    """Where `write.write_digits` puts the images of a split."""
    return Path(folder) / split


def image_name(split: str) -> str:
    """The file name of an image of a split, to be formatted with its `image_id`."""
    return f"digits_{split}_{{image_id:012d}}.png"
