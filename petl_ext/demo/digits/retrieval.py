"""Captions in Karpathy's file format of scenes of handwritten digits; `write.write_digits` writes them.

A caption names all digits of a scene, so that few scenes share one; those of a scene differ in order and form.
"""

import json
from dataclasses import dataclass
from itertools import permutations, product
from pathlib import Path

import numpy as np

from petl_ext.demo.digits.scenes import COLOR_NAMES, POSITIONS, DigitObject, SceneSplit

CAPTIONS = 5  # of a scene, as Flickr30K has
FORMS = ("{color} {digit} {position}", "{position} {color} {digit}")
# Every word of the captions: what a tokenizer made for them has to know. The demo's does.
WORDS = ("and", *map(str, range(10)), *COLOR_NAMES, *POSITIONS)


def captions_of(objects: list[DigitObject], rng: np.random.Generator) -> list[str]:
    """Different captions of a scene, each of all its digits."""
    orders = list(permutations(objects))
    forms = list(product(FORMS, repeat=len(objects)))
    chosen = rng.choice(len(orders) * len(forms), size=CAPTIONS, replace=False)
    return [_caption(orders[index // len(forms)], forms[index % len(forms)]) for index in chosen]


def _caption(objects: tuple[DigitObject, ...], forms: tuple[str, ...]) -> str:
    return " and ".join(form.format_map(vars(it)) for form, it in zip(forms, objects, strict=True))


@dataclass(frozen=True)
class RetrievalDigitsFiles:
    """Where `write_digits` put the captions of all splits: what `RetrievalDataset` is given, beside `splits`."""

    annotations: Path
    images: Path

    @classmethod
    def of(cls, folder: str | Path) -> "RetrievalDigitsFiles":
        """The file under `folder`; it names the folders of the splits as COCO's names val2014."""
        return cls(Path(folder) / "dataset_digits.json", Path(folder))


def write(split: SceneSplit, rng: np.random.Generator) -> None:
    """Adds the images of a split to the file of all splits, which it begins if it is not there."""
    path = RetrievalDigitsFiles.of(split.folder).annotations
    content = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"images": [], "dataset": "digits"}
    for index in range(len(split.scenes)):
        image_id = split.image_id(index)
        sentences = [
            {"tokens": text.split(), "raw": text, "imgid": image_id, "sentid": image_id * CAPTIONS + number}
            for number, text in enumerate(captions_of(split.scenes.objects(index), rng))
        ]
        image = split.image_path(index)
        content["images"].append(
            {
                "filepath": image.parent.name,
                "filename": image.name,
                "imgid": image_id,
                "split": split.name,
                "sentids": [sentence["sentid"] for sentence in sentences],
                "sentences": sentences,
            }
        )
    path.write_text(json.dumps(content), encoding="utf-8")
