"""GQA: dataset, answer vocabulary, metrics and predictions file, on the official question files (gqadataset.org).

    questions file    {question_id: {"question", "imageId", "answer", "types": {"structural", "semantic", ...}, ...}}
                      or a folder of such files, as train_all_questions is; test files have no answers and no types
    images            <imageId>.jpg
    predictions file  [{"questionId", "prediction"}]

The official evaluation compares answers as strings, with no normalization, over balanced questions: those of
{train,val,testdev}_balanced_questions.json. Its metrics beyond accuracy are not here.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from petl_ext.tasks.files import once_each, pick, read_json, write_json
from petl_ext.tasks.inputs import ImageFolder, ImageTextCollator, TextImageDataset
from petl_ext.tasks.labels import (
    IGNORED,
    LabelVocabulary,
    TypeAccuracy,
    compute_metrics,
    label_loss,
    require_one_each,
    share_equal,
)

__all__ = [
    "IGNORED",
    "GQACollator",
    "GQADataset",
    "GQAVocabulary",
    "Question",
    "TypeAccuracy",
    "accuracy",
    "accuracy_by_type",
    "compute_metrics",
    "label_loss",
    "read_questions",
    "write_predictions",
]

GQACollator = ImageTextCollator  # batches the items of GQADataset

TYPES = ("structural", "semantic", "form")


@dataclass(frozen=True, slots=True)
class Question:
    """One entry of a questions file; what a test file lacks is None.

    `structural` is query, verify, logical, choose or compare; `semantic` is obj, attr, cat, rel or global.
    """

    question_id: str
    image_id: str
    question: str
    answer: str | None = None
    structural: str | None = None
    semantic: str | None = None

    @property
    def form(self) -> str | None:
        """The official evaluation's "open" for a query, "binary" for all else."""
        return self.structural and ("open" if self.structural == "query" else "binary")

    @property
    def text(self) -> str:
        """What a model reads."""
        return self.question

    @property
    def where(self) -> str:
        """Names the question in an error."""
        return f"image_id {self.image_id}, question_id {self.question_id}"


def read_questions(path: str | Path) -> list[Question]:
    """The questions of an official file, in its order, or of all .json files in a folder, in the order of their names.

    Programs and annotations of a question are dropped while the file is parsed, so that they never fill the memory
    together.

    Raises ValueError, with the file, the question, what must be there and what is, if a file is malformed or empty or
    a question comes twice; FileNotFoundError if there is no such file.
    """
    path = Path(path)
    files = sorted(path.glob("*.json")) if path.is_dir() else [path]
    if not files:
        raise FileNotFoundError(f"{path} must be a folder of .json files, got none in it")
    questions = {}
    for file in files:
        for question in _read_file(file):
            if question.question_id in questions:
                raise ValueError(f"{file}: question_id {question.question_id} must come once, got it again")
            questions[question.question_id] = question
    return list(questions.values())


def _read_file(path: Path) -> list[Question]:
    content = read_json(path, object_pairs_hook=_only_what_is_read)
    if not isinstance(content, dict) or not content or not all(isinstance(entry, dict) for entry in content.values()):
        raise ValueError(f"{path} must be a JSON object of questions by question_id, got {str(content)[:80]}")
    return [_question(key, entry, f"{path}: question_id {key}") for key, entry in content.items()]


def _only_what_is_read(pairs: list[tuple[str, Any]]) -> dict:
    """A parsed JSON object; of a question no more than `_question` looks at."""
    parsed = once_each(pairs)
    if "imageId" in parsed:
        return {name: parsed[name] for name in ("question", "imageId", "answer", "types") if name in parsed}
    return parsed


def _question(question_id: str, entry: dict, where: str) -> Question:
    known = pick(entry, {"question": str, "imageId": str}, where)
    answer = pick(entry, {"answer": str}, where)["answer"] if "answer" in entry else None
    types = pick(entry, {"types": dict}, where)["types"] if "types" in entry else {}
    if types:
        types = pick(types, {"structural": str, "semantic": str}, f"{where}: types")
    return Question(question_id, known["imageId"], known["question"], answer, **types)


class GQAVocabulary(LabelVocabulary):
    """The answers that a model can give, as written in the files; the index of an answer is its label."""

    @classmethod
    def from_questions(cls, paths: Iterable[str | Path], min_count: int = 1) -> "GQAVocabulary":
        """The answers that come at least `min_count` times in the question files together.

        Most frequent first, equally frequent ones in alphabetical order. Raises ValueError if a question has no answer.
        """
        counts = Counter()
        for path in paths:
            questions = read_questions(path)
            _require_answers(questions, path)
            counts.update(question.answer for question in questions)
        ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
        return cls(answer for answer, count in ordered if count >= min_count)

    def label(self, answer: str) -> int:
        """The label of `answer`, `IGNORED` if the vocabulary lacks it."""
        return self.index.get(answer, IGNORED)


