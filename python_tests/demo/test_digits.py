"""The digit scenes (real pictures, disjoint splits, true answers, the same bytes per seed) and their backbone."""

import hashlib
import json
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits
from transformers import ViltForQuestionAnswering, ViltModel, ViltProcessor

from petl_ext.demo.digits import BACKBONE, pretrain_vilt
from petl_ext.demo.digits.scenes import COLORS, DigitObject, SceneMaker, caption, split_pictures
from petl_ext.demo.digits.vqa import QUESTION_TYPES, DigitsFiles, questions_about
from petl_ext.demo.digits.write import write_digits
from petl_ext.tasks import vqa

SIZES = {"train": 40, "val": 15, "test": 15}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    return write_digits(tmp_path_factory.mktemp("digits") / "data", SIZES, seed=3, progress=False)


@pytest.fixture(autouse=True)
def one_thread():
    """Matrices this small are slower on several threads, much slower where other processes use the cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def bytes_of(folder):
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def rng():
    return np.random.default_rng(0)


def test_splits_share_no_picture():
    splits = split_pictures()
    assert {name: len(pictures) for name, pictures in splits.items()} == {"train": 1197, "val": 300, "test": 300}
    assert sorted(np.concatenate(list(splits.values()))) == list(range(1797))
    ink = {name: {picture.tobytes() for picture in load_digits().images[mine]} for name, mine in splits.items()}
    assert not ink["train"] & ink["val"] and not ink["train"] & ink["test"] and not ink["val"] & ink["test"]


def test_split_is_the_one_that_the_backbone_was_trained_with():
    train = np.sort(split_pictures()["train"])
    assert hashlib.sha256(train.astype("<i8").tobytes()).hexdigest()[:16] == "a72073fdcea1d511"


def test_scenes_show_the_labeled_digits_in_their_colors(monkeypatch):
    monkeypatch.setattr("petl_ext.demo.digits.scenes.NOISE", 0.0)
    maker = SceneMaker("val")
    scenes = maker.make(20, rng())
    assert scenes.images.shape == (20, 32, 32, 3) and scenes.images.dtype == np.uint8
    assert ((scenes.digits >= 0) == (scenes.colors >= 0)).all()
    assert (scenes.digits >= 0).sum(1).min() >= 2
    for index in range(20):
        for cell, (digit, color) in enumerate(zip(scenes.digits[index], scenes.colors[index], strict=True)):
            row, column = divmod(cell, 2)
            pixels = scenes.images[index, row * 16 : row * 16 + 16, column * 16 : column * 16 + 16].astype(float)
            if digit < 0:
                assert pixels.max() == 0
                continue
            full = np.array(list(COLORS.values())[color], dtype=float)
            ink = pixels[..., full.argmax()] / full.max()
            np.testing.assert_allclose(pixels, ink[..., None] * full, atol=1.5)  # rounding to uint8
            candidates = maker.cells.reshape(-1, 16, 16)
            nearest = np.abs(candidates - ink).sum((1, 2)).argmin() % len(maker.labels)
            assert maker.labels[nearest] == digit


def test_number_of_digits_in_a_scene():
    counts = (SceneMaker("train").make(1000, rng()).digits >= 0).sum(1)
    shares = np.bincount(counts, minlength=5) / 1000
    np.testing.assert_allclose(shares, [0, 0, 0.25, 0.5, 0.25], atol=0.03)


def test_unknown_split_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"split must be one of \['test', 'train', 'val'\], got 'dev'"):
        write_digits(tmp_path / "data", {"train": 1, "dev": 1}, progress=False)
    assert list(tmp_path.iterdir()) == []


def test_a_seed_gives_the_same_bytes(written, tmp_path):
    again = write_digits(tmp_path / "again", SIZES, seed=3, progress=False)
    first = bytes_of(written["train"].images.parent)
    assert len(first) == 6 + sum(SIZES.values())
    assert bytes_of(tmp_path / "again") == first
    write_digits(tmp_path / "other", SIZES, seed=4, progress=False)
    other = bytes_of(tmp_path / "other")
    assert other.keys() == first.keys() and not set(other.values()) & set(first.values())
    assert again["val"] == DigitsFiles.of(tmp_path / "again", "val")


def test_an_existing_folder_is_left_as_it_is(written, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="folder must not exist yet"):
        write_digits(tmp_path, SIZES, progress=False)
    assert bytes_of(tmp_path).keys() == {"notes.txt"}


def test_files_are_what_the_vqa_reader_expects(written):
    for split, files in written.items():
        questions = vqa.read_questions(files.questions)
        annotations = vqa.read_annotations(files.annotations)
        assert len(questions) == 2 * SIZES[split]
        assert [entry.question_id for entry in questions] == [entry.question_id for entry in annotations]
        assert {entry.question_type for entry in annotations} <= set(QUESTION_TYPES)
        for question in questions:
            name = files.image_name.format(image_id=question.image_id)
            with Image.open(files.images / name) as image:
                assert image.size == (32, 32)
        for annotation in annotations:
            assert set(annotation.answers) == {annotation.multiple_choice_answer}
            assert vqa.normalize_answer(annotation.multiple_choice_answer) == annotation.multiple_choice_answer


OBJECTS = [
    DigitObject(3, "red", "northwest"),
    DigitObject(3, "blue", "northeast"),
    DigitObject(7, "red", "southeast"),
]


def every_question(question_type):
    generator = rng()
    return {QUESTION_TYPES[question_type].ask(OBJECTS, generator) for _ in range(200)}


@pytest.mark.parametrize(
    ("question_type", "expected"),
    [
        (
            "digit at",
            {
                ("which digit is in the northwest?", "3"),
                ("which digit is in the northeast?", "3"),
                ("which digit is in the southeast?", "7"),
            },
        ),
        (
            "color at",
            {
                ("what color is the digit in the northwest?", "red"),
                ("what color is the digit in the northeast?", "blue"),
                ("what color is the digit in the southeast?", "red"),
            },
        ),
        ("color of", {("what color is the 7?", "red")}),
        ("digit of", {("which digit is blue?", "3")}),
        ("hard: position of", {("where is the 7?", "southeast")}),
        (
            "hard: count",
            {(f"how many digits are {color}?", {"red": "2", "blue": "1"}.get(color, "0")) for color in COLORS},
        ),
        (
            "hard: exist",
            {
                ("is there a red 3?", "yes"),
                ("is there a blue 3?", "yes"),
                ("is there a red 7?", "yes"),
                ("is there a blue 7?", "no"),
            },
        ),
    ],
)
def test_questions_and_answers_of_a_scene(question_type, expected):
    assert every_question(question_type) == expected


def test_no_question_where_the_answer_is_not_unique():
    twins = [DigitObject(3, "red", "northwest"), DigitObject(3, "red", "northeast")]
    for question_type in ("color of", "digit of", "hard: position of"):
        assert QUESTION_TYPES[question_type].ask(twins, rng()) is None
    asked = questions_about(twins, 7, rng())
    assert {question_type for question_type, _, _ in asked} == {"digit at", "color at", "hard: count", "hard: exist"}


def test_question_types_come_with_their_shares():
    generator = rng()
    scenes = SceneMaker("train").make(1500, generator)
    asked = [questions_about(scenes.objects(index), 1, generator)[0] for index in range(1500)]
    counts = Counter(question_type for question_type, _, _ in asked)
    for question_type, settings in QUESTION_TYPES.items():
        assert counts[question_type] / 1500 == pytest.approx(settings.share, abs=0.05)


def test_captions_are_true_and_are_no_questions():
    generator = rng()
    for _ in range(200):
        text = caption(OBJECTS, generator)
        assert pretrain_vilt._is_true(text.split(), OBJECTS)
        assert "?" not in text and set(text.split()) <= set(pretrain_vilt.VOCABULARY)
        wrong = pretrain_vilt._with_another_word(text.split(), generator)
        assert sum(old != new for old, new in zip(text.split(), wrong, strict=True)) == 1
    assert not pretrain_vilt._is_true(["a", "red", "3", "in", "the", "southeast"], OBJECTS)
    assert not pretrain_vilt._is_true(
        ["a", "red", "3", "in", "the", "northwest", "and", "a", "blue", "7", "in", "the", "southeast"], OBJECTS
    )


def test_masked_words_are_restored_by_their_labels():
    generator = rng()
    scenes = SceneMaker("train").make(30, generator)
    captions = pretrain_vilt.make_captions(scenes, 10, generator)
    assert captions.input_ids.shape == captions.labels.shape and captions.matches.shape == (10,)
    masked = captions.labels != pretrain_vilt.IGNORED
    assert (captions.input_ids[masked] == pretrain_vilt.WORD_ID["[MASK]"]).all()
    assert masked[:20].any(dim=1).all() and not masked[20:].any()
    whole = torch.where(masked, captions.labels, captions.input_ids)
    for index in range(30):
        words = [pretrain_vilt.VOCABULARY[word] for word in whole[index].tolist()]
        true = pretrain_vilt._is_true(words[1 : words.index("[SEP]")], scenes.objects(index))
        assert true if index < 20 else true == bool(captions.matches[index - 20])


def test_pretraining_is_the_same_for_a_seed(tmp_path):
    schedule = pretrain_vilt.Schedule(tag_steps=3, tag_batch=8, caption_steps=3, caption_batch=9)
    for name, seed in (("first", 5), ("second", 5), ("other", 6)):
        torch.manual_seed(seed)
        model = pretrain_vilt.PretrainingModel()
        pretrain_vilt.train(model, schedule, seed, progress=False)
        pretrain_vilt.save(model, tmp_path / name)
    first, second, other = (bytes_of(tmp_path / name) for name in ("first", "second", "other"))
    assert first == second
    assert {name for name in first if first[name] != other[name]} == {"model.safetensors"}


def test_tags_alone_teach_to_see():
    torch.manual_seed(0)
    model = pretrain_vilt.PretrainingModel()
    schedule = pretrain_vilt.Schedule(tag_steps=60, tag_batch=32, caption_steps=0, warmup_steps=10)
    pretrain_vilt.train(model, schedule, seed=0, progress=False)
    metrics = pretrain_vilt.measure(model, num_scenes=150)
    assert metrics["tag: color"] > 0.9  # chance is 0.2


def test_backbone_loads_whole_in_float32():
    assert (BACKBONE / "model.safetensors").stat().st_size <= 3_000_000
    model, report = ViltForQuestionAnswering.from_pretrained(BACKBONE, num_labels=5, output_loading_info=True)
    assert {name.split(".")[0] for name in report["missing_keys"]} == {"classifier"}
    assert not report["unexpected_keys"] and not report["mismatched_keys"]
    assert {weight.dtype for weight in model.parameters()} == {torch.float32}
    _, report = ViltModel.from_pretrained(BACKBONE, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]


def test_backbone_knows_every_word_of_the_questions(written):
    tokenizer = ViltProcessor.from_pretrained(BACKBONE).tokenizer
    assert len(tokenizer) == len(pretrain_vilt.VOCABULARY)
    for files in written.values():
        for question in json.loads(files.questions.read_text())["questions"]:
            assert tokenizer.unk_token_id not in tokenizer(question["question"])["input_ids"]


def test_backbone_sees_digits_of_the_test_split():
    """Its patch features of pictures that it never saw tell digits and colors apart by a nearest class mean."""
    model = ViltModel.from_pretrained(BACKBONE).eval()
    processor = ViltProcessor.from_pretrained(BACKBONE)

    def features(split, count):
        scenes = SceneMaker(split).make(count, rng())
        images = [Image.fromarray(image) for image in scenes.images]
        pixels = processor.image_processor(images, return_tensors="pt")["pixel_values"]
        embeddings = model.embeddings
        patches = embeddings.patch_embeddings(pixels).flatten(2).transpose(1, 2)
        image = torch.cat([embeddings.cls_token.expand(count, -1, -1), patches], dim=1) + embeddings.position_embeddings
        text = torch.tensor([[tokenizer.cls_token_id, tokenizer.sep_token_id]]).expand(count, -1)
        with torch.no_grad():
            hidden = model(text, image_embeds=image, pixel_mask=torch.ones(count, 5)).last_hidden_state[:, -4:]
        filled = torch.from_numpy(scenes.digits >= 0)
        return hidden[filled], torch.from_numpy(scenes.digits)[filled], torch.from_numpy(scenes.colors)[filled]

    tokenizer = processor.tokenizer
    train, test = features("train", 1000), features("test", 300)
    for which, least in ((1, 0.9), (2, 0.99)):
        means = torch.stack([train[0][train[which] == label].mean(0) for label in train[which].unique()])
        assert (torch.cdist(test[0], means).argmin(1) == test[which]).float().mean() >= least
