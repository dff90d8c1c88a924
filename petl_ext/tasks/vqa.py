"""Visual question answering on the official VQAv2 files: dataset, answer vocabulary, metric and results file.

Formats and evaluation: visualqa.org (download, evaluation). Targets and score are those of ViLT and METER,
whose loss is `labels.soft_target_loss`.

    questions file    {"questions": [{"question_id", "image_id", "question"}]}
    annotations file  {"annotations": [{"question_id", "image_id", "question_type", "answer_type",
                                        "multiple_choice_answer", "answers": [{"answer"} x 10]}]}
    results file      [{"question_id", "answer"}]
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from petl_ext.tasks.files import pick, read_json, write_json
from petl_ext.tasks.inputs import ImageFolder, ImageTextCollator, TextImageDataset
from petl_ext.tasks.labels import LabelVocabulary, TypeAccuracy, require_one_each
from petl_ext.tasks.vqa_answers import normalize_answer

VQACollator = ImageTextCollator  # batches the items of VQADataset

ANNOTATORS = 10
SCORES = (0.0, 0.3, 0.6, 0.9, 1.0)  # of an answer that 0, 1, 2, 3, and 4 or more of the ten annotators gave


@dataclass(frozen=True)
class Question:
    """One entry of a questions file."""

    question_id: int
    image_id: int
    question: str

    @property
    def text(self) -> str:
        """What a model reads."""
        return self.question

    @property
    def where(self) -> str:
        """Names the question in an error."""
        return f"image_id {self.image_id}, question_id {self.question_id}"


@dataclass(frozen=True)
class Annotation:
    """One entry of an annotations file; `answers` are the ten annotators' answers, as written."""

    question_id: int
    image_id: int
    question_type: str
    answer_type: str
    multiple_choice_answer: str
    answers: tuple[str, ...]


def read_questions(path: str | Path) -> list[Question]:
    """The questions of an official questions file, in its order.

    Raises ValueError, with the file, the entry, what must be there and what is, if the file is malformed or a
    question_id comes twice; FileNotFoundError if there is no such file.
    """
    fields = {"question_id": int, "image_id": int, "question": str}
    return [Question(**pick(entry, fields, where)) for where, entry in _entries(path, "questions")]


def read_annotations(path: str | Path) -> list[Annotation]:
    """The annotations of an official annotations file, in its order. Raises what `read_questions` raises."""
    fields = dict.fromkeys(("question_type", "answer_type", "multiple_choice_answer"), str)
    fields |= {"question_id": int, "image_id": int, "answers": list}
    annotations = []
    for where, entry in _entries(path, "annotations"):
        picked = pick(entry, fields, where)
        annotations.append(Annotation(**picked | {"answers": _ten_answers(picked["answers"], where)}))
    return annotations


def _entries(path: str | Path, key: str) -> list[tuple[str, dict]]:
    """The objects listed under `key`, each with the words that name it in an error."""
    content = read_json(path)
    if not isinstance(content, dict) or not isinstance(content.get(key), list):
        found = sorted(content) if isinstance(content, dict) else type(content).__name__
        raise ValueError(f"{path} must be a JSON object with a list under '{key}', got {found}")
    seen = set()
    entries = []
    for index, entry in enumerate(content[key]):
        if not isinstance(entry, dict):
            raise ValueError(f"{path}: {key}[{index}] must be a JSON object, got {entry!r}")
        question_id = str(entry.get("question_id"))
        where = f"{path}: {key}[{index}] (question_id {question_id})"
        if question_id in seen:
            raise ValueError(f"{where} must come once, got it again")
        seen.add(question_id)
        entries.append((where, entry))
    return entries


def _ten_answers(answers: list, where: str) -> tuple[str, ...]:
    if len(answers) != ANNOTATORS:
        raise ValueError(f"{where} must have {ANNOTATORS} 'answers', got {len(answers)}")
    for index, answer in enumerate(answers):
        if not isinstance(answer, dict) or not isinstance(answer.get("answer"), str):
            raise ValueError(f"{where}: answers[{index}] must be an object with a string 'answer', got {answer!r}")
    return tuple(answer["answer"] for answer in answers)


class AnswerVocabulary(LabelVocabulary):
    """The answers that a model can give: a sequence of normalized strings; the index of an answer is its label."""

    def __init__(self, answers: Iterable[str]):
        super().__init__(answers)
        unknown_form = [answer for answer in self.answers if normalize_answer(answer) != answer]
        if unknown_form:
            raise ValueError(
                f"answers must be normalized, got {unknown_form[0]!r} ({normalize_answer(unknown_form[0])!r})"
            )

    @classmethod
    def from_annotations(cls, paths: Iterable[str | Path], min_count: int = 9) -> "AnswerVocabulary":
        """The normalized majority answers that come at least `min_count` times in the annotation files together.

        Most frequent first, equally frequent ones in alphabetical order. VQAv2 train and val with 9 give 3129 answers.
        """
        annotations = (annotation for path in paths for annotation in read_annotations(path))
        counts = Counter(normalize_answer(annotation.multiple_choice_answer) for annotation in annotations)
        ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
        return cls(answer for answer, count in ordered if count >= min_count)

    def soft_target(self, answers: Sequence[str]) -> Tensor:
        """Score of every answer of the vocabulary, float32 [len(self)], from what ten annotators answered."""
        target = torch.zeros(len(self))
        for answer, count in Counter(map(normalize_answer, answers)).items():
            if answer in self.index:
                target[self.index[answer]] = SCORES[min(count, len(SCORES) - 1)]
        return target


