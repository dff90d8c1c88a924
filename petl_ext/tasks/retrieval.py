"""Image-text retrieval on Flickr30K and COCO with Karpathy's splits: dataset and recalls.

    dataset_flickr30k.json, dataset_coco.json (cs.stanford.edu/people/karpathy/deepimagesent)
        {"images": [{"filename", "filepath" (COCO's folder: "val2014"), "split", "imgid",
                     "sentences": [{"raw", "sentid", ...} x 5]}]}
    splits  train, val, test and, of COCO, restval. ViLT and METER train on Flickr30K's train and val, COCO's train
            and restval, and are tested on test.

As in ViLT and METER, a caption and 15 random ones are scored against the image, and cross-entropy chooses. They draw
the random ones from all captions, those of the image too (`own_captions=True`); here they are other images', unless one
asks. METER's image-text matching loss, which it adds, is not here.

The models take K texts to an image: `petl_ext.models.ViltForImageAndTextRetrieval` and
`MeterForImageAndTextRetrieval`. `retrieval_scores.score_all` scores all captions of all images.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from petl_ext.tasks.files import pick, read_json
from petl_ext.tasks.inputs import ImageFolder, ImageTextCollator, TextImageDataset
from petl_ext.tasks.labels import label_loss

__all__ = [
    "CaptionedImage",
    "RetrievalCollator",
    "RetrievalDataset",
    "compute_metrics",
    "label_loss",
    "read_images",
    "recalls",
]

NEGATIVES = 15  # to a caption, as ViLT and METER have them
RECALLS = (1, 5, 10)
ROWS = 256  # of the score matrix that are compared at a time


@dataclass(frozen=True, slots=True)
class CaptionedImage:
    """One image of a file and its captions; `image_id` is its path under the folder of the images."""

    image_id: str
    split: str
    captions: tuple[str, ...]
    where: str

    @property
    def text(self) -> str:
        """The first caption."""
        return self.captions[0]


def read_images(path: str | Path, splits: Sequence[str]) -> list[CaptionedImage]:
    """The images of some splits of an official file, in its order.

    Raises ValueError, with the file, the image, what must be there and what is, if the file is malformed, an image or
    an id comes twice, or a split has no image; FileNotFoundError if there is no such file.
    """
    content = read_json(path)
    if not isinstance(content, dict) or not isinstance(content.get("images"), list):
        found = sorted(content) if isinstance(content, dict) else type(content).__name__
        raise ValueError(f"{path} must be a JSON object with a list under 'images', got {found}")
    once = {"filename": set(), "imgid": set(), "sentid": set()}
    images = [_image(entry, f"{path}: images[{index}]", once) for index, entry in enumerate(content["images"])]
    present = {image.split for image in images}
    if isinstance(splits, str) or not splits or not set(splits) <= present:
        raise ValueError(f"splits must be some of {sorted(present)}, those of {path}, got {splits!r}")
    return [image for image in images if image.split in splits]


def _image(entry: Any, where: str, once: Mapping[str, set]) -> CaptionedImage:
    fields = pick(entry, {"filename": str, "split": str, "sentences": list, "imgid": int}, where)
    folder = pick(entry, {"filepath": str}, where)["filepath"] if "filepath" in entry else ""
    image_id = f"{folder}/{fields['filename']}" if folder else fields["filename"]
    where = f"{where} ({image_id})"
    if not fields["sentences"]:
        raise ValueError(f"{where} must have at least one of 'sentences', got none")
    _require_new("filename", image_id, once, where)
    _require_new("imgid", fields["imgid"], once, where)
    captions = []
    for index, sentence in enumerate(fields["sentences"]):
        picked = pick(sentence, {"raw": str, "sentid": int}, f"{where}: sentences[{index}]")
        _require_new("sentid", picked["sentid"], once, f"{where}: sentences[{index}]")
        captions.append(picked["raw"])
    return CaptionedImage(image_id, fields["split"], tuple(captions), where)


def _require_new(name: str, value: Any, once: Mapping[str, set], where: str) -> None:
    if value in once[name]:
        raise ValueError(f"{where}: the '{name}' {value} must come once, got it again")
    once[name].add(value)


class RetrievalDataset(TextImageDataset):
    """Captions, each with its image and random captions of other images; batch them with `RetrievalCollator`.

    Args:
        annotations: official file, of all splits.
        images: folder of the images, or of the folders that the file names.
        processor: has `tokenizer` and `image_processor`: a `ViltProcessor`, or a `TextAndImage` of two models'.
        splits: those to take.
        negatives: how many random captions an item has beside its own.
        own_captions: draw them from all captions, as ViLT and METER do, who so call some right ones wrong.
        seed: of the draws. They depend on it, the epoch and the item alone, not on workers or what was drawn before.
        max_length: longest caption in tokens; longer ones are cut.
        cache_images: keep preprocessed images in memory (small data sets).

    Attributes:
        captions: all, those of an image next to each other, in the file's order.
        image_of: for each caption, the index of its image in `entries`.

    An item is a dict: the tokenizer's lists, such as `input_ids`, one of each for the caption and every negative;
    `pixel_values` [3, height, width]; `labels`, 0: the first text is the right one.

    Raises ValueError if the file is malformed or holds captions of one image only; FileNotFoundError if a file or an
    image is missing (checked for all images here); an unreadable image raises ValueError when it is used.
    """

    def __init__(
        self,
        annotations: str | Path,
        images: str | Path,
        processor: Any,
        splits: Sequence[str] = ("train",),
        negatives: int = NEGATIVES,
        own_captions: bool = False,
        seed: int = 0,
        max_length: int = 40,
        cache_images: bool = False,
    ):
        entries = read_images(annotations, splits)
        folder = ImageFolder(Path(images), "{image_id}")
        folder.require(entries, "images")
        super().__init__(entries, folder, processor, max_length, cache_images)
        if negatives < 1:
            raise ValueError(f"negatives must be at least 1, got {negatives}")
        if len(entries) < 2:
            raise ValueError(f"{annotations} must have at least 2 images in {list(splits)}, got {len(entries)}")
        self.captions = [caption for image in entries for caption in image.captions]
        self.image_of = [index for index, image in enumerate(entries) for _ in image.captions]
        self._first = np.cumsum([0, *(len(image.captions) for image in entries)])
        self.negatives, self.own_captions = negatives, own_captions
        self.seed, self.epoch = seed, 0

    def __len__(self) -> int:
        return len(self.captions)

    def __getitem__(self, index: int) -> dict[str, Any]:
        index = range(len(self))[index]
        texts = [self.captions[drawn] for drawn in (index, *self.drawn(index))]
        item = dict(self.processor.tokenizer(texts, truncation=True, max_length=self.max_length))
        item["pixel_values"] = self.pixels_of(self.image_of[index])
        return item | {"labels": 0}

    def pixels_of(self, image: int) -> Tensor:
        """The image `entries[image]` as the processor prepares it, [3, height, width]."""
        return self._pixels(self.entries[image])

    def set_epoch(self, epoch: int) -> None:
        """Other random captions for another epoch. `petl_ext.hf.EpochCallback` calls it, in a loop of your own you do;
        workers that live on from epoch to epoch do not learn of it."""
        self.epoch = epoch

    def drawn(self, index: int) -> list[int]:
        """The indices of an item's random captions in this epoch, drawn independently of each other."""
        rng = np.random.default_rng([self.seed, self.epoch, index])
        if self.own_captions:
            return rng.integers(len(self), size=self.negatives).tolist()
        first, end = self._first[self.image_of[index]], self._first[self.image_of[index] + 1]
        drawn = rng.integers(len(self) - (end - first), size=self.negatives)
        return np.where(drawn < first, drawn, drawn + end - first).tolist()


