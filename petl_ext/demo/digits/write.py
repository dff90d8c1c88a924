"""Writes scenes of handwritten digits, with questions and hypotheses about them, to a folder."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm.auto import tqdm

from petl_ext.demo.digits import gqa, nlvr2, retrieval, scienceqa, snli_ve, vqa
from petl_ext.demo.digits.scenes import SceneMaker, SceneSplit, images_folder
from petl_ext.demo.digits.vqa import DigitsFiles
from petl_ext.saving import written_whole

WRITERS: dict[str, Callable[[SceneSplit, np.random.Generator], None]] = {
    "vqa": vqa.write,
    "gqa": gqa.write,
    "snli_ve": snli_ve.write,
    "nlvr2": nlvr2.write,
    "retrieval": retrieval.write,
    "scienceqa": scienceqa.write,
}


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
    `gqa.GQADigitsFiles.of(folder, split)`), "snli_ve" (at `snli_ve.SNLIVEDigitsFiles.of`), "nlvr2" (at
    `nlvr2.NLVR2DigitsFiles.of`), and, with all splits in one file, "retrieval" (at
    `retrieval.RetrievalDigitsFiles.of(folder)`) and "scienceqa" (at `scienceqa.ScienceQADigitsFiles.of`), all about
    the same scenes.

    Raises FileExistsError if `folder` exists, ValueError for an unknown split or format.
    """
    folder = Path(folder)
    if not set(formats) <= set(WRITERS):
        raise ValueError(f"formats must be some of {sorted(WRITERS)}, got {list(formats)}")
    num_scenes = num_scenes or {"train": 5000, "val": 500, "test": 1000}
    with new_folder(folder) as unfinished:
        for name, count in num_scenes.items():
            rng = np.random.default_rng([seed, *name.encode()])
            split = SceneSplit(unfinished, name, SceneMaker(name).make(count, rng), questions_per_scene)
            _write_images(split, tqdm(range(count), desc=f"digits {name}", disable=not progress))
            rngs = {"vqa": rng}  # VQAv2's questions go on where the scenes stopped
            for form in formats:
                form_rng = rngs.get(form) or np.random.default_rng([seed, *name.encode(), *form.encode()])
                WRITERS[form](split, form_rng)
    return {split: DigitsFiles.of(folder, split) for split in num_scenes}


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A folder to write to, which is moved to `folder` when the block ends, and is gone if it raises.

    Raises FileExistsError if `folder` exists.
    """
    if folder.exists():
        raise FileExistsError(f"folder must not exist yet, got {folder}")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(folder) as unfinished:
        unfinished.mkdir()
        yield unfinished


def _write_images(split: SceneSplit, indices: Iterable[int]) -> None:
    images_folder(split.folder, split.name).mkdir()
    for index in indices:
        Image.fromarray(split.scenes.images[index]).save(split.image_path(index))
