"""SNLI-VE, visual entailment: dataset and metrics, on the official files and on OFA's.

    official jsonl (github.com/necla-ml/SNLI-VE), one object a line
        {"Flickr30K_ID", "gold_label", "sentence2", "pairID", ...}; images <Flickr30K_ID>.jpg of Flickr30k in a folder
    OFA's tsv (github.com/OFA-Sys/OFA, datasets.md), no header, no quoting
        unique id, image id, base64 of the image file, hypothesis, caption, label

Only the hypothesis is read, never the caption that SNLI took for its premise: the image is the premise here.
"""

import base64
import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from petl_ext.tasks.files import pick, refuse_byte_order_mark
from petl_ext.tasks.inputs import ImageFolder, ImageTextCollator, TextImageDataset
from petl_ext.tasks.labels import LabelVocabulary, compute_metrics, label_loss, require_one_each, share_equal

__all__ = [
    "LABELS",
    "Pair",
    "Pairs",
    "SNLIVECollator",
    "SNLIVEDataset",
    "accuracy",
    "compute_metrics",
    "confusion",
    "label_loss",
    "read_pairs",
]

SNLIVECollator = ImageTextCollator  # batches the items of SNLIVEDataset

LABELS = LabelVocabulary(("contradiction", "neutral", "entailment"))  # the labels 0, 1, 2 of DVP's models
SYNONYMS = {"maybe": "neutral"}
NO_LABEL = "-"  # the annotators did not agree
IMAGE_ID_FIELDS = ("Flickr30K_ID", "Flikr30kID")  # the second, with ".jpg" in it, in early files
TSV_COLUMNS = ("unique id", "image id", "base64 image", "hypothesis", "caption", "label")
URLSAFE_TO_STANDARD = bytes.maketrans(b"-_", b"+/")


@dataclass(frozen=True, slots=True)
class Pair:
    """One row: an image and a hypothesis about it; `image` is where a tsv has its image: (first byte, bytes)."""

    line: int
    pair_id: str
    image_id: str
    hypothesis: str
    label: str
    image: tuple[int, int] | None = None

    @property
    def text(self) -> str:
        """What a model reads."""
        return self.hypothesis

    @property
    def where(self) -> str:
        """Names the pair in an error."""
        return f"image_id {self.image_id}, pair {self.pair_id}, line {self.line}"


@dataclass(frozen=True)
class Pairs:
    """The labeled rows of a file, in its order, and the number of rows that were left out for their label "-"."""

    labeled: list[Pair]
    left_out: int


def read_pairs(path: str | Path) -> Pairs:
    """The rows of an official .jsonl or of a .tsv as OFA's, of whose images only where they are in the file is kept.

    A tsv is read once from end to end. Raises ValueError, with the file, the line, what must be there and what is, if
    the file is malformed, empty, or neither .jsonl nor .tsv, or a pair of a .jsonl comes twice; FileNotFoundError if
    there is no such file.
    """
    path = Path(path)
    if path.suffix not in _PARSERS:
        raise ValueError(f"{path} must be a file whose name ends in one of {sorted(_PARSERS)}, got {path.suffix!r}")
    rows = [
        _PARSERS[path.suffix](line, number, start, f"{path}: line {number}") for number, start, line in _lines(path)
    ]
    if not rows:
        raise ValueError(f"{path} must have at least one line, got an empty file")
    lines = {}
    for row in rows if path.suffix == ".jsonl" else ():  # a tsv's ids serve errors alone
        if lines.setdefault(row.pair_id, row.line) != row.line:
            raise ValueError(
                f"{path}: line {row.line}: pair {row.pair_id} must come once, got it in line {lines[row.pair_id]}"
            )
    labeled = [row for row in rows if row.label != NO_LABEL]
    return Pairs(labeled, len(rows) - len(labeled))


def _lines(path: Path) -> Iterator[tuple[int, int, bytes]]:
    """Number, from 1, first byte, and content of each line."""
    start = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            refuse_byte_order_mark(line, f"{path}: line {number}")
            yield number, start, line.rstrip(b"\r\n")
            start += len(line)


def _parse_json(line: bytes, number: int, start: int, where: str) -> Pair:
    try:
        entry = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{where} must be a JSON object, got a line that does not parse: {error}") from error
    fields = pick(entry, {"pairID": str, "gold_label": str, "sentence2": str}, where)
    name = next((name for name in IMAGE_ID_FIELDS if name in entry), IMAGE_ID_FIELDS[0])
    image_id = pick(entry, {name: str}, where)[name].removesuffix(".jpg")
    where = f"{where} (pair {fields['pairID']})"
    return Pair(number, fields["pairID"], image_id, fields["sentence2"], _label(fields["gold_label"], where))


