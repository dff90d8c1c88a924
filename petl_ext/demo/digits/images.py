"""Handwritten digits as an image folder, one digit per image: `<folder>/seven/0123_0.png`.

The pictures are scikit-learn's, split as in scenes.py. In the domain "plain" a digit has a color and stands on black,
in "ground" on a darker color, which may be its own.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm.auto import tqdm

from petl_ext.demo.digits.scenes import COLORS, NOISE, SceneMaker
from petl_ext.demo.digits.write import new_folder

CLASSES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
GROUND_BRIGHTNESS = {"plain": 0.0, "ground": 0.5}  # of the color behind the digit, by domain


@dataclass(frozen=True)
class DigitImages:
    """Images of one digit each: `images` uint8 [n, 16, 16, 3]; `digits`, `colors` int [n]."""

    images: np.ndarray
    digits: np.ndarray
    colors: np.ndarray


class DigitImageMaker:
    """Draws images of the digit pictures of one split in one domain.

    Attributes:
        num_pictures: how many pictures the split has.

    Raises ValueError for a split other than train, val, test, or a domain other than plain, ground.
    """

    def __init__(self, split: str, domain: str = "plain"):
        if domain not in GROUND_BRIGHTNESS:
            raise ValueError(f"domain must be one of {sorted(GROUND_BRIGHTNESS)}, got {domain!r}")
        self.scenes, self.brightness = SceneMaker(split), GROUND_BRIGHTNESS[domain]
        self.num_pictures = len(self.scenes.labels)

    def make(self, pictures: np.ndarray, rng: np.random.Generator) -> DigitImages:
        """One image of each of `pictures`, indices below `num_pictures`: size, position and colors are drawn."""
        layouts = rng.integers(len(self.scenes.cells), size=len(pictures))
        colors, grounds = rng.integers(len(COLORS), size=(2, len(pictures)))
        palette = np.array(list(COLORS.values()), dtype=np.float32)[:, None, None]
        ink = self.scenes.cells[layouts, pictures][..., None]
        images = ink * palette[colors] + (1 - ink) * self.brightness * palette[grounds]
        images = images + rng.normal(0, 255 * NOISE, images.shape)
        return DigitImages(images.round().clip(0, 255).astype(np.uint8), self.scenes.labels[pictures], colors)


def write_digit_images(
    folder: str | Path, split: str, domain: str = "plain", copies: int = 1, seed: int = 0, progress: bool = True
) -> Path:
    """Writes `copies` images of every digit picture of `split`; a seed always gives the same bytes.

    `folder`, which is returned, must not exist yet; it appears once everything in it is complete.

    Raises FileExistsError if `folder` exists, ValueError for an unknown split or domain, or fewer than one copy.
    """
    folder, maker = Path(folder), DigitImageMaker(split, domain)
    if copies < 1:
        raise ValueError(f"copies must be at least 1, got {copies}")
    rng = np.random.default_rng([seed, *split.encode(), *domain.encode()])
    with new_folder(folder) as unfinished:
        for name in CLASSES:
            (unfinished / name).mkdir()
        for copy in tqdm(range(copies), desc=f"digits {split}", disable=not progress):
            drawn = maker.make(np.arange(maker.num_pictures), rng)
            for picture, (image, digit) in enumerate(zip(drawn.images, drawn.digits, strict=True)):
                Image.fromarray(image).save(unfinished / CLASSES[digit] / f"{picture:04d}_{copy}.png")
    return folder
