"""Pre-trains the small ViLT of the demo: `python -m petl_ext.demo.digits.pretrain_vilt --output DIR --seed 0`.

The model looks at scenes of the training digits. First it learns to name the digit and the color in each image patch
(object tags: direct supervision); then it also reads captions, restores their masked words, and tells whether a caption
has a wrong word. It never sees a question. The folder loads with
`ViltForQuestionAnswering.from_pretrained(DIR, num_labels=...)` and `ViltProcessor.from_pretrained(DIR)`.
"""

import argparse
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import BertTokenizer, ViltConfig, ViltForMaskedLM, ViltImageProcessorPil, ViltProcessor
from transformers.utils import ModelOutput

from petl_ext.demo.digits.pretraining import Optimization, Optimizer
from petl_ext.demo.digits.scenes import CELL, COLOR_NAMES, POSITIONS, DigitObject, SceneMaker, Scenes, caption
from petl_ext.tasks.labels import IGNORED

logger = logging.getLogger("petl_ext")

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
DIGITS = tuple("0123456789")
CAPTION_WORDS = ("a", "and", "holds", "in", "the")
# Words that only the demo's questions have: their embeddings stay as they were drawn.
QUESTION_WORDS = ("?", "are", "color", "digit", "digits", "how", "is", "many", "there", "what", "where", "which")
VOCABULARY = (*SPECIAL, *DIGITS, *COLOR_NAMES, *POSITIONS, *CAPTION_WORDS, *QUESTION_WORDS)
WORD_ID = {word: index for index, word in enumerate(VOCABULARY)}
ATTRIBUTES = {"digit": DIGITS, "color": COLOR_NAMES, "position": POSITIONS}
ATTRIBUTE_OF = {word: name for name, words in ATTRIBUTES.items() for word in words}
MASK_SHARE = {"digit": 0.7, "color": 0.15, "position": 0.15}  # digits are the hardest to read
PIXEL_SCALE = 1 / 80  # keeps the dark background at 0 and the digits well above 1
TAG_WEIGHT, MATCH_WEIGHT = 0.5, 0.5


@dataclass(frozen=True)
class Schedule(Optimization):
    """Steps and batch sizes of the two stages, and the optimizer's settings."""

    tag_steps: int = 400
    tag_batch: int = 128
    caption_steps: int = 1200
    caption_batch: int = 64


def vilt_config(num_words: int = len(VOCABULARY), num_tokens: int = 24) -> ViltConfig:
    """One patch per cell of a scene, so that a sequence has 4 patches and the image's class token."""
    return ViltConfig(
        vocab_size=num_words,
        max_position_embeddings=num_tokens,
        hidden_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=512,
        initializer_range=0.08,
        image_size=2 * CELL,
        patch_size=CELL,
        pad_token_id=WORD_ID["[PAD]"],
    )


class PretrainingModel(nn.Module):
    """ViLT with a masked-word head, a matching head, and a tag head per attribute."""

    def __init__(self, config: ViltConfig | None = None):
        super().__init__()
        self.masked = ViltForMaskedLM(config or vilt_config())
        self.vilt = self.masked.vilt
        width = self.vilt.config.hidden_size
        self.matches = nn.Linear(width, 2)
        self.tags = nn.ModuleDict({name: nn.Linear(width, len(ATTRIBUTES[name]) + 1) for name in ("digit", "color")})
        embeddings = self.vilt.embeddings
        nn.init.normal_(embeddings.position_embeddings, std=1.0)
        nn.init.normal_(embeddings.cls_token, std=1.0)
        nn.init.xavier_uniform_(embeddings.patch_embeddings.projection.weight.flatten(1))

    def forward(self, input_ids: Tensor, scenes: Scenes) -> ModelOutput:
        """ViLT's output with the patches in the order of `POSITIONS`, which its own pixel path shuffles."""
        embeddings = self.vilt.embeddings
        pixels = torch.from_numpy(scenes.images).permute(0, 3, 1, 2) * PIXEL_SCALE
        patches = embeddings.patch_embeddings(pixels).flatten(2).transpose(1, 2)
        image = torch.cat([embeddings.cls_token.expand(len(scenes), -1, -1), patches], dim=1)
        return self.vilt(
            input_ids=input_ids,
            attention_mask=(input_ids != WORD_ID["[PAD]"]).long(),
            image_embeds=image + embeddings.position_embeddings,
            pixel_mask=torch.ones(image.shape[:2], dtype=torch.long),
        )

    def tag_results(self, hidden: Tensor, scenes: Scenes) -> dict[str, tuple[Tensor, Tensor]]:
        """Logits and labels of the digit and the color of each patch; the last label stands for an empty cell."""
        patches = hidden[:, -len(POSITIONS) :].flatten(0, 1)
        labels = {"digit": scenes.digits, "color": scenes.colors}
        return {
            name: (head(patches), torch.from_numpy(labels[name] % head.out_features).long().flatten())
            for name, head in self.tags.items()
        }

    def word_results(self, output: ModelOutput, captions: "Captions") -> tuple[Tensor, Tensor]:
        """Logits and labels of the masked words."""
        masked = captions.labels != IGNORED
        text = output.last_hidden_state[:, : captions.labels.shape[1]]
        return self.masked.mlm_score(text[masked]), captions.labels[masked]

    def match_results(self, output: ModelOutput, captions: "Captions") -> tuple[Tensor, Tensor]:
        """Logits and labels of the whole captions: 1 where a caption is true of its scene."""
        return self.matches(output.pooler_output[-len(captions.matches) :]), captions.matches


