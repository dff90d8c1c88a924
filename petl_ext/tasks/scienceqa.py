"""ScienceQA: multiple choice about a text, an image, both or neither. Dataset, prompts, metrics and results file.

Formats and evaluation: github.com/lupantech/ScienceQA.

    problems.json    {pid: {"question", "choices", "answer", "hint", "image", "grade", "subject", "topic", "category",
                            "skill", "lecture", "solution", "split"}}; "image" is a file's name or null
    pid_splits.json  {"train": [pid, ...], "val", "test", ...}
    captions.json    {"captions": {pid: text}}
    images           <split>/<pid>/image.png
    results file     {"results": {pid: index of the choice}, "outputs": {pid: text}, "acc", "correct", "count"}

A model chooses among five letters (`ScienceQADataset`), or writes an answer: `prompt` and `target` are what LaVIN and
DVP train on, and `read_answer` finds the letter in what it wrote.
"""

import bisect
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from petl_ext.tasks.files import once_each, pick, read_json, write_json
from petl_ext.tasks.inputs import ImageFolder, ImageTextCollator, TextImageDataset
from petl_ext.tasks.labels import LabelVocabulary, compute_metrics, label_loss, require_one_each

__all__ = [
    "CATEGORIES",
    "LETTERS",
    "CategoryAccuracy",
    "Problem",
    "ScienceQACollator",
    "ScienceQADataset",
    "accuracy",
    "choose",
    "compute_metrics",
    "label_loss",
    "prompt",
    "read_answer",
    "read_problems",
    "target",
    "with_random_choices",
    "write_results",
]

ScienceQACollator = ImageTextCollator  # batches the items of ScienceQADataset

LETTERS = LabelVocabulary("ABCDE")  # the labels 0 to 4
TEXTS = ("question", "hint", "grade", "subject", "lecture", "solution", "split")
SUBJECTS = ("natural science", "social science", "language science")
GRADES = tuple(f"grade{number}" for number in range(1, 13))
NO_CONTEXT = "N/A"
ANSWER = re.compile(r"The answer is ([A-Z]).")
BLANK_SIZE = (224, 224)  # of the image that stands for none, as LaVIN has it


@dataclass(frozen=True, slots=True)
class Problem:
    """One problem; `caption` is "" where there is none, and so is `image` for a problem without an image."""

    pid: str
    question: str
    choices: tuple[str, ...]
    answer: int
    hint: str
    image: str
    grade: str
    subject: str
    lecture: str
    solution: str
    split: str
    caption: str = ""

    @property
    def image_id(self) -> str:
        """Its path under the folder of the images, "" for a problem without one."""
        return self.image and f"{self.split}/{self.pid}/{self.image}"

    @property
    def context(self) -> str:
        """The hint and the caption of the image, of which there may be both, one or none."""
        return f"{self.hint} {self.caption}".strip()

    @property
    def text(self) -> str:
        """What a model reads."""
        return prompt(self)

    @property
    def where(self) -> str:
        """Names the problem in an error."""
        return f"pid {self.pid}"


def read_problems(
    problems: str | Path, splits: str | Path, split: str, captions: str | Path | None = None
) -> list[Problem]:
    """The problems of a split, in the order of the file of the splits.

    Args:
        problems, splits, captions: official files; without captions no problem has one.
        split: "train", "val", "test" or another one that the file has.

    Raises ValueError, with the file, the problem, what must be there and what is, if a file is malformed, a pid comes
    twice, or there is no such split; FileNotFoundError if a file is missing.
    """
    entries = _objects(read_json(problems, once_each), problems)
    pids = _objects(read_json(splits, once_each), splits).get(split)
    if not isinstance(pids, list) or not pids or not all(isinstance(pid, str) for pid in pids):
        raise ValueError(f"{splits} must have a list of pids, strings, under {split!r}, got {str(pids)[:80]}")
    texts = {}
    if captions is not None:
        texts = pick(read_json(captions, once_each), {"captions": dict}, str(captions))["captions"]
    chosen = {}
    for pid in pids:
        if pid in chosen:
            raise ValueError(f"{splits}: pid {pid} must come once in {split!r}, got it again")
        if pid not in entries:
            raise ValueError(f"{problems} must have pid {pid}, of {split!r} in {splits}, got no such problem")
        caption = pick({pid: texts.get(pid, "")}, {pid: str}, f"{captions}: captions")[pid]
        chosen[pid] = _problem(pid, entries[pid], caption, f"{problems}: pid {pid}")
    return list(chosen.values())


