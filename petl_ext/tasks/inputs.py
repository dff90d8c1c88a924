"""A text and an image as a model's inputs: data sets of them, and batches."""

import os
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Protocol

import torch
from torch import Tensor

if TYPE_CHECKING:
    import PIL.Image

IMAGE_SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")


@dataclass(frozen=True)
class TextAndImage:
    """A tokenizer and an image processor of different models as one processor, such as DVP's: BERT's and CLIP's.

    Wherever a task asks for a `processor`, this and a Hugging Face processor of both are equally good.
    """

    tokenizer: Any
    image_processor: Any


class Entry(Protocol):
    """One row of a task's file: a text, the image it is about, and the words that name the row in an error."""

    image_id: int | str

    @property
    def text(self) -> str: ...

    @property
    def where(self) -> str: ...


class ImageFile(Protocol):
    """What an image is read from: a `Path`, or a part of another file; `str` of it names it in an error."""

    def open(self, mode: str) -> BinaryIO: ...


class Images(Protocol):
    """Knows where the image of an entry is: an `ImageFolder`, or a file with all images in it."""

    def of(self, entry: Entry) -> ImageFile: ...


class TextImageDataset(torch.utils.data.Dataset):
    """The entries of a task's file as items: a text, cut after `max_length` tokens, and an image as the processor
    prepares it; a subclass adds the labels.

    Args:
        entries: in the file's order.
        images: knows where theirs are.
        processor: has `tokenizer` and `image_processor`: a Hugging Face processor of both, or a `TextAndImage`.
        max_length: longest text in tokens; longer ones are cut.
        cache_images: keep preprocessed images in memory (small data sets).

    An item is a dict: the tokenizer's lists, `pixel_values` [3, height, width], and `labels` where there are any.

    Raises ValueError naming file and entry when an image is used that cannot be decoded; `check_images` tries them all.
    """

    def __init__(
        self, entries: Sequence[Entry], images: Images, processor: Any, max_length: int, cache_images: bool = False
    ):
        self.entries, self.images = entries, images
        self.processor, self.max_length = processor, max_length
        self.cache_images, self._cache = cache_images, {}

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, index: int) -> dict[str, Any]:
        entry = self.entries[index]
        item = dict(self.processor.tokenizer(self._text(entry), truncation=True, max_length=self.max_length))
        item["pixel_values"] = self._pixels(entry)
        labels = self._labels(index)
        return item if labels is None else item | {"labels": labels}

    def _text(self, entry: Entry) -> str:
        """What the tokenizer is given."""
        return entry.text

    def _labels(self, index: int) -> Any:
        """What stands under "labels" in an item; None for nothing."""

    def check_images(self, num_workers: int = 0, progress: bool = True) -> None:
        """Decodes every image once, before training rather than after hours of it.

        Args:
            num_workers: processes that decode.
            progress: show a bar.

        Raises ValueError naming the first that cannot be decoded, and how many there are.
        """
        pictured = [one for entry in self.entries for one in self._pictured(entry)]
        check_image_files([(self.images.of(one), one.where) for one in pictured], num_workers, progress)

    def _pictured(self, entry: Entry) -> Sequence[Entry]:
        """What of an entry has an image: itself."""
        return (entry,)

    def _pixels(self, entry: Entry) -> Tensor:
        if not self.cache_images:
            return self._read_pixels(entry)
        if entry.image_id not in self._cache:
            self._cache[entry.image_id] = self._read_pixels(entry)
        return self._cache[entry.image_id]

    def _read_pixels(self, entry: Entry) -> Tensor:
        image = read_image(self.images.of(entry), entry.where)
        return self.processor.image_processor(image, return_tensors="pt")["pixel_values"][0]


@dataclass
class _Decoded(torch.utils.data.Dataset):
    """Of each image what is wrong with it, None for nothing."""

    files: Sequence[tuple[ImageFile, str]]

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> str | None:
        try:
            read_image(*self.files[index])
        except ValueError as error:
            return str(error)


def check_image_files(files: Sequence[tuple[ImageFile, str]], num_workers: int = 0, progress: bool = True) -> None:
    """Decodes every image once.

    Args:
        files: of each image the file and the words that name it in an error; a file that comes twice is read once.
        num_workers: processes that decode.
        progress: show a bar.

    Raises ValueError naming the first that cannot be decoded, and how many there are.
    """
    from tqdm.auto import tqdm

    decoded = _Decoded(list({str(file): (file, where) for file, where in files}.values()))
    loader = torch.utils.data.DataLoader(decoded, num_workers=num_workers, collate_fn=list, generator=torch.Generator())
    with tqdm(loader, desc="images", unit="image", disable=not progress) as bar:
        broken = [error for errors in bar for error in errors if error is not None]
    if broken:
        raise ValueError(f"{broken[0]} ({len(broken)} of {len(decoded)} images cannot be decoded)")


def is_image_file(path: Path) -> bool:
    """Whether it ends in one of `IMAGE_SUFFIXES` and is not hidden, as the "._a.jpg" that macOS writes is."""
    return path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".")