@dataclass(frozen=True)
class Captions:
    """Captions of scenes: `input_ids` [n, length], `labels` likewise (the word behind a mask), `matches` [n].

    The first captions are true and masked; the last `len(matches)` are whole, and about half of them have a wrong word.
    """

    input_ids: Tensor
    labels: Tensor
    matches: Tensor


def make_captions(scenes: Scenes, num_whole: int, rng: np.random.Generator) -> Captions:
    """One caption per scene, the last `num_whole` of them whole."""
    rows, labels, matches = [], [], []
    for index in range(len(scenes)):
        objects = scenes.objects(index)
        if index < len(scenes) - num_whole:
            words, hidden = _masked(caption(objects, rng).split(), rng)
        else:
            words, hidden = caption(objects, rng).split(), {}
            if rng.random() < 0.5:
                words = _with_another_word(words, rng)
            matches.append(int(_is_true(words, objects)))
        ids = [WORD_ID[word] for word in ("[CLS]", *words, "[SEP]")]
        rows.append(torch.tensor(ids))
        labels.append(torch.tensor([hidden.get(at, IGNORED) for at in range(-1, len(words) + 1)]))
    return Captions(
        nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=WORD_ID["[PAD]"]),
        nn.utils.rnn.pad_sequence(labels, batch_first=True, padding_value=IGNORED),
        torch.tensor(matches),
    )


def _masked(words: list[str], rng: np.random.Generator) -> tuple[list[str], dict[int, int]]:
    """`words` with one attribute of each phrase masked, and the masked word's id at its position."""
    words, hidden = list(words), {}
    for positions in _attribute_positions(words):
        shares = np.array([MASK_SHARE[ATTRIBUTE_OF[words[at]]] for at in positions])
        at = int(rng.choice(positions, p=shares / shares.sum()))
        hidden[at] = WORD_ID[words[at]]
        words[at] = "[MASK]"
    return words, hidden


def _with_another_word(words: list[str], rng: np.random.Generator) -> list[str]:
    """`words` with one attribute replaced by another value of it."""
    at = int(rng.choice([at for positions in _attribute_positions(words) for at in positions]))
    others = [word for word in ATTRIBUTES[ATTRIBUTE_OF[words[at]]] if word != words[at]]
    return [*words[:at], others[rng.integers(len(others))], *words[at + 1 :]]


def _attribute_positions(words: list[str]) -> list[list[int]]:
    """Where the attributes stand in each phrase of a caption."""
    phrases: list[list[int]] = [[]]
    for at, word in enumerate(words):
        if word == "and":
            phrases.append([])
        elif word in ATTRIBUTE_OF:
            phrases[-1].append(at)
    return phrases


def _is_true(words: list[str], objects: list[DigitObject]) -> bool:
    """Whether each phrase fits an object: a caption with another word may still be true of the scene."""
    described = [{str(it.digit), it.color, it.position} for it in objects]
    phrases = [{words[at] for at in positions} for positions in _attribute_positions(words)]
    return all(any(phrase <= attributes for attributes in described) for phrase in phrases)


def tag_loss(model: PretrainingModel, hidden: Tensor, scenes: Scenes) -> Tensor:
    """Sum of the cross-entropies of the patches' digit and color."""
    results = model.tag_results(hidden, scenes)
    return torch.stack([F.cross_entropy(*result) for result in results.values()]).sum()


def tag_stage_loss(model: PretrainingModel, scenes: Scenes, _: np.random.Generator) -> Tensor:
    """First stage: object tags of scenes with an empty text."""
    empty = torch.tensor([[WORD_ID["[CLS]"], WORD_ID["[SEP]"]]]).expand(len(scenes), -1)
    return tag_loss(model, model(empty, scenes).last_hidden_state, scenes)


