"""Image classification by CLIP: image folders, few shots, base and new classes, prompts of classes, metrics.

    image folder   <folder>/<class>/<anything>.jpg, as torchvision's ImageFolder has it
    prompts        one text per class, "a photo of a {}.": their features are the weights of `models.CLIPClassifier`

k shots are k training images of every class (CoOp, arXiv 2109.01134). For generalization to new classes a model is
trained on the first half of the sorted classes, the base, and tested on either half among its own classes; the harmonic
mean of the two accuracies says whether both are good (CoCoOp, arXiv 2203.05557).
"""

import os
import random
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from petl_ext.printing import listed
from petl_ext.tasks.inputs import IMAGE_SUFFIXES, check_image_files, is_image_file, read_image
from petl_ext.tasks.labels import compute_metrics, require_one_each

__all__ = [
    "BaseAndNew",
    "Draw",
    "ImageClassificationDataset",
    "LabeledImage",
    "accuracy_by_class",
    "base_and_new",
    "class_prompts",
    "compute_metrics",
    "draw_shots",
    "harmonic_mean",
    "images_of",
    "read_image_folder",
]

TEMPLATE = "a photo of a {}."


@dataclass(frozen=True, slots=True)
class LabeledImage:
    """One image of a folder and the class that it shows."""

    path: Path
    class_name: str

    @property
    def image_id(self) -> str:
        """One of its own."""
        return str(self.path)

    @property
    def where(self) -> str:
        """Names the image's class in an error."""
        return f"class {self.class_name!r}"


class Draw(NamedTuple):
    """Images drawn for training, class by class, and all others."""

    shots: list[LabeledImage]
    rest: list[LabeledImage]


class BaseAndNew(NamedTuple):
    """Classes to train on, and classes that training does not see."""

    base: tuple[str, ...]
    new: tuple[str, ...]


