"""The GQA reader, its vocabulary, metrics and predictions file, and what it says about bad input."""

import json
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from transformers import BertTokenizer, CLIPImageProcessorPil, ViltImageProcessorPil, ViltProcessor

from petl_ext.tasks import gqa
from petl_ext.tasks.inputs import TextAndImage

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "is", "the", "cat", "what", "color", "?"]
# In the form of train_balanced_questions.json, with what readers do not need.
QUESTIONS = {
    "02930152": {
        "semantic": [{"operation": "select", "dependencies": [], "argument": "sky (2486325)"}],
        "entailed": ["02930160"],
        "equivalent": ["02930152"],
        "question": "What color is the cat?",
        "imageId": "2354786",
        "isBalanced": True,
        "groups": {"global": None, "local": "06-sky_dark"},
        "answer": "T-shirt blue",
        "semanticStr": "select: sky (2486325)->query: color [0]",
        "annotations": {"answer": {}, "question": {"2": "2486325"}, "fullAnswer": {"2": "2486325"}},
        "types": {"detailed": "colorQuery", "semantic": "attr", "structural": "query"},
        "fullAnswer": "The cat is blue.",
    },
    "07333408": {
        "question": "Is the cat?",
        "imageId": "n161313",
        "answer": "yes",
        "types": {"detailed": "existVerify", "semantic": "obj", "structural": "verify"},
    },
    "07333405": {
        "question": "Is the cat the cat?",
        "imageId": "2354786",
        "answer": "no",
        "types": {"detailed": "relVerify", "semantic": "rel", "structural": "verify"},
    },
}
SIZES = {"2354786": (32, 48), "n161313": (48, 32)}  # width, height


@pytest.fixture
def files(tmp_path):
    (tmp_path / "images").mkdir()
    for image_id, size in SIZES.items():
        Image.new("RGB", size, (255, 0, 51)).save(tmp_path / "images" / f"{image_id}.jpg")
    (tmp_path / "questions.json").write_text(json.dumps(QUESTIONS))
    return tmp_path


@pytest.fixture(scope="module")
def tokenizer():
    return BertTokenizer(vocab={word: index for index, word in enumerate(WORDS)})


@pytest.fixture(scope="module")
def processor(tokenizer):
    return ViltProcessor(ViltImageProcessorPil(do_resize=False, do_normalize=False, do_pad=False), tokenizer)


@pytest.fixture(scope="module")
def pair(tokenizer):
    """A text model's tokenizer and CLIP's image processor."""
    size = {"shortest_edge": 24}
    return TextAndImage(tokenizer, CLIPImageProcessorPil(size=size, crop_size={"height": 24, "width": 24}))


def dataset(files, processor, **changes):
    arguments = {
        "questions": files / "questions.json",
        "images": files / "images",
        "processor": processor,
        "vocabulary": gqa.GQAVocabulary(["no", "yes"]),
    }
    return gqa.GQADataset(**arguments | changes)


def refused(path, content, message):
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(ValueError, match=message):
        gqa.read_questions(path)


def test_questions_are_read_in_order(files):
    questions = gqa.read_questions(files / "questions.json")
    assert questions[0] == gqa.Question(
        "02930152", "2354786", "What color is the cat?", "T-shirt blue", "query", "attr"
    )
    assert [question.question_id for question in questions] == list(QUESTIONS)
    assert [question.form for question in questions] == ["open", "binary", "binary"]


def test_a_folder_of_files_is_one_list(tmp_path):
    for name, key in (("train_all_questions_1", "07333405"), ("train_all_questions_0", "07333408")):
        (tmp_path / f"{name}.json").write_text(json.dumps({key: QUESTIONS[key]}))
    (tmp_path / "readme.txt").write_text("not a file of questions")
    assert [question.question_id for question in gqa.read_questions(tmp_path)] == ["07333408", "07333405"]
    (tmp_path / "train_all_questions_2.json").write_text(json.dumps({"07333408": QUESTIONS["07333408"]}))
    with pytest.raises(ValueError, match=r"_2\.json: question_id 07333408 must come once"):
        gqa.read_questions(tmp_path)