@dataclass
class RetrievalCollator(ImageTextCollator):
    """Makes a batch of items as `ImageTextCollator` does, but the texts are [batch, 1 + negatives, tokens]."""

    def _texts(self, items: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        counts = {len(item["input_ids"]) for item in items}
        if len(counts) > 1:
            raise ValueError(f"items must have equally many texts, got {sorted(counts)}")
        names = [name for name in self.processor.tokenizer.model_input_names if name in items[0]]
        each = [
            dict(zip(names, text, strict=True))
            for item in items
            for text in zip(*(item[name] for name in names), strict=True)
        ]
        return {name: tensor.unflatten(0, (len(items), -1)) for name, tensor in super()._texts(each).items()}

    def images(self, items: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """The images of items alone, as a batch has them."""
        return self._images([item["pixel_values"] for item in items])


def compute_metrics(prediction: Any) -> dict[str, float]:
    """`compute_metrics` of `transformers.Trainer`: accuracy of `predictions` [n, texts] and `label_ids` [n].

    The right text must score higher than every other one: a model that gives all the same score has 0.
    """
    scores, labels = torch.as_tensor(prediction.predictions), torch.as_tensor(prediction.label_ids)[:, None]
    beaten = scores.gather(1, labels) > scores.scatter(1, labels, -torch.inf)
    return {"accuracy": beaten.all(dim=1).double().mean().item()}


def recalls(scores: Tensor, image_of: Sequence[int]) -> dict[str, float]:
    """Recall at 1, 5 and 10 both ways, in [0, 1], of `scores` [images, captions].

    "TR@k" is the share of images one of whose captions is among the k best (text retrieval), "IR@k" the share of
    captions whose image is among the k best (image retrieval), as ViLT and METER count. A tie counts against the
    model: what scores as high as the right one stands before it.

    Args:
        scores: higher is better.
        image_of: for each caption, the row of its image.

    Raises ValueError if a score is NaN, there is not one image per caption, or an image has no caption.
    """
    images, captions = scores.shape
    image_of = torch.as_tensor(image_of, dtype=torch.long)
    if image_of.shape != (captions,) or not set(image_of.tolist()) == set(range(images)):
        raise ValueError(
            f"image_of must have one of the {images} images for each of {captions} captions, and every image, got "
            f"{len(image_of)} entries of {len(image_of.unique())} images"
        )
    own = scores.gather(0, image_of[None])[0]
    before_caption = torch.zeros(images, dtype=torch.long)
    before_image = torch.full((captions,), -1)  # not the image itself
    for first, rows in _blocks(scores):
        if rows.isnan().any():
            raise ValueError(
                f"scores must be numbers, got NaN for image {first + int(rows.isnan().any(1).nonzero()[0])}"
            )
        right = image_of == torch.arange(first, first + len(rows))[:, None]
        best = rows.masked_fill(~right, -torch.inf).amax(dim=1, keepdim=True)
        before_caption[first : first + len(rows)] = ((rows >= best) & ~right).sum(dim=1)
        before_image += (rows >= own).sum(dim=0)
    found = {f"TR@{k}": (before_caption < k).double().mean().item() for k in RECALLS}
    return found | {f"IR@{k}": (before_image < k).double().mean().item() for k in RECALLS}


def _blocks(scores: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Some rows at a time, with the index of the first: what is compared stays small."""
    for first in range(0, len(scores), ROWS):
        yield first, scores[first : first + ROWS]
