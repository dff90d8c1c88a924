"""NLVR2: is a sentence true of two images. Dataset, metrics and predictions file, on the official files.

Formats and evaluation: github.com/lil-lab/nlvr, folder nlvr2.

    {train,dev,test1}.json  one object a line: {"identifier", "sentence", "label", "directory" (train), ...}
    identifier              "train-10171-0-1": split, set of eight images, pair in the set, sentence about the set
    images                  train-10171-0-img0.png (left) and -img1.png (right); the archive of train has them in
                            folders, which "directory" names
    predictions file        train-10171-0-1,True: one line each, no header

The models are transformers' `ViltForImagesAndTextClassification` (num_images=2, modality_type_vocab_size=3) and
`petl_ext.models.MeterForImagesAndTextClassification`.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from petl_ext.tasks.files import pick, read_json_lines, write_text
from petl_ext.tasks.inputs import ImageFolder, ImageTextCollator, TextImageDataset
from petl_ext.tasks.labels import LabelVocabulary, compute_metrics, label_loss, require_one_each, share_equal

__all__ = [
    "LABELS",
    "Example",
    "NLVR2Collator",
    "NLVR2Dataset",
    "PairImage",
    "accuracy",
    "compute_metrics",
    "consistency",
    "label_loss",
    "read_examples",
    "read_predictions",
    "write_predictions",
]

LABELS = LabelVocabulary(("False", "True"))  # the labels 0 and 1 of ViLT and METER
SIDES = ("left", "right")
IDENTIFIER_PARTS = 4


@dataclass(frozen=True, slots=True)
class PairImage:
    """One of the two images of an example."""

    image_id: str
    directory: str
    where: str

    @property
    def text(self) -> str:
        """None of its own."""
        return ""


@dataclass(frozen=True, slots=True)
class Example:
    """One row: a sentence, two images and whether the sentence is true of them."""

    line: int
    identifier: str
    sentence: str
    label: str
    directory: str = ""

    @property
    def image_id(self) -> str:
        """Of both images together: the identifier without the sentence's number."""
        return self.identifier.rpartition("-")[0]

    @property
    def images(self) -> tuple[PairImage, PairImage]:
        """The left and the right one."""
        return tuple(
            PairImage(f"{self.image_id}-img{number}", self.directory, f"{self.where}, {side}")
            for number, side in enumerate(SIDES)
        )

    @property
    def sentence_id(self) -> tuple[str, ...]:
        """What all examples about one sentence have in common: the identifier without the pair's number."""
        split, image_set, _, sentence = self.identifier.split("-")
        return split, image_set, sentence

    @property
    def text(self) -> str:
        """What a model reads."""
        return self.sentence

    @property
    def where(self) -> str:
        """Names the example in an error."""
        return f"identifier {self.identifier}, line {self.line}"


def read_examples(path: str | Path) -> list[Example]:
    """The examples of an official file, in its order.

    Raises ValueError, with the file, the line, what must be there and what is, if the file is malformed or empty or an
    identifier comes twice; FileNotFoundError if there is no such file.
    """
    examples = {}
    for number, (where, entry) in enumerate(read_json_lines(path), start=1):
        example = _example(number, entry, where)
        if example.identifier in examples:
            first = examples[example.identifier].line
            raise ValueError(f"{where}: identifier {example.identifier} must come once, got it in line {first} too")
        examples[example.identifier] = example
    if not examples:
        raise ValueError(f"{path} must have at least one line, got an empty file")
    return list(examples.values())


def _example(line: int, entry: Any, where: str) -> Example:
    fields = pick(entry, dict.fromkeys(("identifier", "sentence", "label"), str), where)
    if len(fields["identifier"].split("-")) != IDENTIFIER_PARTS:
        raise ValueError(f"{where}: 'identifier' must be split-set-pair-sentence, got {fields['identifier']!r}")
    if fields["label"] not in LABELS.index:
        raise ValueError(f"{where}: 'label' must be one of {list(LABELS.answers)}, got {fields['label']!r}")
    return Example(line, **fields, directory=str(entry.get("directory", "")))


@dataclass(frozen=True)
class _PairFolder(ImageFolder):
    """Images in a folder, or in those folders of it that their examples name."""

    directories: frozenset[str] = field(default_factory=frozenset)

    @classmethod
    def of_examples(cls, folder: Path, name: str, examples: Iterable[Example]) -> "_PairFolder":
        named = {example.directory for example in examples} - {""}
        return cls(folder, name, frozenset(directory for directory in named if (folder / directory).is_dir()))

    def of(self, entry: PairImage) -> Path:
        path = super().of(entry)
        return path.parent / entry.directory / path.name if entry.directory in self.directories else path


