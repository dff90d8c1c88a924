"""The digit scenes in every task's format: the same bytes for a seed, files that the tasks read."""

import hashlib
import os
import re
import subprocess
import sys

import pytest
from PIL import Image

from petl_ext.demo.digits import gqa as digits_gqa
from petl_ext.demo.digits import nlvr2 as digits_nlvr2
from petl_ext.demo.digits import retrieval as digits_retrieval
from petl_ext.demo.digits import scienceqa as digits_scienceqa
from petl_ext.demo.digits import snli_ve as digits_snli_ve
from petl_ext.demo.digits.scenes import DigitObject
from petl_ext.demo.digits.write import write_digits
from petl_ext.tasks import gqa, nlvr2, retrieval, scienceqa, snli_ve

SIZES = {"train": 60, "val": 20, "test": 20}
FORMATS = ("vqa", "gqa", "snli_ve", "nlvr2", "retrieval", "scienceqa")
# Of the questions and annotations of `write_digits(sizes, seed=3)` with 40 train and 15 test scenes, before it knew
# formats.
VQA_SHA256 = {
    "train": "d91fcf4a875892caf7b7b239d743d159c2885689f794761358a6ee5b32479456",
    "test": "993098c10b50f4a561094c92735545aec879c29259f9812a6b786f11a0da1433",
}