def read_image(file: ImageFile, where: str) -> "PIL.Image.Image":
    """The RGB image in `file`, turned as its EXIF orientation says.

    Raises ValueError naming the file and, in brackets, `where` if it cannot be decoded.
    """
    from PIL import Image, ImageOps

    try:
        with file.open("rb") as stream, Image.open(stream) as opened:
            if opened.mode.startswith(("I", "F")):
                raise ValueError(f"more than 8 bits per channel (mode {opened.mode}), which Pillow would cut at 255")
            return ImageOps.exif_transpose(opened).convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{file} must be an image ({where}), got a file that cannot be decoded: {error}") from error


@dataclass(frozen=True)
class ImageFolder:
    """Images in a folder; `name` makes a file name of an `image_id`: "{image_id}.jpg".

    Raises ValueError if `name` holds no {image_id}, or another field.
    """

    folder: Path
    name: str

    def __post_init__(self):
        expected = 'image_name must be a file name with {image_id} in it, such as "{image_id}.jpg"'
        try:
            fields = {field for _, field, _, _ in string.Formatter().parse(self.name) if field is not None}
        except ValueError as error:
            raise ValueError(f"{expected}, got {self.name!r}: {error}") from error
        if fields != {"image_id"}:
            raise ValueError(f"{expected}, and no other field, got {self.name!r}")

    def of(self, entry: Entry) -> Path:
        """Where the entry's image is. Raises ValueError if its `image_id` does not fit the file name's format."""
        try:
            return self.folder / self.name.format(image_id=entry.image_id)
        except ValueError as error:
            raise ValueError(
                f"image_name must fit every image_id, {entry.image_id!r} ({entry.where}) too, "
                f"got {self.name!r}: {error}"
            ) from error

    def require(self, entries: Sequence[Entry], plural: str) -> None:
        """Raises FileNotFoundError naming the first of `entries` whose image is missing, and how many there are.

        One listing of each folder finds a missing image now rather than after hours of training.
        """
        if not self.folder.is_dir():
            raise FileNotFoundError(f"{self.folder} must be the folder of the images, got no such folder")
        names = cache(_names_in)
        missing = [entry for entry in entries if (path := self.of(entry)).name not in names(path.parent)]
        if missing:
            raise FileNotFoundError(
                f"{self.of(missing[0])} must be the image of {missing[0].where} "
                f"({len(missing)} of {len(entries)} {plural} lack theirs), got no such file"
            )


def _names_in(folder: Path) -> frozenset[str]:
    return frozenset(entry.name for entry in os.scandir(folder)) if folder.is_dir() else frozenset()


@dataclass
class ImageTextCollator:
    """Makes a batch of a task's items: text padded by the tokenizer, images by zeros below and to the right.

    Adds `pixel_mask` [batch, height, width], 1 on the image and 0 on padding, where the image processor names it among
    its outputs, as ViLT's does; others must make images of one size. `labels` are stacked: soft scores [batch, answers]
    or integers [batch].

    Args:
        processor: that of the items.
        text_length: pads every text to so many tokens; None pads to the longest of the batch. It matters where a model
            averages over padding, as DVP on T5 does (16 tokens).

    Raises ValueError if images differ in size and there is no `pixel_mask`, or if a text exceeds `text_length`.
    """

    processor: Any
    text_length: int | None = None

    def __call__(self, items: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        batch = self._texts(items) | self._images([item["pixel_values"] for item in items])
        if "labels" in items[0]:
            batch["labels"] = torch.stack([torch.as_tensor(item["labels"]) for item in items])
        return batch

    def _texts(self, items: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        tokenizer = self.processor.tokenizer
        texts = [{name: item[name] for name in tokenizer.model_input_names if name in item} for item in items]
        if self.text_length is None:
            return dict(tokenizer.pad(texts, return_tensors="pt"))
        longest = max(len(text["input_ids"]) for text in texts)
        if longest > self.text_length:
            raise ValueError(f"text_length must be at least {longest}, the longest text, got {self.text_length}")
        return dict(tokenizer.pad(texts, padding="max_length", max_length=self.text_length, return_tensors="pt"))

    def _images(self, images: list[Tensor]) -> dict[str, Tensor]:
        sizes = {tuple(image.shape[1:]) for image in images}
        masked = "pixel_mask" in self.processor.image_processor.model_input_names
        if not masked and len(sizes) > 1:
            raise ValueError(f"images must have one size for a processor without 'pixel_mask', got {sorted(sizes)}")
        height, width = (max(size[axis] for size in sizes) for axis in (0, 1))
        pixels = images[0].new_zeros(len(images), images[0].shape[0], height, width)
        mask = torch.zeros(len(images), height, width, dtype=torch.long)
        for row, image in enumerate(images):
            pixels[row, :, : image.shape[1], : image.shape[2]] = image
            mask[row, : image.shape[1], : image.shape[2]] = 1
        return {"pixel_values": pixels} | ({"pixel_mask": mask} if masked else {})