def read_image_folder(folder: str | Path) -> list[LabeledImage]:
    """The images in `folder`, those of a class in a folder of its name, at any depth; sorted by class and path.

    Hidden files and folders, at any depth, and files whose name ends in none of `IMAGE_SUFFIXES` are left out. No image
    is opened.

    Raises FileNotFoundError if there is no such folder, ValueError if it has no class, a class has no image, or a link
    leads to a folder that it lies in.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} must be a folder of one folder per class, got no such folder")
    classes = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    if not classes:
        raise ValueError(f"{folder} must hold one folder per class, got none in it")
    return [LabeledImage(path, of_class.name) for of_class in classes for path in _images_in(of_class)]


def _images_in(folder: Path) -> list[Path]:
    images = sorted(path for path in _visible_files(folder) if is_image_file(path))
    if not images:
        raise ValueError(f"{folder} must hold images of the class ({', '.join(IMAGE_SUFFIXES)}), got none")
    return images


def _visible_files(folder: Path) -> Iterator[Path]:
    for parent, folders, files in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for path in (Path(parent, name) for name in folders):
            # Followed, it would give every image many times, some for training and some for testing.
            if path.is_symlink() and any(path.resolve() == above.resolve() for above in path.parents):
                raise ValueError(f"{path} must be a folder of images, got a link to a folder that it lies in")
        yield from (Path(parent, name) for name in files)


def draw_shots(images: Iterable[LabeledImage], shots: int, seed: int) -> Draw:
    """`shots` random images of every class.

    With one seed, a smaller draw is part of a larger one, and what is drawn of a class does not depend on the other
    classes: runs that differ in these differ in nothing else.

    Raises ValueError if `shots` is below 1, or a class has fewer images.
    """
    if shots < 1:
        raise ValueError(f"shots must be at least 1, got {shots}")
    by_class = defaultdict(list)
    for image in images:
        by_class[image.class_name].append(image)
    draw = Draw([], [])
    for name, of_class in sorted(by_class.items()):
        if len(of_class) < shots:
            raise ValueError(f"class {name!r} must have at least {shots} images for {shots} shots, got {len(of_class)}")
        of_class.sort(key=lambda image: image.path)
        random.Random(f"{seed} {name}").shuffle(of_class)
        draw.shots.extend(of_class[:shots])
        draw.rest.extend(of_class[shots:])
    return draw


def base_and_new(classes: Iterable[str]) -> BaseAndNew:
    """The first half of the sorted classes, of an odd number the larger one, and the second.

    Raises ValueError for fewer than four classes: a half with one class leaves nothing to tell apart.
    """
    ordered = sorted(set(classes))
    if len(ordered) < 4:
        raise ValueError(f"classes must be at least 4, two of them base and two new, got {ordered}")
    middle = (len(ordered) + 1) // 2
    return BaseAndNew(tuple(ordered[:middle]), tuple(ordered[middle:]))


def images_of(images: Iterable[LabeledImage], classes: Sequence[str]) -> list[LabeledImage]:
    """Those of `images` that show one of `classes`. Raises ValueError if a class has none."""
    chosen = [image for image in images if image.class_name in classes]
    missing = sorted(set(classes) - {image.class_name for image in chosen})
    if missing:
        raise ValueError(f"classes must have images each, got none of {missing}")
    return chosen


def class_prompts(
    classes: Iterable[str], template: str = TEMPLATE, names: Mapping[str, str] | None = None
) -> dict[str, str]:
    """What a text encoder reads for each class: `template` with the class's name in place of "{}".

    Args:
        classes: as the image folder names them; an underscore is read as a space.
        template: "a centered satellite photo of {}." and the like.
        names: names of the classes where the folders' are none: {"n01440764": "tench"}.

    Raises TypeError if `classes` is a text, ValueError if the template has not one "{}", or `names` lacks a class.
    """
    if isinstance(classes, str):
        raise TypeError(f"classes must be several names, got the text {classes!r}")
    if template.count("{}") != 1:
        raise ValueError(f"template must be a text with one {{}} for the class's name, got {template!r}")
    classes = sorted(set(classes))
    missing = [name for name in classes if names is not None and name not in names]
    if missing:
        raise ValueError(f"names must have one for each of {len(classes)} classes, got none for {missing}")
    known = {name: name.replace("_", " ") for name in classes} if names is None else names
    return {name: template.replace("{}", known[name]) for name in classes}


class ImageClassificationDataset(torch.utils.data.Dataset):
    """Images with their labels; transformers' default collator batches them.

    Args:
        images: of `read_image_folder`, `draw_shots` or `images_of`.
        classes: a class's label is its index in this sequence.
        image_processor: a Hugging Face image processor.
        cache_images: keep preprocessed images in memory (few shots, small images).

    An item is a dict: `pixel_values` [3, height, width] and `labels`, an int.

    Raises ValueError if there are no images, or one shows a class that is not in `classes`; an unreadable image raises
    ValueError when it is used.
    """

    def __init__(
        self,
        images: Sequence[LabeledImage],
        classes: Sequence[str],
        image_processor: Any,
        cache_images: bool = False,
    ):
        self.images, self.classes, self.image_processor = list(images), tuple(classes), image_processor
        self.label = {name: label for label, name in enumerate(self.classes)}
        if not self.images:
            raise ValueError("images must be at least one, got none")
        unknown = next((image for image in self.images if image.class_name not in self.label), None)
        if unknown is not None:
            raise ValueError(
                f"{unknown.path} must be of one of the {len(self.classes)} classes {listed(self.classes)}, "
                f"got {unknown.class_name!r}"
            )
        self._cache = {} if cache_images else None

    @property
    def entries(self) -> list[LabeledImage]:
        """The images."""
        return self.images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Any]:
        image = self.images[index]
        return {"pixel_values": self._pixels(image), "labels": self.label[image.class_name]}

    def check_images(self, num_workers: int = 0, progress: bool = True) -> None:
        """Decodes every image once; see `inputs.check_image_files`."""
        check_image_files([(image.path, image.where) for image in self.images], num_workers, progress)

    def _pixels(self, image: LabeledImage) -> Tensor:
        if self._cache is None:
            return self._read_pixels(image)
        if image.path not in self._cache:
            self._cache[image.path] = self._read_pixels(image)
        return self._cache[image.path]

    def _read_pixels(self, image: LabeledImage) -> Tensor:
        opened = read_image(image.path, image.where)
        return self.image_processor(opened, return_tensors="pt")["pixel_values"][0]


def accuracy_by_class(logits: Tensor, labels: Tensor, classes: Sequence[str]) -> dict[str, float]:
    """Share of each class's images that are recognized, classes without an image left out.

    Args:
        logits: [n, classes].
        labels: [n], indices into `classes`.

    Raises ValueError if the sizes differ.
    """
    logits, labels = torch.as_tensor(logits), torch.as_tensor(labels)
    require_one_each(labels, logits, ("labels", "row of logits"))
    if logits.ndim != 2 or logits.shape[1] != len(classes):
        raise ValueError(f"logits must have shape [n, {len(classes)}], got {list(logits.shape)}")
    labels = labels.tolist()
    counts = Counter(labels)
    right = Counter(label for label, best in zip(labels, logits.argmax(dim=1).tolist(), strict=True) if label == best)
    return {name: right[label] / counts[label] for label, name in enumerate(classes) if counts[label]}


def harmonic_mean(base: float, new: float) -> float:
    """2 base new / (base + new) of two accuracies; 0 if both are 0."""
    return 2 * base * new / (base + new) if base + new else 0.0