def _objects(content: Any, path: str | Path) -> dict:
    if not isinstance(content, dict):
        raise ValueError(f"{path} must be a JSON object, got {str(content)[:80]}")
    return content


def _problem(pid: str, entry: Any, caption: str, where: str) -> Problem:
    fields = pick(entry, dict.fromkeys(TEXTS, str) | {"choices": list, "answer": int}, where)
    choices, image = tuple(fields["choices"]), entry.get("image") or ""
    if not 1 <= len(choices) <= len(LETTERS) or not all(isinstance(choice, str) for choice in choices):
        raise ValueError(f"{where}: 'choices' must be 1 to {len(LETTERS)} strings, got {fields['choices']!r}")
    if not 0 <= fields["answer"] < len(choices):
        raise ValueError(
            f"{where}: 'answer' must be the index of one of {len(choices)} choices, got {fields['answer']}"
        )
    if not isinstance(image, str):
        raise ValueError(f"{where}: 'image' must be a file's name or null, got {image!r}")
    for name, known in (("subject", SUBJECTS), ("grade", GRADES)):
        if fields[name] not in known:
            raise ValueError(f"{where}: '{name}' must be one of {list(known)}, got {fields[name]!r}")
    return Problem(pid, **fields | {"choices": choices}, image=image, caption=caption)


def prompt(problem: Problem, context: str | None = None) -> str:
    """Question, context and options, as LaVIN and DVP write them (format QCM), the context being the problem's own, or
    the one given."""
    context = (problem.context if context is None else context) or NO_CONTEXT
    pairs = zip(LETTERS.answers, problem.choices, strict=False)
    options = " ".join(f"({letter}) {choice}" for letter, choice in pairs)
    text = f"Question: {problem.question}\nContext: {context}\nOptions: {options}\nResponse:"
    return text.replace("  ", " ").strip()


def target(problem: Problem) -> str:
    """The answer, lecture and solution that a model learns to write (format ALE)."""
    because = " ".join(part.replace("\n", "\\n") for part in (problem.lecture, problem.solution))
    text = f"The answer is {LETTERS.answers[problem.answer]}. BECAUSE: {because}".replace("  ", " ").strip()
    return text.removesuffix("BECAUSE:").strip()


def read_answer(output: str, problem: Problem) -> int | None:
    """The index of the choice in what a model wrote, None if it names none, several, or one that there is not."""
    found = ANSWER.findall(output)
    label = LETTERS.index.get(found[0]) if len(found) == 1 else None
    return label if label is not None and label < len(problem.choices) else None


def with_random_choices(answers: Sequence[int | None], problems: Sequence[Problem], seed: int = 0) -> list[int]:
    """`answers` with a random choice for each None, as the published evaluation has it."""
    require_one_each(answers, problems, ("answers", "problem"))
    rng = np.random.default_rng(seed)
    pairs = zip(answers, problems, strict=True)
    return [int(rng.integers(len(it.choices))) if answer is None else answer for answer, it in pairs]


def choose(logits: Any, problems: Sequence[Problem]) -> list[int]:
    """The best choice of each row of `logits` [n, 5], among those that its problem has."""
    logits = torch.as_tensor(logits)
    if logits.shape != (len(problems), len(LETTERS)):
        raise ValueError(f"logits must have shape [{len(problems)}, {len(LETTERS)}], got {list(logits.shape)}")
    return [int(row[: len(it.choices)].argmax()) for row, it in zip(logits, problems, strict=True)]


@dataclass(frozen=True)
class CategoryAccuracy:
    """Accuracy over the problems of one category, and how many there are; NaN without any."""

    count: int
    accuracy: float


# The columns of the published tables, and whether a problem belongs to one.
CATEGORIES: dict[str, Callable[[Problem], bool]] = {
    "NAT": lambda problem: problem.subject == "natural science",
    "SOC": lambda problem: problem.subject == "social science",
    "LAN": lambda problem: problem.subject == "language science",
    "TXT": lambda problem: bool(problem.hint),
    "IMG": lambda problem: bool(problem.image),
    "NO": lambda problem: not problem.hint and not problem.image,
    "G1-6": lambda problem: problem.grade in GRADES[:6],
    "G7-12": lambda problem: problem.grade in GRADES[6:],
    "Avg": lambda problem: True,
}


