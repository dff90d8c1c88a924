"""Pre-trains a small CLIP on digits: `python -m petl_ext.demo.digits.pretrain_clip --output DIR --seed 0`.

It sees the training pictures in the domain "plain" (images.py) with captions, "a photo of a red seven." or "a
photo of a seven.", and learns which captions are true of which images: CLIP's contrastive loss, except that a caption
may be true of several images of a batch. The folder loads with `CLIPModel`, `AutoTokenizer` and `AutoImageProcessor`.
"""

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import BertTokenizer, CLIPConfig, CLIPImageProcessorPil, CLIPModel

from petl_ext.demo.digits.images import CLASSES, GROUND_BRIGHTNESS, DigitImageMaker, DigitImages
from petl_ext.demo.digits.pretraining import Optimization, Optimizer
from petl_ext.demo.digits.scenes import CELL, COLOR_NAMES

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
VOCABULARY = (*SPECIAL, *CLASSES, *COLOR_NAMES, "a", "photo", "of", ".")
WORD_ID = {word: index for index, word in enumerate(VOCABULARY)}
COLOR_SHARE = 0.5  # of captions that name the color
LARGEST_LOGIT_SCALE = math.log(100)  # CLIP's


@dataclass(frozen=True)
class Schedule(Optimization):
    """Steps, batch size, and the optimizer's settings."""

    steps: int = 1500
    batch: int = 64


def clip_config() -> CLIPConfig:
    """Sixteen patches per image; 265,345 parameters."""
    width = {"hidden_size": 64, "intermediate_size": 256, "num_attention_heads": 4}
    words = {"vocab_size": len(VOCABULARY), "max_position_embeddings": 16}
    ids = {"pad_token_id": WORD_ID["[PAD]"], "bos_token_id": WORD_ID["[CLS]"], "eos_token_id": WORD_ID["[SEP]"]}
    return CLIPConfig(
        projection_dim=64,
        text_config={**width, **words, **ids, "num_hidden_layers": 2},
        vision_config={**width, "image_size": CELL, "patch_size": CELL // 4, "num_hidden_layers": 3},
    )


def make_tokenizer() -> BertTokenizer:
    """One token per word."""
    return BertTokenizer(vocab=WORD_ID, model_max_length=16)


def make_image_processor() -> CLIPImageProcessorPil:
    """Pixels from -1 to 1."""
    return CLIPImageProcessorPil(do_resize=False, do_center_crop=False, image_mean=[0.5] * 3, image_std=[0.5] * 3)


def make_captions(drawn: DigitImages, rng: np.random.Generator) -> tuple[list[str], Tensor]:
    """One caption per image, and whether caption j is true of image i: bool [n, n]."""
    colored = rng.random(len(drawn.digits)) < COLOR_SHARE
    texts = [
        f"a photo of a {COLOR_NAMES[color]} {CLASSES[digit]}." if named else f"a photo of a {CLASSES[digit]}."
        for digit, color, named in zip(drawn.digits, drawn.colors, colored, strict=True)
    ]
    same_digit, same_color = (values[:, None] == values[None] for values in (drawn.digits, drawn.colors))
    return texts, torch.from_numpy(same_digit & (same_color | ~colored[None]))


def contrastive_loss(logits: Tensor, true: Tensor) -> Tensor:
    """Mean of the cross-entropies of images over captions and of captions over images, all true ones being equal.

    Args:
        logits: [images, captions].
        true: bool, likewise.
    """
    directions = (logits, true), (logits.T, true.T)
    return sum(F.cross_entropy(x, t / t.sum(dim=1, keepdim=True)) for x, t in directions) / 2


def train(model: CLIPModel, schedule: Schedule, seed: int, progress: bool = True) -> None:
    """All steps, with a warm-up and a cosine decay of the learning rate."""
    rng, maker = np.random.default_rng(seed), DigitImageMaker("train")
    tokenizer, image_processor = make_tokenizer(), make_image_processor()
    optimizer = Optimizer(model, schedule)
    model.train()
    for _ in optimizer.steps(schedule.steps, "digits CLIP", progress):
        drawn = maker.make(rng.integers(maker.num_pictures, size=schedule.batch), rng)
        texts, true = make_captions(drawn, rng)
        inputs = dict(tokenizer(texts, padding=True, return_tensors="pt", return_token_type_ids=False))
        inputs["pixel_values"] = image_processor(list(drawn.images), return_tensors="pt")["pixel_values"]
        optimizer.minimize(contrastive_loss(model(**inputs).logits_per_image, true))
        with torch.no_grad():
            model.logit_scale.clamp_(max=LARGEST_LOGIT_SCALE)
    model.eval()


def pretrain(folder: str | Path, seed: int = 0, schedule: Schedule = Schedule(), progress: bool = True) -> None:
    """Trains a new model and writes it, its tokenizer and its image processor to `folder`."""
    torch.manual_seed(seed)
    model = CLIPModel(clip_config())
    train(model, schedule, seed, progress)
    for part in (make_tokenizer(), make_image_processor(), model):
        part.save_pretrained(folder)


@torch.no_grad()
def zero_shot_accuracy(folder: str | Path, domain: str) -> float:
    """Of a written model, on one image of every validation picture in a domain."""
    model, maker = CLIPModel.from_pretrained(folder).eval(), DigitImageMaker("val", domain)
    drawn = maker.make(np.arange(maker.num_pictures), np.random.default_rng(0))
    texts = [f"a photo of a {name}." for name in CLASSES]
    inputs = dict(make_tokenizer()(texts, padding=True, return_tensors="pt", return_token_type_ids=False))
    inputs["pixel_values"] = make_image_processor()(list(drawn.images), return_tensors="pt")["pixel_values"]
    logits = model(**inputs).logits_per_image
    return (logits.argmax(dim=1).numpy() == drawn.digits).mean().item()


README = """# A small pre-trained CLIP of single digits

Made by `python -m petl_ext.demo.digits.pretrain_clip --seed {seed}`: {steps} steps of captions such as "a photo of a
red seven." of scikit-learn's handwritten digits, on black. Of their 1797 pictures it saw the 1197 for training.

- {parameters:,} parameters in float32.
- Zero-shot accuracy on the 300 pictures of the validation split: {plain:.1%} on black, as it was trained, {ground:.1%}
  on colored grounds, on which the recipes of images train.
"""


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Pre-trains a small CLIP on digits.")
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=Schedule.steps)
    parser.add_argument("--no-progress", action="store_true", help="no progress bars")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)  # more are slower on matrices this small, and would change the result
    pretrain(options.output, options.seed, Schedule(steps=options.steps), progress=not options.no_progress)
    parameters = sum(weight.numel() for weight in CLIPModel.from_pretrained(options.output).parameters())
    facts = {domain: zero_shot_accuracy(options.output, domain) for domain in GROUND_BRIGHTNESS}
    facts |= {"seed": options.seed, "steps": options.steps, "parameters": parameters}
    (options.output / "README.md").write_text(README.format(**facts), encoding="utf-8")


if __name__ == "__main__":
    main()