class VQADataset(TextImageDataset):
    """Questions about images, as inputs of Hugging Face's `ViltForQuestionAnswering`; batch them with `VQACollator`.

    Args:
        questions: official questions file.
        images: folder of the images.
        processor: has `tokenizer` and `image_processor`: a `ViltProcessor`, or a `TextAndImage` of two models'.
        vocabulary: the answers that are labels.
        annotations: official annotations file; None for a test split, whose items then have no `labels`.
        image_name: file name of an image, from its `image_id`.
        max_length: longest question in tokens; longer ones are cut.
        cache_images: keep preprocessed images in memory (small data sets).

    An item is a dict: `input_ids`, `attention_mask`, `token_type_ids` (lists), `pixel_values` [3, height, width],
    `labels` [len(vocabulary)] float32 soft scores.

    Raises ValueError if a file is malformed or questions and annotations do not belong together, FileNotFoundError if a
    file or an image is missing (checked for all images here); an unreadable image raises ValueError when it is used.
    """

    def __init__(
        self,
        questions: str | Path,
        images: str | Path,
        processor: Any,
        vocabulary: AnswerVocabulary,
        annotations: str | Path | None = None,
        image_name: str = "COCO_train2014_{image_id:012d}.jpg",
        max_length: int = 40,
        cache_images: bool = False,
    ):
        self.questions = read_questions(questions)
        self.annotations = None if annotations is None else _matching(self.questions, questions, annotations)
        self.vocabulary = vocabulary
        folder = ImageFolder(Path(images), image_name)
        folder.require(self.questions, "questions")
        super().__init__(self.questions, folder, processor, max_length, cache_images)

    def _labels(self, index: int) -> Tensor | None:
        if self.annotations is None:
            return None
        return self.vocabulary.soft_target(self.annotations[index].answers)


def _matching(questions: list[Question], questions_path: str | Path, path: str | Path) -> list[Annotation]:
    """The annotations of `questions`, in their order."""
    annotations = {annotation.question_id: annotation for annotation in read_annotations(path)}
    expected = {question.question_id: question.image_id for question in questions}
    got = {question_id: annotation.image_id for question_id, annotation in annotations.items()}
    if expected != got:
        different = {question_id for question_id, _ in expected.items() ^ got.items()}
        first = min(different)
        raise ValueError(
            f"{path}: question_id {first} must have image_id {expected.get(first, 'of no question')} as in "
            f"{questions_path}, got {got.get(first, 'no annotation')}; {len(different)} question_ids do not match"
        )
    return [annotations[question.question_id] for question in questions]


def vqa_score(logits: Tensor, targets: Tensor) -> float:
    """Mean soft score of the best-rated answer, in [0, 1]; both [n, answers]."""
    return targets.gather(1, logits.argmax(dim=1, keepdim=True)).mean().item()


def compute_metrics(prediction: Any) -> dict[str, float]:
    """`compute_metrics` of `transformers.Trainer`: `vqa_score` of `predictions` and `label_ids`, both [n, answers]."""
    return {"vqa_score": vqa_score(torch.as_tensor(prediction.predictions), torch.as_tensor(prediction.label_ids))}


def answer_accuracy(answer: str, annotators: Sequence[str]) -> float:
    """Official accuracy of one answer: min(matches / 3, 1), averaged over ten choices of nine annotators.

    As in the official script, nothing is normalized but case and space at the ends where all annotators agree.
    """
    annotators = [_one_line(given) for given in annotators]
    compared = normalize_answer if len(set(annotators)) > 1 else str.lower
    wanted = compared(_one_line(answer))
    matches = sum(compared(given) == wanted for given in annotators)
    return SCORES[min(matches, len(SCORES) - 1)]


def _one_line(answer: str) -> str:
    return answer.replace("\n", " ").replace("\t", " ").strip()


def accuracy_by_type(answers: Sequence[str], annotations: Sequence[Annotation]) -> dict[str, TypeAccuracy]:
    """Official accuracy of `answers` for every question type, types in alphabetical order.

    The majority rate is that of the most frequent answer on these same annotations: what a model that saw nothing but
    the type could reach. Raises ValueError if the lengths differ.
    """
    require_one_each(answers, annotations, ("answers", "annotation"))
    by_type = defaultdict(list)
    for answer, annotation in zip(answers, annotations, strict=True):
        by_type[annotation.question_type].append((answer, annotation))
    return {question_type: _type_accuracy(by_type[question_type]) for question_type in sorted(by_type)}


def _type_accuracy(answered: list[tuple[str, Annotation]]) -> TypeAccuracy:
    majority = Counter(normalize_answer(annotation.multiple_choice_answer) for _, annotation in answered)
    constant = min(majority, key=lambda answer: (-majority[answer], answer))
    accuracy = sum(answer_accuracy(answer, annotation.answers) for answer, annotation in answered)
    rate = sum(answer_accuracy(constant, annotation.answers) for _, annotation in answered)
    return TypeAccuracy(len(answered), accuracy / len(answered), rate / len(answered))


def write_results(path: str | Path, questions: Sequence[Question], answers: Sequence[str]) -> None:
    """Writes the official results file whole or not at all. Raises ValueError if the lengths differ."""
    require_one_each(answers, questions, ("answers", "question"))
    pairs = zip(questions, answers, strict=True)
    write_json(path, [{"question_id": question.question_id, "answer": answer} for question, answer in pairs])