def test_an_empty_folder_and_a_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"must be a folder of \.json files, got none"):
        gqa.read_questions(tmp_path)
    with pytest.raises(FileNotFoundError):
        gqa.read_questions(tmp_path / "questions.json")


def test_a_truncated_file_is_refused_wherever_it_ends(tmp_path):
    text = json.dumps(QUESTIONS)
    for end in range(0, len(text), 97):
        refused(tmp_path / "questions.json", text[:end], r"questions\.json must be a JSON file")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[]", r"must be a JSON object of questions by question_id, got \[\]"),
        ("{}", "must be a JSON object of questions by question_id, got {}"),
        ({"questions": [QUESTIONS["07333405"]]}, "must be a JSON object of questions by question_id"),
        ('{"5": {}, "5": {}}', "the key '5' twice"),
        ({"5": {"imageId": "1"}}, r"question_id 5 must have the field 'question', got only \['imageId'\]"),
        ({"5": {"question": "?"}}, "question_id 5 must have the field 'imageId'"),
        ({"5": {"question": "?", "imageId": 7}}, "question_id 5: 'imageId' must be str, got 7"),
        ({"5": {"question": "?", "imageId": "7", "answer": 3}}, "question_id 5: 'answer' must be str, got 3"),
        ({"5": {"question": "?", "imageId": "7", "types": "attr"}}, "question_id 5: 'types' must be dict"),
        (
            {"5": {"question": "?", "imageId": "7", "types": {"semantic": "attr"}}},
            "question_id 5: types must have the field 'structural'",
        ),
    ],
)
def test_malformed_file(tmp_path, content, message):
    refused(tmp_path / "questions.json", content, rf"questions\.json\b.*{message}")


def test_vocabulary_is_built_from_answers_as_written(tmp_path):
    answers = ["no", "yes", "t-shirt", "yes", "apple", "no", "apple", "T-shirt"]
    for name, part in (("a", answers[:5]), ("b", answers[5:])):
        entries = {f"{name}{at}": QUESTIONS["07333405"] | {"answer": answer} for at, answer in enumerate(part)}
        (tmp_path / f"{name}.json").write_text(json.dumps(entries))
    paths = [tmp_path / "b.json", tmp_path / "a.json"]
    vocabulary = gqa.GQAVocabulary.from_questions(paths)
    assert vocabulary.answers == ("apple", "no", "yes", "T-shirt", "t-shirt")
    assert gqa.GQAVocabulary.from_questions(paths, min_count=2).answers == ("apple", "no", "yes")
    vocabulary.save(tmp_path / "answers.json")
    loaded = gqa.GQAVocabulary.load(tmp_path / "answers.json")
    assert isinstance(loaded, gqa.GQAVocabulary) and loaded.answers == vocabulary.answers
    assert loaded.label("yes") == 2 and loaded.label("Yes") == gqa.IGNORED == -100
    assert loaded.decode([[0.0, 2.0, 1.0, 0.0, 0.0]]) == ["no"]


def test_vocabulary_needs_answers(tmp_path):
    unanswered = {"5": {"question": "?", "imageId": "1"}}
    (tmp_path / "test.json").write_text(json.dumps(unanswered))
    with pytest.raises(ValueError, match=r"test\.json: question_id 5 must have the field 'answer', got none; 1 of 1"):
        gqa.GQAVocabulary.from_questions([tmp_path / "test.json"])


def test_dataset_items(files, processor):
    data = dataset(files, processor)
    assert len(data) == 3
    assert data[0]["input_ids"] == [2, 8, 9, 5, 6, 7, 10, 3]
    assert data[0]["pixel_values"].shape == (3, 48, 32)
    # JPEG keeps one color to a few steps of 255
    torch.testing.assert_close(data[0]["pixel_values"].mean((1, 2)), torch.tensor([1.0, 0.0, 0.2]), atol=0.02, rtol=0)
    assert [item["labels"] for item in map(data.__getitem__, range(3))] == [-100, 1, 0]
    assert dataset(files, processor, max_length=4)[0]["input_ids"] == [2, 8, 9, 3]