def caption_stage_loss(model: PretrainingModel, scenes: Scenes, rng: np.random.Generator) -> Tensor:
    """Second stage: masked words and matching, two thirds and one third of the batch, and object tags."""
    captions = make_captions(scenes, len(scenes) // 3, rng)
    output = model(captions.input_ids, scenes)
    words = F.cross_entropy(*model.word_results(output, captions))
    matching = F.cross_entropy(*model.match_results(output, captions))
    return words + MATCH_WEIGHT * matching + TAG_WEIGHT * tag_loss(model, output.last_hidden_state, scenes)


Loss = Callable[[PretrainingModel, Scenes, np.random.Generator], Tensor]


def train(model: PretrainingModel, schedule: Schedule, seed: int, progress: bool = True) -> None:
    """Both stages, each with a warm-up and a cosine decay of the learning rate."""
    rng = np.random.default_rng(seed)
    maker = SceneMaker("train")
    optimizer = Optimizer(model, schedule)
    stages: tuple[tuple[str, Loss, int, int], ...] = (
        ("object tags", tag_stage_loss, schedule.tag_steps, schedule.tag_batch),
        ("captions", caption_stage_loss, schedule.caption_steps, schedule.caption_batch),
    )
    model.train()
    for name, loss_of, steps, batch in stages:
        for _ in optimizer.steps(steps, name, progress):
            optimizer.minimize(loss_of(model, maker.make(batch, rng), rng))


@torch.no_grad()
def measure(model: PretrainingModel, num_scenes: int = 1500) -> dict[str, float]:
    """Accuracy on scenes of the validation digits: tags, masked words by attribute, matching."""
    model.eval()
    rng = np.random.default_rng(0)
    scenes = SceneMaker("val").make(num_scenes, rng)
    captions = make_captions(scenes, num_scenes // 3, rng)
    output = model(captions.input_ids, scenes)
    metrics = {}
    for name, (logits, labels) in model.tag_results(output.last_hidden_state, scenes).items():
        filled = torch.from_numpy(scenes.digits >= 0).flatten()
        metrics[f"tag: {name}"] = _accuracy(logits[filled], labels[filled])
    logits, labels = model.word_results(output, captions)
    for name, words in ATTRIBUTES.items():
        of_attribute = torch.isin(labels, torch.tensor([WORD_ID[word] for word in words]))
        metrics[f"masked word: {name}"] = _accuracy(logits[of_attribute], labels[of_attribute])
    metrics["matching"] = _accuracy(*model.match_results(output, captions))
    metrics["matching, majority"] = captions.matches.float().mean().item()
    return metrics


def _accuracy(logits: Tensor, labels: Tensor) -> float:
    return (logits.argmax(dim=-1) == labels).float().mean().item()


def save(model: PretrainingModel, folder: Path, words: Mapping[str, int] = WORD_ID) -> None:
    """Writes the backbone without its pre-training heads: weights in float16, which `config.json` loads as float32."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {f"vilt.{name}": weight.half().contiguous() for name, weight in model.vilt.state_dict().items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = vilt_config(len(words), model.vilt.config.max_position_embeddings)
    config.architectures, config.dtype = ["ViltForQuestionAnswering"], "float32"
    config.save_pretrained(folder)
    tokenizer = BertTokenizer(vocab=dict(words), model_max_length=config.max_position_embeddings)
    pixels = ViltImageProcessorPil(do_resize=False, rescale_factor=PIXEL_SCALE, do_normalize=False, do_pad=False)
    ViltProcessor(pixels, tokenizer).save_pretrained(folder)


README = """# A small pre-trained ViLT for the demo

Made by `python -m petl_ext.demo.digits.pretrain_vilt --seed {seed}` in {minutes:.1f} minutes on one CPU thread.

- {parameters:,} parameters, stored as float16; `from_pretrained` gives float32.
- Data: scenes composed of 1197 of scikit-learn's 1797 handwritten digits, and captions of them. The other 600 digits,
  which the demo validates and tests on, were not used. It never saw one of the demo's questions; the words that only
  questions have keep the embeddings they were drawn with.
- Objectives: {tag_steps} steps of object tags (the digit and color of every image patch: direct supervision, beyond
  what captions say), then {caption_steps} steps of masked words, image-text matching, and object tags.

Accuracy on 1500 scenes of the validation digits, from the stored float16 weights (float32 in brackets):

| | |
|---|---|
{rows}

A masked word is not always certain: another object of the scene may fit the rest of the phrase.
"""


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Pre-trains the small ViLT of the demo.")
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tag-steps", type=int, default=Schedule.tag_steps)
    parser.add_argument("--caption-steps", type=int, default=Schedule.caption_steps)
    parser.add_argument("--no-progress", action="store_true", help="no progress bars")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)  # more are slower on matrices this small, and would change the result
    torch.manual_seed(options.seed)
    schedule = Schedule(tag_steps=options.tag_steps, caption_steps=options.caption_steps)
    model, start = PretrainingModel(), time.monotonic()
    train(model, schedule, options.seed, progress=not options.no_progress)
    minutes = (time.monotonic() - start) / 60
    full = measure(model)
    half = measure(model.half().float())
    save(model, options.output)
    rows = "\n".join(f"| {name} | {half[name]:.3f} ({full[name]:.3f}) |" for name in full)
    parameters = sum(weight.numel() for weight in model.vilt.parameters())
    facts = {"seed": options.seed, "minutes": minutes, "parameters": parameters, "rows": rows}
    (options.output / "README.md").write_text(README.format(**facts, **vars(schedule)), encoding="utf-8")
    logger.info("wrote %s: %s", options.output, half)


if __name__ == "__main__":
    main()
