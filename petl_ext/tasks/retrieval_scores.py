"""Scores of all captions of all images, in blocks that fit memory, with progress and a point to resume from."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from petl_ext.saving import written_whole
from petl_ext.tasks.retrieval import RetrievalCollator, RetrievalDataset

AGREEMENT = 1e-3  # of what is scored anew, as a share of the largest score


def score_all(
    model: Any,
    data: RetrievalDataset,
    images_at_once: int = 8,
    captions_at_once: int = 64,
    path: str | Path | None = None,
    save_every: int = 100,
    num_workers: int = 0,
    progress: bool = True,
) -> Tensor:
    """Scores of every caption for every image of `data`, float32 [images, captions], on the CPU.

    Beside the matrix no more is in memory than the captions' tokens and one block: `images_at_once` images, each with
    `captions_at_once` captions. The model computes what of an image does not depend on a caption once in a block.

    Args:
        model: takes K texts to an image and gives `logits` [images, K], as the retrieval models of `petl_ext.models`
            do. It is put into evaluation mode, and back; autocast is the caller's.
        data: its `negatives` do not matter.
        path: a file that keeps the scores of all images so far, written whole after every `save_every` images and at
            the end; if it is there, scoring goes on from it.
        num_workers: processes that decode images.
        progress: show a bar.

    Raises ValueError if `path` holds scores of other captions or images, or of another model: some are scored anew;
    FileNotFoundError if there is no folder for it. After an OSError while it is written, it holds what it held before.
    """
    sizes = {"images_at_once": images_at_once, "captions_at_once": captions_at_once, "save_every": save_every}
    for name, value in sizes.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if path is not None and not Path(path).parent.is_dir():
        raise FileNotFoundError(f"path must be in a folder that is there, got {path}")
    scorer = _Scorer(model, data, images_at_once, captions_at_once, num_workers)
    scores = torch.empty(len(data.entries), len(data.captions))
    was_training = model.training
    model.eval()
    try:
        done = _resumed(path, scores, scorer) if path is not None and Path(path).exists() else 0
        saved = done
        with tqdm(total=len(scores), initial=done, desc="scores", unit="image", disable=not progress) as bar:
            for rows in scorer.rows(done):
                scores[done : done + len(rows)] = rows
                done += len(rows)
                bar.update(len(rows))
                if path is not None and (done - saved >= save_every or done == len(scores)):
                    _save(path, scores[:done], scorer.of_what())
                    saved = done
    finally:
        model.train(was_training)
    return scores


@dataclass
class _Scorer:
    """A model and what it is to score."""

    model: Any
    data: RetrievalDataset
    images_at_once: int
    captions_at_once: int
    num_workers: int

    def __post_init__(self):
        self.collator = RetrievalCollator(self.data.processor)
        self.device = next(self.model.parameters()).device

    def of_what(self) -> str:
        """Tells apart what captions and images the scores are of."""
        images = [image.image_id for image in self.data.entries]
        what = json.dumps([images, self.data.captions, self.data.image_of, self.data.max_length])
        return hashlib.sha256(what.encode()).hexdigest()

    def rows(self, first: int) -> Iterator[Tensor]:
        """Scores of some images after another, from the image `first` on, with all captions."""
        texts = list(self.texts())
        for start, images in self.images(first):
            yield torch.cat([self.block(start, images, some) for some in texts], dim=1)

    def texts(self) -> Iterator[dict[str, Tensor]]:
        """All captions as inputs [1, captions at once, tokens]."""
        captions, tokenizer = self.data.captions, self.data.processor.tokenizer
        for first in range(0, len(captions), self.captions_at_once):
            some = captions[first : first + self.captions_at_once]
            tokens = tokenizer(some, truncation=True, max_length=self.data.max_length)
            yield {name: tensor[None] for name, tensor in tokenizer.pad(tokens, return_tensors="pt").items()}

    def images(self, first: int) -> Iterator[tuple[int, dict[str, Tensor]]]:
        """Images as inputs, with the index of the first of them."""
        loader = torch.utils.data.DataLoader(
            _Images(self.data, first),
            self.images_at_once,
            num_workers=self.num_workers,
            collate_fn=self.collator.images,
            generator=torch.Generator(),  # else it would draw a number from the global one
        )
        for batch in loader:
            yield first, {name: tensor.to(self.device) for name, tensor in batch.items()}
            first += len(batch["pixel_values"])

    def block(self, first: int, images: dict[str, Tensor], texts: dict[str, Tensor]) -> Tensor:
        """Scores [images, captions]. ViLT shuffles patches: with a seed of the block's own, it is always the same."""
        count = len(images["pixel_values"])
        each = {name: tensor.to(self.device).expand(count, -1, -1) for name, tensor in texts.items()}
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(first)
            return self.model(**each, **images).logits.float().cpu()


@dataclass
class _Images(torch.utils.data.Dataset):
    """The images of a retrieval data set, from one of them on."""

    data: RetrievalDataset
    first: int

    def __len__(self) -> int:
        return len(self.data.entries) - self.first

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"pixel_values": self.data.pixels_of(self.first + index)}


def _save(path: str | Path, scores: Tensor, of_what: str) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    with written_whole(path) as unfinished:
        unfinished.touch()  # so that the mode is what the umask says, not what safetensors would choose
        mode = unfinished.stat().st_mode
        try:
            save_file({"scores": scores.contiguous()}, unfinished, metadata={"of": of_what})
        except SafetensorError as error:
            raise OSError(f"{path}: {error}") from error
        unfinished.chmod(mode)


def _resumed(path: str | Path, scores: Tensor, scorer: _Scorer) -> int:
    """Fills in what a file holds and says how many rows that are."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            of_what, kept = (file.metadata() or {}).get("of"), file.get_tensor("scores")
    except SafetensorError as error:
        raise ValueError(f"{path} must be a file of scores, got one that cannot be read: {error}") from error
    if of_what != scorer.of_what() or kept.shape[1:] != scores.shape[1:]:
        raise ValueError(f"{path} must hold scores of these images and captions, got others; name another file")
    _check_model(path, kept, scorer)
    scores[: len(kept)] = kept
    return len(kept)


def _check_model(path: str | Path, kept: Tensor, scorer: _Scorer) -> None:
    """Scores some anew: whatever makes a model another one, its scores tell."""
    _, images = next(scorer.images(0))
    anew = scorer.block(0, images, next(scorer.texts()))[: len(kept)]
    before = kept[: len(anew), : anew.shape[1]]
    difference = (anew - before).abs().max()
    if not difference <= AGREEMENT * before.abs().max():
        raise ValueError(
            f"{path} must hold scores of this model, got those of another, which differ by {difference:.2g}; name "
            "another file"
        )