def test_cached_images_are_read_once(files, processor):
    data = dataset(files, processor, cache_images=True)
    assert data[2]["pixel_values"] is data[0]["pixel_values"]


def test_strict_refuses_an_unknown_answer(files, processor):
    with pytest.raises(ValueError, match=r"02930152 must have .* 2 answers .* got 'T-shirt blue'; 1 of 3 questions"):
        dataset(files, processor, strict=True)
    known = gqa.GQAVocabulary(["no", "yes", "T-shirt blue"])
    assert dataset(files, processor, strict=True, vocabulary=known)[0]["labels"] == 2


def test_a_test_file_has_no_labels(files, processor):
    without = {key: {"question": entry["question"], "imageId": entry["imageId"]} for key, entry in QUESTIONS.items()}
    (files / "questions.json").write_text(json.dumps(without))
    data = dataset(files, processor, strict=True)
    assert "labels" not in data[0]
    with pytest.raises(ValueError, match="question_id 02930152 must have the field 'answer'"):
        gqa.accuracy_by_type(["yes"] * 3, data.questions)
    with pytest.raises(ValueError, match="question_id 02930152 must have the field 'answer'"):
        gqa.accuracy(["yes"] * 3, data.questions)
    (files / "questions.json").write_text(json.dumps(without | {"9": QUESTIONS["07333405"]}))
    with pytest.raises(ValueError, match="question_id 02930152 must have the field 'answer', got none; 3 of 4"):
        dataset(files, processor)


def test_collator_of_a_vilt_processor(files, processor):
    data = dataset(files, processor)
    batch = gqa.GQACollator(processor)([data[0], data[1]])
    assert batch["input_ids"].tolist() == [[2, 8, 9, 5, 6, 7, 10, 3], [2, 5, 6, 7, 10, 3, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1] * 8, [1] * 6 + [0] * 2]
    assert batch["pixel_values"].shape == (2, 3, 48, 48) and batch["pixel_mask"].sum((1, 2)).tolist() == [48 * 32] * 2
    assert batch["labels"].dtype == torch.int64 and batch["labels"].tolist() == [-100, 1]


def test_collator_of_two_models_makes_no_pixel_mask(files, pair):
    data = dataset(files, pair)
    batch = gqa.GQACollator(pair)([data[0], data[1]])
    assert set(batch) == {"input_ids", "attention_mask", "token_type_ids", "pixel_values", "labels"}
    assert batch["pixel_values"].shape == (2, 3, 24, 24)


def test_collator_pads_to_a_given_length(files, pair):
    data = dataset(files, pair)
    batch = gqa.GQACollator(pair, text_length=16)([data[0], data[1]])
    assert batch["input_ids"].shape == (2, 16) and batch["attention_mask"].sum(1).tolist() == [8, 6]
    with pytest.raises(ValueError, match="text_length must be at least 8, the longest text, got 7"):
        gqa.GQACollator(pair, text_length=7)([data[0], data[1]])


def test_images_of_two_sizes_need_a_pixel_mask(files, tokenizer):
    uncropped = TextAndImage(tokenizer, CLIPImageProcessorPil(do_resize=False, do_center_crop=False))
    data = dataset(files, uncropped)
    with pytest.raises(ValueError, match=r"must have one size .* without 'pixel_mask', got \[\(32, 48\), \(48, 32\)\]"):
        gqa.GQACollator(uncropped)([data[0], data[1]])


def test_loss_and_metrics_by_hand():
    logits = torch.tensor([[0.0, 1.0], [2.0, -1.0], [5.0, 0.0]], requires_grad=True)
    labels = torch.tensor([1, 1, gqa.IGNORED])
    loss = gqa.label_loss(logits, labels)
    assert loss.item() == pytest.approx((0.313262 + 3.048587) / 2, abs=1e-5)  # log(1 + e^-1), log(1 + e^3)
    prediction = SimpleNamespace(predictions=logits.detach().numpy(), label_ids=labels.numpy())
    assert gqa.compute_metrics(prediction) == {"accuracy": pytest.approx(1 / 3)}
    loss = gqa.label_loss(logits, torch.full((3,), gqa.IGNORED))
    loss.backward()
    assert loss.item() == 0 and logits.grad.abs().sum() == 0


