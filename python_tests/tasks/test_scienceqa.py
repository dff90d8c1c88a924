"""The ScienceQA reader, its prompts, accuracy by category, the results file, and what it says about bad input."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    BertTokenizer,
    Trainer,
    TrainingArguments,
    ViltConfig,
    ViltForQuestionAnswering,
    ViltImageProcessorPil,
    ViltProcessor,
)

from petl_ext.tasks import scienceqa

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "question", "context", "options", "response", ":", "red", "blue"]
WORDS += ["which", "?", "(", ")", "a", "b", "c", "d", "e"]


def problem(**changes):
    """One entry of problems.json."""
    entry = {
        "question": "Which?",
        "choices": ["red", "blue"],
        "answer": 0,
        "hint": "",
        "image": None,
        "task": "closed choice",
        "grade": "grade2",
        "subject": "natural science",
        "topic": "physics",
        "category": "colors",
        "skill": "See",
        "lecture": "",
        "solution": "",
        "split": "test",
    }
    return entry | changes


PROBLEMS = {
    "1": problem(image="image.png", hint="red  or blue", answer=1),
    "2": problem(grade="grade7", subject="social science", lecture="One.\nTwo.", solution="Red."),
    "30": problem(image="image.png", choices=["red"], grade="grade12"),
    "4": problem(hint="blue", subject="language science", choices=list("abcde"), answer=4, grade="grade6"),
    "5": problem(split="train"),
}
SPLITS = {"train": ["5"], "test": ["30", "1", "2", "4"]}
CAPTIONS = {"captions": {"1": "a cat", "5": "a dog"}}


@pytest.fixture
def files(tmp_path):
    for name, content in (("problems", PROBLEMS), ("pid_splits", SPLITS), ("captions", CAPTIONS)):
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    for pid, red in (("1", 51), ("30", 204)):
        (tmp_path / "images" / "test" / pid).mkdir(parents=True)
        Image.new("RGB", (32, 32), (red, 0, 0)).save(tmp_path / "images" / "test" / pid / "image.png")
    return tmp_path


@pytest.fixture(scope="module")
def processor():
    tokenizer = BertTokenizer(vocab={word: index for index, word in enumerate(WORDS)})
    return ViltProcessor(ViltImageProcessorPil(do_resize=False, do_normalize=False, do_pad=False), tokenizer)


def read(files, split="test", captions=None):
    return scienceqa.read_problems(files / "problems.json", files / "pid_splits.json", split, captions)


def dataset(files, processor, **changes):
    arguments = {"problems": files / "problems.json", "splits": files / "pid_splits.json", "images": files / "images"}
    arguments |= {"processor": processor, "split": "test", "blank_size": (32, 32)}
    return scienceqa.ScienceQADataset(**arguments | changes)


def test_problems_in_the_order_of_the_splits(files):
    found = read(files, captions=files / "captions.json")
    assert [it.pid for it in found] == ["30", "1", "2", "4"]
    assert [it.image_id for it in found] == ["test/30/image.png", "test/1/image.png", "", ""]
    assert [it.context for it in found] == ["", "red  or blue a cat", "", "blue"]
    assert read(files, "train")[0].caption == ""


def test_prompts_are_lavin_s(files):
    _, first, second, third = read(files)
    assert first.text == "Question: Which?\nContext: red or blue\nOptions: (A) red (B) blue\nResponse:"
    assert second.text.split("\n")[1] == "Context: N/A"
    assert third.text.split("\n")[2] == "Options: (A) a (B) b (C) c (D) d (E) e"
    assert scienceqa.target(first) == "The answer is B."
    assert scienceqa.target(second) == "The answer is A. BECAUSE: One.\\nTwo. Red."


@pytest.mark.parametrize(
    ("output", "answer"),
    [
        ("The answer is A. BECAUSE: ...", 0),
        ("So The answer is B.", 1),
        ("The answer is C.", None),  # of two choices
        ("The answer is A. The answer is A.", None),  # the official reader wants one
        ("the answer is A.", None),
        ("", None),
    ],
)
def test_the_letter_in_what_a_model_wrote(files, output, answer):
    assert scienceqa.read_answer(output, read(files)[1]) == answer


def test_a_random_choice_for_a_missing_answer(files):
    problems = read(files) * 100
    filled = scienceqa.with_random_choices([None, 0, None, 3] * 100, problems)
    assert filled[1::4] == [0] * 100 and filled[3::4] == [3] * 100 and filled[::4] == [0] * 100
    assert 30 < sum(filled[2::4]) < 70
    assert filled == scienceqa.with_random_choices([None, 0, None, 3] * 100, problems, seed=0)
    assert filled != scienceqa.with_random_choices([None, 0, None, 3] * 100, problems, seed=1)


def by_the_script(answers, problems):
    """From the description of the official script, in percent: by the fields of problems.json."""
    fields = [
        PROBLEMS[it.pid] | {"right": PROBLEMS[it.pid]["answer"] == a} for a, it in zip(answers, problems, strict=True)
    ]
    chosen = {
        "NAT": [it for it in fields if it["subject"] == "natural science"],
        "SOC": [it for it in fields if it["subject"] == "social science"],
        "LAN": [it for it in fields if it["subject"] == "language science"],
        "TXT": [it for it in fields if it["hint"]],
        "IMG": [it for it in fields if it["image"]],
        "NO": [it for it in fields if not it["hint"] and not it["image"]],
        "G1-6": [it for it in fields if it["grade"] in ("grade1", "grade2", "grade3", "grade4", "grade5", "grade6")],
        "G7-12": [it for it in fields if int(it["grade"][5:]) > 6],
        "Avg": fields,
    }
    return {name: (len(some), sum(it["right"] for it in some) / len(some)) for name, some in chosen.items()}


def test_accuracy_by_category(files):
    problems = read(files)
    for answers in ([0, 1, 0, 4], [None, 0, 0, 4], [0, 0, 1, None], [0, 1, None, 0]):
        found = scienceqa.accuracy(answers, problems)
        assert {name: (it.count, it.accuracy) for name, it in found.items()} == by_the_script(answers, problems)
    assert found["Avg"].accuracy == 0.5 and found["NO"].accuracy == 0
    empty = scienceqa.accuracy([0], problems[:1])["SOC"]
    assert empty.count == 0 and np.isnan(empty.accuracy)
    with pytest.raises(ValueError, match="answers must be 4, one per problem, got 1"):
        scienceqa.accuracy([0], problems)


def test_a_choice_that_a_problem_has(files):
    problems = read(files)
    logits = torch.tensor([[0.0, 1, 2, 3, 4]] * 4)
    assert scienceqa.choose(logits, problems) == [0, 1, 1, 4]
    with pytest.raises(ValueError, match=r"logits must have shape \[4, 5\], got \[4, 2\]"):
        scienceqa.choose(logits[:, :2], problems)


def test_results_file(files):
    problems = read(files)
    path = files / "results.json"
    scienceqa.write_results(path, problems, [0, 0, 0, 4], {"30": "The answer is A."})
    assert json.loads(path.read_text()) == {
        "acc": 75.0,
        "correct": 3,
        "count": 4,
        "results": {"30": 0, "1": 0, "2": 0, "4": 4},
        "outputs": {"30": "The answer is A."},
    }
    before = path.read_bytes()
    for answer in (None, 2, -1):
        with pytest.raises(ValueError, match=f"answers must be indices of choices, got {answer} of 2 for pid 1"):
            scienceqa.write_results(path, problems, [0, answer, 0, 4])
    assert path.read_bytes() == before


def test_items(files, processor):
    data = dataset(files, processor)
    data.check_images(progress=False)
    assert [data[index]["labels"] for index in range(4)] == [0, 1, 0, 4]
    assert data[1]["pixel_values"][0].mean().item() == pytest.approx(0.2)
    assert data[2]["pixel_values"].shape == (3, 32, 32) and data[2]["pixel_values"].abs().sum() == 0
    batch = scienceqa.ScienceQACollator(processor)([data[1], data[2]])
    assert batch["labels"].tolist() == [1, 0] and batch["pixel_values"].shape == (2, 3, 32, 32)


def test_a_long_context_loses_its_end_and_the_options_stay(files, processor):
    whole = len(dataset(files, processor)[1]["input_ids"])
    for max_length in (whole, whole - 1, whole - 2):
        ids = dataset(files, processor, max_length=max_length)[1]["input_ids"]
        text = processor.tokenizer.decode(ids, skip_special_tokens=True)
        assert len(ids) <= max_length and text.endswith("options : ( a ) red ( b ) blue response :")
        assert ("context : red" in text) and (text.count("blue") == 2) == (max_length == whole)
    with pytest.raises(ValueError, match="max_length must leave room for the question and options of pid 1, got 9"):
        dataset(files, processor, max_length=9)[1]


def test_missing_and_broken_images_are_named(files, processor):
    path = files / "images" / "test" / "1" / "image.png"
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(ValueError, match=r"1/image\.png must be an image \(pid 1\)"):
        dataset(files, processor)[1]
    with pytest.raises(ValueError, match=r"pid 1\), got .* \(1 of 2 images cannot be decoded\)"):
        dataset(files, processor).check_images(progress=False)
    path.unlink()
    with pytest.raises(
        FileNotFoundError, match=r"1/image\.png must be the image of pid 1 \(1 of 2 problems lack theirs"
    ):
        dataset(files, processor)


def problems_with(**changes):
    return "problems", json.dumps(PROBLEMS | {"1": problem(**changes)})


@pytest.mark.parametrize(
    ("written", "message"),
    [
        (("problems", json.dumps(PROBLEMS)[:-9]), r"problems\.json must be a JSON file, got one that does not parse"),
        (("problems", "\ufeff" + json.dumps(PROBLEMS)), r"problems\.json must be a JSON file.*BOM"),
        (("problems", '{"1": {}, "1": {}}'), "an object has the key '1' twice"),
        (("problems", "[]"), r"problems\.json must be a JSON object, got \[\]"),
        (("problems", '{"30": 3}'), r"problems\.json: pid 30 must be a JSON object, got 3"),
        (("problems", "{}"), r"problems\.json must have pid 30, of 'test' in .*pid_splits\.json, got no such problem"),
        (problems_with(answer=2), "pid 1: 'answer' must be the index of one of 2 choices, got 2"),
        (problems_with(answer=None), "pid 1: 'answer' must be int, got None"),
        (problems_with(choices=[]), r"pid 1: 'choices' must be 1 to 5 strings, got \[\]"),
        (problems_with(choices=["a", 3]), r"pid 1: 'choices' must be 1 to 5 strings, got \['a', 3\]"),
        (problems_with(grade="grade13"), "pid 1: 'grade' must be one of .*, got 'grade13'"),
        (problems_with(subject="art"), "pid 1: 'subject' must be one of .*, got 'art'"),
        (problems_with(image=3), "pid 1: 'image' must be a file's name or null, got 3"),
        (("pid_splits", '{"test": ["1", "1"]}'), r"pid_splits\.json: pid 1 must come once in 'test'"),
        (("pid_splits", '{"val": ["1"]}'), "must have a list of pids, strings, under 'test', got None"),
        (("pid_splits", '{"test": [1]}'), r"must have a list of pids, strings, under 'test', got \[1\]"),
        (("captions", '{"1": "a"}'), r"captions\.json must have the field 'captions'"),
        (("captions", '{"captions": {"1": 3}}'), r"captions\.json: captions: '1' must be str, got 3"),
    ],
)
def test_malformed_files(files, written, message):
    name, content = written
    (files / f"{name}.json").write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        read(files, captions=files / "captions.json")


def test_a_vilt_learns_it(files, processor, tmp_path):
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    torch.manual_seed(0)
    config = ViltConfig(**sizes, vocab_size=len(WORDS), image_size=32, patch_size=16, num_labels=5)
    model = ViltForQuestionAnswering(config)
    data = dataset(files, processor)
    arguments = TrainingArguments(
        str(tmp_path / "out"),
        per_device_train_batch_size=4,
        max_steps=30,
        learning_rate=1e-2,
        remove_unused_columns=False,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
    )

    def loss_of(outputs, labels, num_items_in_batch=None):
        return scienceqa.label_loss(outputs.logits, labels)

    collator = scienceqa.ScienceQACollator(processor)
    trainer = Trainer(
        model, arguments, collator, data, data, compute_loss_func=loss_of, compute_metrics=scienceqa.compute_metrics
    )
    trainer.train()
    logits = trainer.predict(data).predictions
    assert scienceqa.accuracy(scienceqa.choose(logits, data.problems), data.problems)["Avg"].accuracy >= 0.75
    prediction = SimpleNamespace(predictions=logits, label_ids=np.array([0, 1, 0, 4]))
    assert scienceqa.compute_metrics(prediction)["accuracy"] > 0.5
