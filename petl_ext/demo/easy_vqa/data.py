"""easy-VQA (github.com/vzhou842/easy-VQA), questions about pictures of one colored shape, and the pictures' tokens.

The package's own split: of what it calls train, the last pictures are held out for validation.
"""

import json
import re
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm.auto import tqdm

from petl_ext.demo.packages import EASY_VQA, EFFICIENTNET
from petl_ext.saving import written_whole
from petl_ext.tasks.labels import LabelVocabulary, TypeAccuracy

NUM_PICTURES = {"train": 4000, "test": 1000}  # in the package
PIXELS = 96  # to which a picture of 64 is enlarged: EfficientNet then makes 3 x 3 tokens of it
MEAN, SCALE = 127.0, 128.0  # of EfficientNet-lite's pixels
ENCODED_AT_ONCE = 50
SHAPE = re.compile(r"\b(circle|triangle|rectangle)\b")
TYPES = ("which color", "which shape", "yes or no: color", "yes or no: shape")


@dataclass(frozen=True)
class Split:
    """n questions, one a row.

    Attributes:
        texts: index of the text [n], into `EasyVQA.texts`.
        pictures: index of the picture [n], into `tokens`.
        labels: [n], into the vocabulary.
        types: index of the type [n], into TYPES.
        tokens: EfficientNet's of each picture [pictures, N, Dv].
    """

    texts: Tensor
    pictures: Tensor
    labels: Tensor
    types: Tensor
    tokens: Tensor

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, rows):
        """The questions of these rows, a tensor or a slice."""
        return replace(self, **{name: getattr(self, name)[rows] for name in ("texts", "pictures", "labels", "types")})

    def with_other_pictures(self):
        """Each question with the picture of another one, half the split further on."""
        return replace(self, pictures=self.pictures.roll(len(self) // 2))

    def accuracy_by_type(self, answers):
        """{type: `TypeAccuracy`} of answers [n], labels."""
        right, found = (answers == self.labels).double(), {}
        for index, name in enumerate(TYPES):
            of_type = self.types == index
            count = int(of_type.sum())
            if count:
                commonest = Counter(self.labels[of_type].tolist()).most_common(1)[0][1]
                found[name] = TypeAccuracy(count, right[of_type].mean().item(), commonest / count)
        return found


@dataclass(frozen=True)
class EasyVQA:
    """The data of a run.

    Attributes:
        texts: all different questions.
        splits: {"train", "val", "test": `Split`}; over the pictures of train each number of a token has mean 0 and
            standard deviation 1.
    """

    texts: tuple
    vocabulary: LabelVocabulary
    splits: dict

    @property
    def visual_dim(self):
        """Dv."""
        return self.splits["train"].tokens.size(2)


def read(output, pictures, progress=True):
    """The `EasyVQA` of so many pictures.

    Args:
        output: folder for EfficientNet's tokens, which an earlier run may have left there.
        pictures: {"train", "val", "test": how many}; the first of train and of test, and the last of train.
        progress: shows a bar while pictures are encoded.

    Raises:
        ModuleNotFoundError: a package is not installed.
        ValueError: a file of one is not the known one, or it has too few pictures.
    """
    held_out = NUM_PICTURES["train"] - pictures["val"]
    if pictures["train"] > held_out or pictures["test"] > NUM_PICTURES["test"]:
        most = {"train and val": NUM_PICTURES["train"], "test": NUM_PICTURES["test"]}
        raise ValueError(f"pictures must be at most {most}, got {pictures}")
    parts = {"train": ("train", 0), "val": ("train", held_out), "test": ("test", 0)}
    questions = {part: _questions(part) for part in NUM_PICTURES}
    texts = tuple(sorted({text for rows in questions.values() for text, _, _ in rows}))
    vocabulary = LabelVocabulary(sorted({answer for _, answer, _ in questions["train"]}))
    splits = {}
    for name, (part, first) in parts.items():
        chosen = range(first, first + pictures[name])
        rows = [(text, answer, picture - first) for text, answer, picture in questions[part] if picture in chosen]
        splits[name] = _split(rows, _tokens(Path(output), part, chosen, progress), texts, vocabulary)
    mean = splits["train"].tokens.mean((0, 1))
    deviation = splits["train"].tokens.std((0, 1)).clamp(min=1e-3)
    standardized = {name: replace(split, tokens=(split.tokens - mean) / deviation) for name, split in splits.items()}
    return EasyVQA(texts, vocabulary, standardized)


def _questions(part):
    return json.loads(EASY_VQA.path(f"data/{part}/questions.json").read_text(encoding="utf-8"))


def _split(rows, tokens, texts, vocabulary):
    text_of = {text: index for index, text in enumerate(texts)}
    return Split(
        texts=torch.tensor([text_of[text] for text, _, _ in rows]),
        pictures=torch.tensor([picture for _, _, picture in rows]),
        labels=torch.tensor([vocabulary.index[answer] for _, answer, _ in rows]),
        types=torch.tensor([_type_of(text) for text, _, _ in rows]),
        tokens=tokens,
    )


def _type_of(text):
    if text.startswith("what"):
        return TYPES.index("which color" if "color" in text else "which shape")
    return TYPES.index("yes or no: shape" if SHAPE.search(text) else "yes or no: color")


def _tokens(output, part, pictures, progress):
    """The tokens of the pictures of a range, as an earlier run left them or made now, in float16 in the file."""
    file = output / f"easy-vqa-tokens-{part}-{pictures.start}-{pictures.stop}-{PIXELS}.safetensors"
    if not file.exists():
        encoder, folder = Encoder(), EASY_VQA.folder / "data" / part / "images"
        files = [folder / f"{index}.png" for index in pictures]
        starts = tqdm(range(0, len(files), ENCODED_AT_ONCE), desc=f"pictures of {part}", disable=not progress)
        tokens = torch.cat([encoder(files[start : start + ENCODED_AT_ONCE]).half() for start in starts])
        with written_whole(file) as unfinished:
            save_file({"tokens": tokens}, unfinished)
    return load_file(file)["tokens"].float()


class Encoder:
    """EfficientNet-lite0, trained on ImageNet, without its head."""

    def __init__(self):
        from efficientnet_lite_pytorch import EfficientNet

        weights = torch.load(EFFICIENTNET.path(*EFFICIENTNET.files), weights_only=True)
        self.network = EfficientNet.from_name("efficientnet-lite0", image_size=PIXELS)
        self.network.load_state_dict(weights)
        self.network.eval()

    @torch.no_grad()
    def __call__(self, files):
        """The tokens [B, N, 1280] of picture files."""
        pixels = torch.stack([_pixels(file) for file in files])
        return self.network.extract_features((pixels - MEAN) / SCALE).flatten(2).mT.contiguous()


def _pixels(file):
    import numpy as np
    from PIL import Image

    with Image.open(file) as image:
        enlarged = np.array(image.convert("RGB").resize((PIXELS, PIXELS)))
    return torch.from_numpy(enlarged).permute(2, 0, 1).float()