def test_accuracy_by_hand(files):
    questions = gqa.read_questions(files / "questions.json")
    answers = ["t-shirt blue", "yes", "yes"]  # the first differs in a capital: the evaluation is exact
    assert gqa.accuracy(answers, questions) == pytest.approx(1 / 3)
    assert gqa.accuracy_by_type(answers, questions) == {
        "query": gqa.TypeAccuracy(1, 0.0, 1.0),
        "verify": gqa.TypeAccuracy(2, 0.5, 0.5),
    }
    assert {
        question_type: by.accuracy for question_type, by in gqa.accuracy_by_type(answers, questions, "semantic").items()
    } == {
        "attr": 0.0,
        "obj": 1.0,
        "rel": 0.0,
    }
    assert gqa.accuracy_by_type(answers, questions, "form")["binary"].count == 2
    with pytest.raises(ValueError, match=r"types must be one of .*'semantic', 'form'\), got 'detailed'"):
        gqa.accuracy_by_type(answers, questions, "detailed")
    with pytest.raises(ValueError, match="answers must be 3, one per question, got 1"):
        gqa.accuracy(["yes"], questions)
    untyped = [gqa.Question("5", "7", "?", "yes")]
    with pytest.raises(ValueError, match="image_id 7, question_id 5 must have a semantic type, got none"):
        gqa.accuracy_by_type(["yes"], untyped, "semantic")


def test_predictions_file_is_written_whole_or_not_at_all(files):
    questions = gqa.read_questions(files / "questions.json")
    path = files / "predictions.json"
    gqa.write_predictions(path, questions, ["blue", "yes", "no"])
    expected = [("02930152", "blue"), ("07333408", "yes"), ("07333405", "no")]
    assert json.loads(path.read_text()) == [{"questionId": key, "prediction": answer} for key, answer in expected]
    before = path.read_bytes()
    names = {entry.name for entry in files.iterdir()}
    with pytest.raises(ValueError, match="answers must be 3, one per question, got 2"):
        gqa.write_predictions(path, questions, ["blue", "yes"])
    with pytest.raises(TypeError):
        gqa.write_predictions(path, questions, ["blue", "yes", object()])
    assert path.read_bytes() == before and {entry.name for entry in files.iterdir()} == names


def test_missing_and_broken_images_are_named(files, processor):
    path = files / "images" / "n161313.jpg"
    path.write_bytes(path.read_bytes()[:300])
    with pytest.raises(ValueError, match=r"n161313\.jpg must be an image \(image_id n161313, question_id 07333408\)"):
        dataset(files, processor)[1]
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"n161313\.jpg must be .* question_id 07333408 \(1 of 3 questions"):
        dataset(files, processor)
    with pytest.raises(FileNotFoundError, match="must be the folder of the images"):
        dataset(files, processor, images=files / "allImages")


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("image.jpg", r"image_name must be a file name with \{image_id\} in it.*, got 'image.jpg'"),
        ("{imageid}.jpg", r"and no other field, got '\{imageid\}.jpg'"),
        ("{0}.jpg", r"and no other field, got '\{0\}.jpg'"),
        ("{image_id.__class__}.jpg", "and no other field"),
        ("{image_id}_{split}.jpg", "and no other field"),
        ("{image_id.jpg", r"got '\{image_id.jpg': expected '\}' before end of string"),
        (
            "{image_id:012d}.jpg",
            r"image_name must fit every image_id, '\d+' \(image_id .*\) too, got '\{image_id:012d\}.jpg'",
        ),
    ],
)
def test_a_mistyped_pattern_of_file_names(files, processor, pattern, message):
    with pytest.raises(ValueError, match=message):
        dataset(files, processor, image_name=pattern)
