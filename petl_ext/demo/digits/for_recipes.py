"""The data and the model of the digits recipes: `petl-ext demo digits`."""

import shutil
from pathlib import Path

from petl_ext.demo.digits import CLIP_BACKBONE, RECIPES_BACKBONE
from petl_ext.demo.digits.images import write_digit_images
from petl_ext.demo.digits.write import WRITERS, new_folder, write_digits
from petl_ext.demo.training import one_quiet_thread

SCENES = {"train": 5000, "val": 500, "test": 1000}
QUICK_SCENES = {"train": 160, "val": 40, "test": 40}


def write_for_recipes(output: str | Path, quick: bool = False, seed: int = 0, progress: bool = True) -> str:
    """Writes scenes in the official format of every task and folders of single digits; in `backbone`, a small ViLT
    that knows the tasks' words, and in `clip` a small CLIP.

    Args:
        output: folder that must not exist yet.
        quick: few scenes, to see it run.

    Returns:
        What was written, in words.

    Raises FileExistsError if the folder exists.
    """
    output = Path(output)
    with one_quiet_thread(), new_folder(output) as unfinished:
        scenes = QUICK_SCENES if quick else SCENES
        write_digits(unfinished / "digits", scenes, 2, seed, progress, tuple(WRITERS))
        for path in (unfinished / "digits").iterdir():
            path.rename(unfinished / path.name)
        (unfinished / "digits").rmdir()
        for split in scenes:
            write_digit_images(unfinished / f"digits_{split}_images", split, "ground", seed=seed, progress=progress)
        shutil.copytree(RECIPES_BACKBONE, unfinished / "backbone")
        shutil.copytree(CLIP_BACKBONE, unfinished / "clip")
    return (
        f"{output}: {sum(scenes.values()):,} scenes for {', '.join(WRITERS)}, folders of single digits, a ViLT in "
        f"{output / 'backbone'} and a CLIP in {output / 'clip'}"
    )