def _parse_tsv(line: bytes, number: int, start: int, where: str) -> Pair:
    columns = line.split(b"\t")
    if len(columns) != len(TSV_COLUMNS):
        raise ValueError(
            f"{where} must have {len(TSV_COLUMNS)} columns ({', '.join(TSV_COLUMNS)}), got {len(columns)}, "
            f"the first {columns[0][:40]!r}"
        )
    try:
        pair_id, image_id, hypothesis, label = (columns[index].decode("utf-8") for index in (0, 1, 3, 5))
    except UnicodeDecodeError as error:
        raise ValueError(f"{where} must be UTF-8, got {error.object[:40]!r}: {error}") from error
    image = (start + len(columns[0]) + len(columns[1]) + 2, len(columns[2]))
    return Pair(number, pair_id, image_id, hypothesis, _label(label, f"{where} (pair {pair_id})"), image)


_PARSERS = {".jsonl": _parse_json, ".tsv": _parse_tsv}


def _label(given: str, where: str) -> str:
    label = SYNONYMS.get(given, given)
    if label not in LABELS.index and label != NO_LABEL:
        known = [*LABELS.answers, *SYNONYMS, NO_LABEL]
        raise ValueError(f"{where} must be one of the labels {known}, got {given!r}")
    return label


@dataclass(frozen=True)
class _ImagesInTsv:
    """The images of a tsv."""

    path: Path

    def of(self, pair: Pair) -> "_ImageInTsv":
        return _ImageInTsv(self.path, pair.line, *pair.image)


@dataclass(frozen=True)
class _ImageInTsv:
    """An image in base64, URL-safe as OFA reads it or standard, somewhere in a tsv."""

    path: Path
    line: int
    start: int
    length: int

    def __str__(self) -> str:
        return f"{self.path}: line {self.line}"

    def open(self, mode: str) -> BinaryIO:
        """The image file's bytes. The tsv is opened each time, so that a data loader's workers share no position in
        it."""
        with self.path.open(mode) as file:
            file.seek(self.start)
            encoded = file.read(self.length).translate(URLSAFE_TO_STANDARD)
        return io.BytesIO(base64.b64decode(encoded, validate=True))


class SNLIVEDataset(TextImageDataset):
    """Hypotheses about images; batch them with `SNLIVECollator`.

    Args:
        pairs: official .jsonl file, or a .tsv as OFA's.
        images: folder of the images; None for a .tsv, which has them inside.
        processor: has `tokenizer` and `image_processor`: a `ViltProcessor`, or a `TextAndImage` of two models'.
        image_name: file name of an image, from its `image_id`.
        max_length: longest hypothesis in tokens; longer ones are cut.
        cache_images: keep preprocessed images in memory (small data sets).

    An item is a dict: the tokenizer's lists, such as `input_ids` and `attention_mask`; `pixel_values` [3, height,
    width]; `labels`, the int of `LABELS`. `left_out` is the number of rows without a label.

    Raises ValueError if the file is malformed or `images` does not fit its format; FileNotFoundError if a file or an
    image is missing (checked for all images here); an unreadable image raises ValueError when it is used.
    """

    def __init__(
        self,
        pairs: str | Path,
        images: str | Path | None,
        processor: Any,
        image_name: str = "{image_id}.jpg",
        max_length: int = 40,
        cache_images: bool = False,
    ):
        path = Path(pairs)
        read = read_pairs(path)
        self.pairs, self.left_out = read.labeled, read.left_out
        inside = path.suffix == ".tsv"
        if inside != (images is None):
            expected = "None for a .tsv, which has its images inside" if inside else "the folder of the images"
            raise ValueError(f"images must be {expected}, got {images}")
        source = _ImagesInTsv(path) if inside else ImageFolder(Path(images), image_name)
        if not inside:
            source.require(self.pairs, "pairs")
        super().__init__(self.pairs, source, processor, max_length, cache_images)

    def _labels(self, index: int) -> int:
        return LABELS.index[self.pairs[index].label]


def accuracy(predicted: Sequence[str], pairs: Sequence[Pair]) -> float:
    """Share of `predicted` labels that are right. Raises ValueError if the lengths differ or a label is none."""
    _require_labels(predicted, pairs)
    return share_equal(predicted, [pair.label for pair in pairs])


def confusion(predicted: Sequence[str], pairs: Sequence[Pair]) -> dict[str, dict[str, int]]:
    """How often pairs of a label were predicted to be of another: `confusion(...)[label][predicted]`.

    Raises ValueError if the lengths differ or a label is none.
    """
    _require_labels(predicted, pairs)
    counts = {label: dict.fromkeys(LABELS.answers, 0) for label in LABELS.answers}
    for label, pair in zip(predicted, pairs, strict=True):
        counts[pair.label][label] += 1
    return counts


def _require_labels(predicted: Sequence[str], pairs: Sequence[Pair]) -> None:
    require_one_each(predicted, pairs, ("predicted", "pair"))
    unknown = [label for label in predicted if label not in LABELS.index]
    if unknown:
        raise ValueError(f"predicted must be labels of {LABELS.answers}, got {unknown[0]!r}")