class GQADataset(TextImageDataset):
    """Questions about images; batch them with `GQACollator`.

    Args:
        questions: official questions file, or a folder of them.
        images: folder of the images.
        processor: has `tokenizer` and `image_processor`: a `ViltProcessor`, or a `TextAndImage` of two models'.
        vocabulary: the answers that are labels.
        image_name: file name of an image, from its `image_id`.
        max_length: longest question in tokens; longer ones are cut.
        cache_images: keep preprocessed images in memory (small data sets).
        strict: refuse questions whose answer the vocabulary lacks, rather than give them the label `IGNORED`, which the
            loss skips and accuracy counts as wrong.

    An item is a dict: the tokenizer's lists, such as `input_ids` and `attention_mask`; `pixel_values` [3, height,
    width]; `labels`, an int, unless the file has no answers.

    Raises ValueError if a file is malformed, has answers to some questions only, or as `strict` says; FileNotFoundError
    if a file or an image is missing (checked for all images here); an unreadable image raises ValueError when it is
    used.
    """

    def __init__(
        self,
        questions: str | Path,
        images: str | Path,
        processor: Any,
        vocabulary: GQAVocabulary,
        image_name: str = "{image_id}.jpg",
        max_length: int = 40,
        cache_images: bool = False,
        strict: bool = False,
    ):
        self.questions = read_questions(questions)
        self.has_answers = any(question.answer is not None for question in self.questions)
        if self.has_answers:
            _require_answers(self.questions, questions)
        if self.has_answers and strict:
            _require_labels(self.questions, vocabulary, questions)
        self.vocabulary = vocabulary
        folder = ImageFolder(Path(images), image_name)
        folder.require(self.questions, "questions")
        super().__init__(self.questions, folder, processor, max_length, cache_images)

    def _labels(self, index: int) -> int | None:
        return self.vocabulary.label(self.questions[index].answer) if self.has_answers else None


def _require_answers(questions: Sequence[Question], path: str | Path) -> None:
    missing = [question for question in questions if question.answer is None]
    if missing:
        raise ValueError(
            f"{path}: question_id {missing[0].question_id} must have the field 'answer', got none; "
            f"{len(missing)} of {len(questions)} questions lack it"
        )


def _require_labels(questions: Sequence[Question], vocabulary: GQAVocabulary, path: str | Path) -> None:
    unknown = [question for question in questions if question.answer not in vocabulary.index]
    if unknown:
        raise ValueError(
            f"{path}: question_id {unknown[0].question_id} must have one of the {len(vocabulary)} answers of the "
            f"vocabulary, got {unknown[0].answer!r}; {len(unknown)} of {len(questions)} questions have such answers"
        )


def accuracy(answers: Sequence[str], questions: Sequence[Question]) -> float:
    """Share of `answers` that are exactly the questions' own.

    Raises ValueError if the lengths differ or a question has no answer.
    """
    require_one_each(answers, questions, ("answers", "question"))
    _require_answers(questions, "questions")
    return share_equal(answers, [question.answer for question in questions])


def accuracy_by_type(
    answers: Sequence[str], questions: Sequence[Question], types: str = "structural"
) -> dict[str, TypeAccuracy]:
    """Accuracy for every question type, types in alphabetical order.

    `types` is "structural", "semantic", or "form": the official evaluation's open and binary. The majority rate is that
    of the type's most frequent answer on these same questions. Raises ValueError if the lengths differ, for other
    `types`, or if a question has no type or no answer.
    """
    require_one_each(answers, questions, ("answers", "question"))
    _require_answers(questions, "questions")
    if types not in TYPES:
        raise ValueError(f"types must be one of {TYPES}, got {types!r}")
    by_type = defaultdict(list)
    for answer, question in zip(answers, questions, strict=True):
        question_type = getattr(question, types)
        if question_type is None:
            raise ValueError(f"{question.where} must have a {types} type, got none")
        by_type[question_type].append((answer, question.answer))
    return {question_type: _type_accuracy(by_type[question_type]) for question_type in sorted(by_type)}


def _type_accuracy(answered: list[tuple[str, str]]) -> TypeAccuracy:
    given, right = zip(*answered, strict=True)
    majority = max(Counter(right).values()) / len(right)
    return TypeAccuracy(len(right), share_equal(given, right), majority)


def write_predictions(path: str | Path, questions: Sequence[Question], answers: Sequence[str]) -> None:
    """Writes the official predictions file whole or not at all. Raises ValueError if the lengths differ."""
    require_one_each(answers, questions, ("answers", "question"))
    pairs = zip(questions, answers, strict=True)
    write_json(path, [{"questionId": question.question_id, "prediction": answer} for question, answer in pairs])
