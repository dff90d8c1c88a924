"""The VQAv2 reader, its targets, scores and results file, and what it says about bad input."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import BertTokenizer, ViltConfig, ViltForQuestionAnswering, ViltImageProcessorPil, ViltProcessor

from petl_ext.tasks import vqa
from petl_ext.tasks.labels import soft_target_loss

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "what", "is", "this", "how", "many", "?"]
IMAGE_NAME = "COCO_train2014_{image_id:012d}.jpg"
SIZES = {7: (32, 48), 9: (48, 32)}  # width, height


def annotation(question_id, image_id, question_type, answers):
    return {
        "question_id": question_id,
        "image_id": image_id,
        "question_type": question_type,
        "answer_type": "other",
        "multiple_choice_answer": answers[0],
        "answers": [
            {"answer": answer, "answer_confidence": "yes", "answer_id": i + 1} for i, answer in enumerate(answers)
        ],
    }


QUESTIONS = [
    {"question_id": 7001, "image_id": 7, "question": "What is this?"},
    {"question_id": 9001, "image_id": 9, "question": "How many?"},
    {"question_id": 7002, "image_id": 7, "question": "What is this?"},
]
ANNOTATIONS = [
    annotation(9001, 9, "how many", ["two"] * 7 + ["2"] + ["3"] * 2),
    annotation(7001, 7, "what is", ["A cat."] * 3 + ["dog"] * 5 + ["cow", "pig"]),
    annotation(7002, 7, "what is", ["dog"] * 10),
]


@pytest.fixture
def files(tmp_path):
    """A question file, an annotation file and an image folder as VQAv2 has them."""
    (tmp_path / "train2014").mkdir()
    for image_id, size in SIZES.items():
        Image.new("RGB", size, (255, 0, 51)).save(tmp_path / "train2014" / IMAGE_NAME.format(image_id=image_id))
    (tmp_path / "questions.json").write_text(json.dumps({"info": {}, "questions": QUESTIONS}))
    (tmp_path / "annotations.json").write_text(json.dumps({"info": {}, "annotations": ANNOTATIONS}))
    return tmp_path


@pytest.fixture(scope="module")
def processor():
    tokenizer = BertTokenizer(vocab={word: index for index, word in enumerate(WORDS)})
    return ViltProcessor(ViltImageProcessorPil(do_resize=False, do_normalize=False, do_pad=False), tokenizer)


def dataset(files, processor, **changes):
    arguments = {
        "questions": files / "questions.json",
        "annotations": files / "annotations.json",
        "images": files / "train2014",
        "processor": processor,
        "vocabulary": vqa.AnswerVocabulary(["dog", "cat", "2"]),
    }
    return vqa.VQADataset(**arguments | changes)


@pytest.mark.parametrize(
    ("answer", "normal"),
    [
        ("  A Cat. ", "cat"),
        ("the answer is: an apple", "answer is: apple"),
        ("Two", "2"),
        ("none", "0"),
        ("ten", "10"),
        ("dont know", "don't know"),
        ("couldn'tve", "couldn't've"),
        ("Im", "im"),
        ("its", "its"),
        ("somebody'd ive hes", "somebodyd ive he's"),
        ("ow's'at", "'ow's'at"),
        ("girl's", "girl's"),
        ("2:50 pm", "2:50 pm"),
        ("100,978", "100978"),
        ("red, white", "red white"),
        ("1, 2", "1 2"),
        ("1.5", "1.5"),
        ("p.m.", "pm"),
        ("black/white", "black white"),
        ("well -known half-time", "well known halftime"),
        ("1,000-foot", "1000foot"),
        ("yes!?", "yes"),
        ("tic-tac\ttoe\n", "tic tac toe"),
        ("", ""),
    ],
)
def test_normalize_answer(answer, normal):
    assert vqa.normalize_answer(answer) == normal
    assert vqa.normalize_answer(normal) == normal


def official_accuracy(answer, annotators):
    """As the official script goes about it: nothing is normalized where all agree."""
    if len(set(annotators)) > 1:
        answer, annotators = vqa.normalize_answer(answer), [vqa.normalize_answer(given) for given in annotators]
    rest = [annotators[:left_out] + annotators[left_out + 1 :] for left_out in range(len(annotators))]
    return np.mean([min(sum(given.lower() == answer.lower() for given in nine) / 3, 1) for nine in rest])


@pytest.mark.parametrize("answer", ["cat", "the cat", "Cat", "two", "2", "dont", "don't", "a.b", " cat\n"])
def test_accuracy_is_the_official_one(answer):
    forms = ["cat", "the cat", "Cat", "two", "2", "dont", "don't", "a.b", "dog"]
    patterns = [[form] * 10 for form in forms]
    patterns += [[a] * matches + [b] * (10 - matches) for a in forms for b in forms for matches in range(1, 10)]
    for annotators in patterns:
        expected = official_accuracy(answer.strip(), annotators)
        assert vqa.answer_accuracy(answer, annotators) == pytest.approx(expected, abs=1e-12), annotators


def test_scores_are_the_mean_over_nine_of_ten_annotators():
    for matches in range(1, 10):
        annotators = ["Cat"] * matches + ["dog"] * (10 - matches)
        subsets = [annotators[:left_out] + annotators[left_out + 1 :] for left_out in range(10)]
        expected = np.mean([min(subset.count("Cat") / 3, 1) for subset in subsets])
        assert vqa.answer_accuracy("the cat", annotators) == pytest.approx(expected, abs=1e-12)


def test_soft_target():
    vocabulary = vqa.AnswerVocabulary(["dog", "cat", "2", "pig", "horse"])
    target = vocabulary.soft_target(["two", "2", "A dog", "dog", "dog.", "Dog", "dog", "pig", "cow", "cow"])
    assert target.dtype == torch.float32
    torch.testing.assert_close(target, torch.tensor([1.0, 0.0, 0.6, 0.3, 0.0]))
    three = vocabulary.soft_target(["cat"] * 3 + ["mouse"] * 7)
    torch.testing.assert_close(three, torch.tensor([0.0, 0.9, 0.0, 0.0, 0.0]))


def test_vocabulary_counts_orders_saves_and_loads(tmp_path):
    majority = ["Dog", "a dog", "two", "2", "cat", "ant", "the ant", "dog", "zebra"]
    for name, part in (("train", majority[:5]), ("val", majority[5:])):
        entries = [annotation(index, 1, "what", [answer] * 10) for index, answer in enumerate(part)]
        (tmp_path / f"{name}.json").write_text(json.dumps({"annotations": entries}))
    paths = [tmp_path / "train.json", tmp_path / "val.json"]
    vocabulary = vqa.AnswerVocabulary.from_annotations(paths, min_count=2)
    assert vocabulary.answers == ("dog", "2", "ant")
    assert vqa.AnswerVocabulary.from_annotations(paths[::-1], min_count=2).answers == vocabulary.answers
    vocabulary.save(tmp_path / "answers.json")
    assert vqa.AnswerVocabulary.load(tmp_path / "answers.json").answers == vocabulary.answers
    assert vocabulary.decode([[0.0, 2.0, 1.0], [3.0, 2.0, 1.0]]) == ["2", "dog"]
    with pytest.raises(ValueError, match=r"logits must have shape \[n, 3\], got \[1, 2\]"):
        vocabulary.decode(torch.zeros(1, 2))


@pytest.mark.parametrize("content", ["{}", '["dog", 3]', '["dog", "dog"]', "nonsense"])
def test_vocabulary_refuses_other_files(tmp_path, content):
    (tmp_path / "answers.json").write_text(content)
    with pytest.raises(ValueError, match="must be"):
        vqa.AnswerVocabulary.load(tmp_path / "answers.json")


def test_dataset_items(files, processor):
    data = dataset(files, processor)
    assert len(data) == 3
    item = data[0]
    assert item["input_ids"] == [2, 5, 6, 7, 10, 3]
    assert item["pixel_values"].shape == (3, 48, 32)
    # JPEG keeps one color to a few steps of 255
    torch.testing.assert_close(item["pixel_values"].mean((1, 2)), torch.tensor([1.0, 0.0, 0.2]), atol=0.02, rtol=0)
    torch.testing.assert_close(item["labels"], torch.tensor([1.0, 0.9, 0.0]))
    torch.testing.assert_close(data[1]["labels"], torch.tensor([0.0, 0.0, 1.0]))


def test_dataset_without_annotations_has_no_labels(files, processor):
    assert "labels" not in dataset(files, processor, annotations=None)[0]


def test_dataset_cuts_long_questions(files, processor):
    assert dataset(files, processor, max_length=4)[0]["input_ids"] == [2, 5, 6, 3]


def test_cached_images_are_read_once(files, processor):
    data = dataset(files, processor, cache_images=True)
    first = data[0]["pixel_values"]
    assert data[2]["pixel_values"] is first
    assert dataset(files, processor)[0]["pixel_values"].equal(first)


def test_collator_pads_and_vilt_takes_the_batch(files, processor):
    data = dataset(files, processor)
    batch = vqa.VQACollator(processor)([data[0], data[1]])
    assert batch["input_ids"].tolist() == [[2, 5, 6, 7, 10, 3], [2, 8, 9, 10, 3, 0]]
    assert batch["attention_mask"].tolist() == [[1] * 6, [1] * 5 + [0]]
    assert batch["pixel_values"].shape == (2, 3, 48, 48)
    assert batch["pixel_mask"].sum((1, 2)).tolist() == [48 * 32, 48 * 32]
    assert batch["pixel_mask"][0, :, 32:].sum() == 0 and batch["pixel_mask"][1, 32:].sum() == 0
    assert batch["pixel_values"][0, :, :, 32:].abs().sum() == 0
    assert batch["labels"].shape == (2, 3)

    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1}
    config = ViltConfig(**sizes, vocab_size=len(WORDS), image_size=48, patch_size=16, num_labels=3)
    torch.manual_seed(0)
    output = ViltForQuestionAnswering(config)(**batch)
    torch.testing.assert_close(output.loss, soft_target_loss(output.logits, batch["labels"]))


def test_loss_and_score_by_hand():
    logits = torch.tensor([[0.0, 1.0], [2.0, -1.0]])
    targets = torch.tensor([[0.3, 0.9], [0.0, 1.0]])
    terms = [[0.693147, 0.313262 + 0.1], [2.126928, 1.313262]]  # log(1 + e^z) - t z
    assert soft_target_loss(logits, targets).item() == pytest.approx(np.sum(terms) / 2, abs=1e-5)
    assert vqa.vqa_score(logits, targets) == pytest.approx((0.9 + 0.0) / 2)
    prediction = SimpleNamespace(predictions=logits.numpy(), label_ids=targets.numpy())
    assert vqa.compute_metrics(prediction) == {"vqa_score": pytest.approx(0.45)}


def test_accuracy_by_type_by_hand(files, processor):
    data = dataset(files, processor)
    by_type = vqa.accuracy_by_type(["cat", "3", "dog"], data.annotations)
    assert list(by_type) == ["how many", "what is"]
    assert by_type["how many"] == vqa.TypeAccuracy(1, pytest.approx(0.6), pytest.approx(1.0))
    # majority answers of "what is": cat and dog, once each; "cat" comes first and is worth 0.9 and 0
    assert by_type["what is"] == vqa.TypeAccuracy(2, pytest.approx((0.9 + 1) / 2), pytest.approx(0.45))
    with pytest.raises(ValueError, match="answers must be 3, one per annotation, got 1"):
        vqa.accuracy_by_type(["cat"], data.annotations)


def test_results_file(files, processor):
    questions = vqa.read_questions(files / "questions.json")
    path = files / "results.json"
    vqa.write_results(path, questions, ["cat", "2", "dog"])
    expected = [(7001, "cat"), (9001, "2"), (7002, "dog")]
    assert json.loads(path.read_text()) == [{"question_id": number, "answer": answer} for number, answer in expected]


def test_results_file_is_written_whole_or_not_at_all(files):
    questions = vqa.read_questions(files / "questions.json")
    path = files / "results.json"
    path.write_text("before")
    names = {entry.name for entry in files.iterdir()}
    with pytest.raises(TypeError):
        vqa.write_results(path, questions, ["cat", "2", object()])
    with pytest.raises(ValueError, match="answers must be 3, one per question, got 2"):
        vqa.write_results(path, questions, ["cat", "2"])
    assert path.read_text() == "before"
    assert {entry.name for entry in files.iterdir()} == names


def test_missing_image_is_named_at_once(files, processor):
    missing = files / "train2014" / IMAGE_NAME.format(image_id=9)
    missing.unlink()
    with pytest.raises(FileNotFoundError, match=rf"{missing.name}.* question_id 9001 .*1 of 3 questions"):
        dataset(files, processor)
    with pytest.raises(FileNotFoundError, match="must be the folder of the images"):
        dataset(files, processor, images=files / "val2014")


@pytest.mark.parametrize("content", [b"", b"not an image", None])
def test_broken_image_is_named(files, processor, content):
    path = files / "train2014" / IMAGE_NAME.format(image_id=9)
    path.write_bytes(path.read_bytes()[:300] if content is None else content)
    with pytest.raises(ValueError, match=rf"{path.name} must be an image \(image_id 9, question_id 9001\)"):
        dataset(files, processor)[1]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "must be a JSON file"),
        ("[]", "must be a JSON object with a list under 'questions', got list"),
        ('{"annotations": []}', r"a list under 'questions', got \['annotations'\]"),
        ('{"questions": [3]}', r"questions\[0\] must be a JSON object, got 3"),
        ('{"questions": [{"question_id": 5, "image_id": 1}]}', r"\(question_id 5\) must have the field 'question'"),
        (
            '{"questions": [{"question_id": 5, "image_id": "1", "question": "?"}]}',
            r"\(question_id 5\): 'image_id' must be int, got '1'",
        ),
        (json.dumps({"questions": QUESTIONS[:1] * 2}), r"questions\[1\] \(question_id 7001\) must come once"),
    ],
)
def test_malformed_questions_file(tmp_path, content, message):
    (tmp_path / "questions.json").write_text(content)
    with pytest.raises(ValueError, match=rf"questions\.json\b.*{message}"):
        vqa.read_questions(tmp_path / "questions.json")


@pytest.mark.parametrize(
    ("answers", "message"),
    [
        ("cat", "'answers' must be list, got 'cat'"),
        ([{"answer": "cat"}] * 9, "must have 10 'answers', got 9"),
        (
            [{"answer": "cat"}] * 9 + [{"answer": 3}],
            r"answers\[9\] must be an object with a string 'answer', got {'answer': 3}",
        ),
        (["cat"] * 10, r"answers\[0\] must be an object with a string 'answer', got 'cat'"),
    ],
)
def test_answers_of_the_wrong_form(tmp_path, answers, message):
    (tmp_path / "annotations.json").write_text(json.dumps({"annotations": [ANNOTATIONS[0] | {"answers": answers}]}))
    with pytest.raises(ValueError, match=rf"annotations\[0\] \(question_id 9001\):? {message}"):
        vqa.read_annotations(tmp_path / "annotations.json")


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        (ANNOTATIONS[1:], "question_id 9001 must have image_id 9 .* got no annotation"),
        (
            [*ANNOTATIONS, annotation(9999, 9, "what is", ["x"] * 10)],
            "question_id 9999 must have image_id of no question",
        ),
        ([ANNOTATIONS[0] | {"image_id": 8}, *ANNOTATIONS[1:]], "question_id 9001 must have image_id 9 .* got 8"),
    ],
)
def test_annotations_of_other_questions(files, processor, entries, message):
    (files / "annotations.json").write_text(json.dumps({"annotations": entries}))
    with pytest.raises(ValueError, match=message):
        dataset(files, processor)