def accuracy(answers: Sequence[int | None], problems: Sequence[Problem]) -> dict[str, CategoryAccuracy]:
    """Accuracy of `answers`, indices of choices, for every one of `CATEGORIES`; None is wrong.

    TXT and IMG overlap, as published: a problem may have both. Raises ValueError if the lengths differ.
    """
    require_one_each(answers, problems, ("answers", "problem"))
    found = {}
    for name, belongs in CATEGORIES.items():
        right = [answer == it.answer for answer, it in zip(answers, problems, strict=True) if belongs(it)]
        found[name] = CategoryAccuracy(len(right), sum(right) / len(right) if right else float("nan"))
    return found


def write_results(
    path: str | Path,
    problems: Sequence[Problem],
    answers: Sequence[int],
    outputs: Mapping[str, str] | None = None,
) -> None:
    """Writes the official results file whole or not at all; `outputs` is what a model wrote, by pid.

    Raises ValueError if the lengths differ or an answer is not the index of one of its problem's choices: the official
    script needs one for each (`with_random_choices`).
    """
    require_one_each(answers, problems, ("answers", "problem"))
    for answer, problem in zip(answers, problems, strict=True):
        if answer is None or not 0 <= answer < len(problem.choices):
            raise ValueError(
                f"answers must be indices of choices, got {answer} of {len(problem.choices)} for {problem.where}"
            )
    correct = sum(answer == problem.answer for answer, problem in zip(answers, problems, strict=True))
    content = {"acc": 100 * correct / len(problems), "correct": correct, "count": len(problems)}
    results = {problem.pid: int(answer) for answer, problem in zip(answers, problems, strict=True)}
    write_json(path, content | {"results": results, "outputs": dict(outputs or {})})


class ScienceQADataset(TextImageDataset):
    """Problems as prompts, images and the letter of the right choice; batch them with `ScienceQACollator`.

    Args:
        problems, splits: official files.
        images: folder of the images: of the splits' folders.
        processor: has `tokenizer` and `image_processor`: a `ViltProcessor`, or a `TextAndImage` of two models'.
        split: "train", "val", "test" or another one that the file of the splits has.
        captions: official file of the images' captions, which then end the contexts.
        max_length: longest prompt in tokens; longer ones lose the end of their context, so that the options stay.
        blank_size: width and height of what stands for the image of a problem without one, before the processor.
        cache_images: keep preprocessed images in memory (small data sets).

    An item is a dict: the tokenizer's lists, such as `input_ids` and `attention_mask`; `pixel_values` [3, height,
    width], zeros for a problem without an image; `labels`, the int of `LETTERS`. A model may choose a letter that its
    problem does not have: `choose` does not.

    Raises ValueError if a file is malformed; FileNotFoundError if a file or an image is missing (checked for all images
    here). An unreadable image, and a problem whose question and options alone exceed `max_length`, raise ValueError
    when they are used.
    """

    def __init__(
        self,
        problems: str | Path,
        splits: str | Path,
        images: str | Path,
        processor: Any,
        split: str,
        captions: str | Path | None = None,
        max_length: int = 512,
        cache_images: bool = False,
        blank_size: tuple[int, int] = BLANK_SIZE,
    ):
        self.problems = read_problems(problems, splits, split, captions)
        self.blank_size = blank_size
        folder = ImageFolder(Path(images), "{image_id}")
        folder.require([problem for problem in self.problems if problem.image], "problems")
        super().__init__(self.problems, folder, processor, max_length, cache_images)

    def _labels(self, index: int) -> int:
        return self.problems[index].answer

    def _text(self, entry: Problem) -> str:
        words = entry.context.split(" ")

        def too_long(count: int) -> bool:
            text = prompt(entry, " ".join(words[:count]))
            return len(self.processor.tokenizer(text)["input_ids"]) > self.max_length

        if not too_long(len(words)):
            return entry.text
        kept = bisect.bisect_left(range(len(words)), True, key=too_long) - 1
        if kept < 0:
            raise ValueError(
                f"max_length must leave room for the question and options of {entry.where}, got {self.max_length}"
            )
        return prompt(entry, " ".join(words[:kept]))

    def _pictured(self, entry: Problem) -> tuple[Problem, ...]:
        return (entry,) if entry.image else ()

    def _read_pixels(self, entry: Problem) -> Tensor:
        if entry.image:
            return super()._read_pixels(entry)
        from PIL import Image

        blank = Image.new("RGB", self.blank_size)
        return torch.zeros_like(self.processor.image_processor(blank, return_tensors="pt")["pixel_values"][0])