class NLVR2Dataset(TextImageDataset):
    """Sentences about two images; batch them with `NLVR2Collator`.

    Args:
        examples: official file of a split.
        images: folder of the images, be they in it or in the folders that the file names.
        processor: has `tokenizer` and `image_processor`: a `ViltProcessor`, or a `TextAndImage` of two models'.
        image_name: file name of an image; its `image_id` is the official name without ".png".
        max_length: longest sentence in tokens; longer ones are cut.
        cache_images: keep preprocessed images in memory (small data sets).

    An item is a dict: the tokenizer's lists, such as `input_ids` and `attention_mask`; `pixel_values`, the left and the
    right image, [3, height, width] each; `labels`, the int of `LABELS`.

    Raises ValueError if the file is malformed; FileNotFoundError if a file or an image is missing (checked for all
    images here); an unreadable image raises ValueError when it is used.
    """

    def __init__(
        self,
        examples: str | Path,
        images: str | Path,
        processor: Any,
        image_name: str = "{image_id}.png",
        max_length: int = 40,
        cache_images: bool = False,
    ):
        self.examples = read_examples(examples)
        folder = _PairFolder.of_examples(Path(images), image_name, self.examples)
        folder.require([image for example in self.examples for image in example.images], "sides")
        super().__init__(self.examples, folder, processor, max_length, cache_images)

    def _labels(self, index: int) -> int:
        return LABELS.index[self.examples[index].label]

    def _read_pixels(self, entry: Example) -> list[Tensor]:
        return [super(NLVR2Dataset, self)._read_pixels(image) for image in self._pictured(entry)]

    def _pictured(self, entry: Example) -> tuple[PairImage, PairImage]:
        return entry.images


@dataclass
class NLVR2Collator(ImageTextCollator):
    """Makes a batch of items as `ImageTextCollator` does, but `pixel_values` are [batch, 2, 3, height, width] and
    `pixel_mask`, if any, [batch, 2, height, width]."""

    def _images(self, images: list[list[Tensor]]) -> dict[str, Tensor]:
        each = super()._images([image for pair in images for image in pair])
        return {name: tensor.unflatten(0, (len(images), len(SIDES))) for name, tensor in each.items()}


def accuracy(predicted: Sequence[str], examples: Sequence[Example]) -> float:
    """Share of `predicted` labels that are right, in upper or lower case; the official script calls it precision.

    Raises ValueError if the lengths differ or a label is none.
    """
    return share_equal(_checked(predicted, examples), [example.label for example in examples])


def consistency(predicted: Sequence[str], examples: Sequence[Example]) -> float:
    """Share of sentences whose every example is predicted rightly. Raises what `accuracy` raises."""
    consistent = {}
    for label, example in zip(_checked(predicted, examples), examples, strict=True):
        right = label == example.label
        consistent[example.sentence_id] = right and consistent.get(example.sentence_id, True)
    return sum(consistent.values()) / len(consistent) if consistent else float("nan")


def _checked(predicted: Sequence[str], examples: Sequence[Example]) -> list[str]:
    """Labels as `LABELS` has them: the official script compares them in lower case."""
    require_one_each(predicted, examples, ("predicted", "example"))
    return [_label(label, "predicted") for label in predicted]


def _label(given: str, where: str) -> str:
    label = given.capitalize()
    if label not in LABELS.index:
        raise ValueError(f"{where} must be one of the labels {list(LABELS.answers)}, got {given!r}")
    return label


def write_predictions(path: str | Path, examples: Sequence[Example], predicted: Sequence[str]) -> None:
    """Writes the official predictions file whole or not at all. Raises what `accuracy` raises."""
    pairs = zip(examples, _checked(predicted, examples), strict=True)
    write_text(path, "".join(f"{example.identifier},{label}\n" for example, label in pairs))


def read_predictions(path: str | Path, examples: Sequence[Example]) -> list[str]:
    """The labels that an official predictions file has for `examples`, in their order; it may have more.

    Raises ValueError, with file and line, if a line is malformed or an identifier comes twice, or if an example has no
    prediction.
    """
    found: Mapping[str, str] = {}
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), start=1):
        where = f"{path}: line {number}"
        identifier, comma, label = line.partition(",")
        if not comma:
            raise ValueError(f"{where} must be an identifier, a comma and a label, got {line!r}")
        if identifier in found:
            raise ValueError(f"{where}: identifier {identifier} must come once, got it again")
        found[identifier] = _label(label.strip(), where)
    missing = [example for example in examples if example.identifier not in found]
    if missing:
        raise ValueError(
            f"{path} must have a line for {missing[0].where}, got none; {len(missing)} of {len(examples)} are missing"
        )
    return [found[example.identifier] for example in examples]