def bytes_of(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("digits") / "data"
    write_digits(folder, SIZES, seed=3, progress=False, formats=FORMATS)
    return folder


def test_vqa_bytes_stay_as_they_were(tmp_path):
    files = write_digits(tmp_path / "data", {"train": 40, "test": 15}, seed=3, progress=False, formats=FORMATS)
    for split, expected in VQA_SHA256.items():
        written = files[split].questions.read_bytes() + files[split].annotations.read_bytes()
        assert hashlib.sha256(written).hexdigest() == expected


def test_formats_do_not_change_one_another(folder, tmp_path):
    together = bytes_of(folder)
    for name in FORMATS:
        write_digits(tmp_path / name, SIZES, seed=3, progress=False, formats=[name])
        alone = bytes_of(tmp_path / name)
        assert alone.items() < together.items()
    images = sum(SIZES.values())
    with_images = sum(-(-size // 3) for size in SIZES.values())
    in_pairs = sum(size // 8 * 8 for size in SIZES.values())
    assert len(together) == images + 3 * (2 + 1 + 2) + 3 + in_pairs + 1 + 3 + with_images
    assert len(alone) == images + 3 + with_images


def test_a_seed_gives_the_same_bytes_in_another_process(folder, tmp_path):
    script = f"""
from petl_ext.demo.digits.write import write_digits
write_digits({str(tmp_path / "again")!r}, {SIZES}, seed=3, progress=False, formats={FORMATS})
write_digits({str(tmp_path / "other")!r}, {SIZES}, seed=4, progress=False, formats={FORMATS})
"""
    environment = os.environ | {"PYTHONHASHSEED": "17"}
    subprocess.run([sys.executable, "-c", script], check=True, env=environment)
    assert bytes_of(tmp_path / "again") == bytes_of(folder)
    other = bytes_of(tmp_path / "other")
    assert other.keys() == bytes_of(folder).keys()
    pids = digits_scienceqa.ScienceQADigitsFiles.of(folder).splits.read_bytes()  # which there are depends on no seed
    assert set(other.values()) & set(bytes_of(folder).values()) == {pids}


def test_an_unknown_format_is_refused(tmp_path):
    with pytest.raises(
        ValueError,
        match=r"formats must be some of \['gqa', 'nlvr2', 'retrieval', 'scienceqa', 'snli_ve', 'vqa'\], got \['coco'\]",
    ):
        write_digits(tmp_path / "data", SIZES, progress=False, formats=["coco"])
    assert list(tmp_path.iterdir()) == []


def test_a_failure_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(digits_snli_ve, "TEMPLATES", {"color at": None})
    with pytest.raises(TypeError):
        write_digits(tmp_path / "data", SIZES, progress=False, formats=FORMATS)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("split", SIZES)
def test_gqa_files_are_what_the_reader_expects(folder, split):
    files = digits_gqa.GQADigitsFiles.of(folder, split)
    questions = gqa.read_questions(files.questions)
    assert len(questions) == 2 * SIZES[split]
    for question in questions:
        with Image.open(files.images / files.image_name.format(image_id=question.image_id)) as image:
            assert image.size == (32, 32)
        assert question.answer in digits_gqa.ANSWERS
        assert question.structural in ("query", "verify", "choose", "logical", "compare")
        assert question.semantic in ("obj", "attr", "rel")
    data = gqa.GQADataset(files.questions, files.images, None, gqa.GQAVocabulary(digits_gqa.ANSWERS), files.image_name)
    assert len(data) == len(questions)


@pytest.mark.parametrize("split", SIZES)
def test_snli_ve_files_are_what_the_readers_expect(folder, split):
    files = digits_snli_ve.SNLIVEDigitsFiles.of(folder, split)
    official, tsv = snli_ve.read_pairs(files.jsonl), snli_ve.read_pairs(files.tsv)
    assert official.left_out == tsv.left_out == 0
    fields = [
        [(it.line, it.pair_id, it.image_id, it.hypothesis, it.label) for it in pairs.labeled]
        for pairs in (official, tsv)
    ]
    assert fields[0] == fields[1] and len(fields[0]) > SIZES[split]
    inside = snli_ve.SNLIVEDataset(files.tsv, None, None)
    outside = snli_ve.SNLIVEDataset(files.jsonl, files.images, None, files.image_name)
    for one, other in zip(inside.pairs, outside.pairs, strict=True):
        assert inside.images.of(one).open("rb").read() == outside.images.of(other).read_bytes()


@pytest.mark.parametrize("split", SIZES)
def test_nlvr2_files_are_what_the_reader_expects(folder, split):
    files = digits_nlvr2.NLVR2DigitsFiles.of(folder, split)
    data = nlvr2.NLVR2Dataset(files.examples, files.images, None)
    by_sentence = {}
    for example in data.examples:
        assert set(example.sentence.split()) <= set(digits_nlvr2.WORDS)
        by_sentence.setdefault(example.sentence_id, []).append((example.label, example.sentence))
    assert len(by_sentence) == 2 * (SIZES[split] // 8)
    for rows in by_sentence.values():
        assert sorted(label for label, _ in rows) == ["False", "False", "True", "True"]
        assert len({sentence for _, sentence in rows}) == 1


def test_nlvr2_sentences_are_true_of_what_they_say():
    scene = [DigitObject(3, "red", "northwest"), DigitObject(5, "blue", "southeast")]
    other = [
        DigitObject(3, "green", "northeast"),
        DigitObject(3, "red", "southwest"),
        DigitObject(1, "red", "northwest"),
    ]
    truths = {}
    for template in digits_nlvr2.TEMPLATES.values():
        truths |= dict(template([scene, other]))
    assert len(truths) == 10 + 10 + 20 + 3 + 5
    assert {text for text, truth in truths.items() if truth} == {
        "the left image holds a red digit",
        "the left image holds a blue digit",
        "the right image holds a red digit",
        "the right image holds a green digit",
        "both images hold a red digit",
        "only one image holds a blue digit",
        "only one image holds a green digit",
        "both images hold a 3",
        "only one image holds a 5",
        "only one image holds a 1",
        "the right image holds more digits than the left image",
        "there are 5 digits in all",
    }


def test_retrieval_files_are_what_the_reader_expects(folder):
    files = digits_retrieval.RetrievalDigitsFiles.of(folder)
    for split, size in SIZES.items():
        data = retrieval.RetrievalDataset(files.annotations, files.images, None, [split])
        assert len(data.entries) == size and len(data) == 5 * size
        for image in data.entries:
            assert len(set(image.captions)) == 5
            objects = {
                frozenset(frozenset(phrase.split()) for phrase in text.split(" and ")) for text in image.captions
            }
            assert len(objects) == 1
            assert {word for text in image.captions for word in text.split()} <= set(digits_retrieval.WORDS)


@pytest.mark.parametrize("split", SIZES)
def test_scienceqa_files_are_what_the_reader_expects(folder, split):
    files = digits_scienceqa.ScienceQADigitsFiles.of(folder)
    data = scienceqa.ScienceQADataset(files.problems, files.splits, files.images, None, split, files.captions)
    assert len(data) == SIZES[split]
    words = {"image": 0, "text": 0, "none": 0}
    for problem in data.problems:
        assert len(set(problem.choices)) == 4 and sorted(problem.choices) == list(problem.choices)
        right = problem.choices[problem.answer]
        context = "image" if problem.image else "text" if problem.hint else "none"
        words[context] += 1
        assert bool(problem.caption) == (context == "image")
        texts = re.findall(r"[a-z]+|[0-9]|[^a-z0-9 ]", problem.text.lower().replace("\n", " "))
        assert set(texts) <= set(digits_scienceqa.WORDS)
        if context == "none":
            assert int(right) == int(problem.question.split()[-1][:-1]) + 1
        else:
            position = problem.question.split()[-1][:-1]
            said = (problem.hint or problem.solution.removeprefix("The picture shows ")).removesuffix(".")
            phrase = next(phrase for phrase in said.split(" and ") if phrase.endswith(position))
            assert right in phrase.split()[:2]
    assert min(words.values()) >= SIZES[split] // 3
