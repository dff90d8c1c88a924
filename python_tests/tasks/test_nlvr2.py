"""The NLVR2 reader, its accuracy and consistency, the predictions file, and what it says about bad input."""

import json
import pickle

import pytest
import tiny_meter
import torch
import torch.nn.functional as F
from PIL import Image
from transformers import (
    BertTokenizer,
    CLIPImageProcessorPil,
    Trainer,
    TrainingArguments,
    ViltConfig,
    ViltForImagesAndTextClassification,
    ViltImageProcessorPil,
    ViltProcessor,
)

from petl_ext.tasks import nlvr2
from petl_ext.tasks.inputs import TextAndImage

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "two", "dogs", "are", "left", "."]
ROWS = [
    ("train-10171-0-0", "Two dogs.", "True"),
    ("train-10171-1-0", "Two dogs.", "False"),
    ("train-10171-0-1", "Dogs are left.", "False"),
    ("train-4-0-0", "Two.", "True"),
]
COLORS = {"train-10171-0": (255, 51), "train-10171-1": (102, 204), "train-4-0": (0, 153)}  # red of the left, the right


def official(identifier, sentence, label, **more):
    """A line of train.json, as the repository's README describes it."""
    row = {"sentence": sentence, "left_url": "http://a", "identifier": identifier, "label": label, "writer": "104"}
    return row | {"right_url": "http://b", "synset": "dog", "query": "dogs1", "validation": {"1": "True"}} | more


def write_rows(path, rows, **more):
    path.write_text("".join(json.dumps(official(*row, **more)) + "\n" for row in rows))
    return path


@pytest.fixture
def files(tmp_path):
    (tmp_path / "images").mkdir()
    for pair, reds in COLORS.items():
        for side, (red, size) in enumerate(zip(reds, [(32, 48), (48, 32)], strict=True)):
            Image.new("RGB", size, (red, 0, 0)).save(tmp_path / "images" / f"{pair}-img{side}.png")
    write_rows(tmp_path / "train.json", ROWS)
    return tmp_path


@pytest.fixture(scope="module")
def processor():
    tokenizer = BertTokenizer(vocab={word: index for index, word in enumerate(WORDS)})
    return ViltProcessor(ViltImageProcessorPil(do_resize=False, do_normalize=False, do_pad=False), tokenizer)


def dataset(files, processor, **changes):
    arguments = {"examples": files / "train.json", "images": files / "images", "processor": processor}
    return nlvr2.NLVR2Dataset(**arguments | changes)


def refused(path, content, message):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=message):
        nlvr2.read_examples(path)


def test_rows_in_the_order_of_the_file(files):
    examples = nlvr2.read_examples(files / "train.json")
    assert [(it.line, it.identifier, it.sentence, it.label) for it in examples] == [
        (line, *row) for line, row in enumerate(ROWS, start=1)
    ]
    assert examples[2].sentence_id == ("train", "10171", "1")
    assert [image.image_id for image in examples[2].images] == ["train-10171-0-img0", "train-10171-0-img1"]


def test_items_hold_both_images_and_batches_pad_them(files, processor):
    data = dataset(files, processor)
    item = data[1]
    assert item["labels"] == 0 and item["input_ids"] == [2, 5, 6, 9, 3]
    reds = [(image[0, 0, 0].item(), tuple(image.shape)) for image in item["pixel_values"]]
    assert reds == [(pytest.approx(0.4), (3, 48, 32)), (pytest.approx(0.8), (3, 32, 48))]
    batch = nlvr2.NLVR2Collator(processor)([data[0], data[3]])
    assert batch["labels"].tolist() == [1, 1]
    assert batch["pixel_values"].shape == (2, 2, 3, 48, 48) and batch["pixel_mask"].shape == (2, 2, 48, 48)
    assert batch["pixel_values"][:, :, 0, 0, 0].flatten().tolist() == pytest.approx([1, 0.2, 0, 0.6])
    assert batch["pixel_mask"].sum((2, 3)).tolist() == [[32 * 48] * 2] * 2
    assert batch["pixel_mask"][0, 0, :, 31:33].tolist() == [[1, 0]] * 48
    assert batch["pixel_mask"][0, 1, 31:33].tolist() == [[1] * 48, [0] * 48]


def test_images_in_the_folders_of_train_s_archive(files, processor):
    folder = files / "images" / "77"
    folder.mkdir()
    for path in (files / "images").glob("*.png"):
        path.rename(folder / path.name)
    write_rows(files / "train.json", ROWS, directory=77)
    assert [image[0, 0, 0].item() for image in dataset(files, processor)[0]["pixel_values"]] == pytest.approx([1, 0.2])


def test_no_image_is_read_before_it_is_used(files, processor):
    data = dataset(files, processor)
    assert len(pickle.dumps((data.examples, data.images, data._cache))) < 2000
    cached = dataset(files, processor, cache_images=True)
    assert cached[2]["pixel_values"] is cached[0]["pixel_values"]


def by_the_script(predicted, rows):
    """Accuracy and consistency from the description of the official script: identifiers without the third part."""
    groups = {}
    for label, (identifier, _, expected) in zip(predicted, rows, strict=True):
        split, image_set, _, sentence = identifier.split("-")
        groups.setdefault(f"{split}-{image_set}--{sentence}", []).append(label.lower() == expected.lower())
    right = [one for group in groups.values() for one in group]
    return sum(right) / len(right), sum(all(group) for group in groups.values()) / len(groups)


def test_accuracy_and_consistency_of_all_predictions(files):
    examples = nlvr2.read_examples(files / "train.json")
    seen = set()
    for bits in range(2 ** len(ROWS)):
        predicted = ["True" if bits >> index & 1 else "false" for index in range(len(ROWS))]
        found = nlvr2.accuracy(predicted, examples), nlvr2.consistency(predicted, examples)
        assert found == pytest.approx(by_the_script(predicted, ROWS))
        seen.add(found)
    assert len(seen) > 6 and nlvr2.consistency(["True", "False", "False", "False"], examples) == pytest.approx(2 / 3)


def test_predictions_file(files):
    examples = nlvr2.read_examples(files / "train.json")
    path = files / "predictions.csv"
    nlvr2.write_predictions(path, examples, nlvr2.LABELS.decode(torch.eye(2)[[1, 0, 0, 1]]))
    assert (
        path.read_bytes() == b"train-10171-0-0,True\ntrain-10171-1-0,False\ntrain-10171-0-1,False\ntrain-4-0-0,True\n"
    )
    assert nlvr2.read_predictions(path, examples[::-1]) == ["True", "False", "False", "True"]
    with pytest.raises(ValueError, match="predicted must be 4, one per example, got 1"):
        nlvr2.write_predictions(path, examples, ["True"])
    with pytest.raises(ValueError, match=r"predicted must be one of the labels \['False', 'True'\], got 'yes'"):
        nlvr2.consistency(["True", "True", "True", "yes"], examples)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("train-10171-0-0,True\n", r"must have a line for identifier train-10171-1-0, line 2, got none; 3 of 4"),
        ("train-10171-0-0 True\n", "line 1 must be an identifier, a comma and a label, got 'train-10171-0-0 True'"),
        ("a,True\nb,True\na,True\n", "line 3: identifier a must come once"),
        ("a,1\n", "line 1 must be one of the labels .* got '1'"),
    ],
)
def test_malformed_predictions(files, content, message):
    path = files / "predictions.csv"
    path.write_text(content)
    with pytest.raises(ValueError, match=rf"predictions\.csv.*{message}"):
        nlvr2.read_predictions(path, nlvr2.read_examples(files / "train.json"))


def test_missing_and_broken_images_are_named(files, processor):
    path = files / "images" / "train-10171-1-img1.png"
    path.write_bytes(path.read_bytes()[:40])
    where = "identifier train-10171-1-0, line 2, right"
    with pytest.raises(ValueError, match=rf"{path.name} must be an image \({where}\), got a file that cannot"):
        dataset(files, processor)[1]
    for workers in (0, 2):
        with pytest.raises(
            ValueError, match=rf"{path.name} must be .* \({where}\), got .* \(1 of 6 images cannot be decoded\)"
        ):
            dataset(files, processor).check_images(workers, progress=False)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=rf"{path.name} must be the image of {where} \(1 of 8 sides lack"):
        dataset(files, processor)
    with pytest.raises(FileNotFoundError, match="nowhere must be the folder of the images"):
        dataset(files, processor, images=files / "nowhere")


def test_a_truncated_file_names_its_last_line(tmp_path):
    first, second = (json.dumps(official(*row)) for row in ROWS[:2])
    for end in range(1, len(second), 37):
        refused(tmp_path / "a.json", f"{first}\n{second[:end]}", r"a\.json: line 2 must be a JSON object, got a line")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "must have at least one line, got an empty file"),
        ("3\n", "line 1 must be a JSON object, got 3"),
        (json.dumps([official(*row) for row in ROWS]), "line 1 must be a JSON object, got"),
        (json.dumps(official("train-1-0", "x", "True")), "line 1: 'identifier' must be split-set-pair-sentence, got"),
        (json.dumps(official("train-1-0-0", "x", "Maybe")), r"line 1: 'label' must be one of .* got 'Maybe'"),
        (json.dumps(official("train-1-0-0", "x", True)), "line 1: 'label' must be str, got True"),
        ('{"identifier": "a-1-0-0", "sentence": "x"}', "line 1 must have the field 'label', got only"),
        (b"\xef\xbb\xbf" + json.dumps(official(*ROWS[0])).encode(), "line 1 must be UTF-8 without a byte-order mark"),
        (
            "\n".join(json.dumps(official(*ROWS[0])) for _ in "ab"),
            "line 2: identifier .* must come once, got it in line 1",
        ),
    ],
)
def test_malformed_files(tmp_path, content, message):
    refused(tmp_path / "a.json", content, rf"a\.json.*{message}")


def test_a_meter_takes_the_batch(files):
    tokenizer = BertTokenizer(vocab={word: index for index, word in enumerate(WORDS)})
    tokenizer.model_input_names = ["input_ids", "attention_mask"]
    size = {"height": tiny_meter.IMAGE, "width": tiny_meter.IMAGE}
    processor = TextAndImage(tokenizer, CLIPImageProcessorPil(size=size, crop_size=size))
    data = dataset(files, processor)
    batch = nlvr2.NLVR2Collator(processor)([data[0], data[1]])
    assert set(batch) == {"input_ids", "attention_mask", "pixel_values", "labels"}
    model = tiny_meter.make_model(tiny_meter.MeterForImagesAndTextClassification, num_labels=2)
    output = model(**batch)
    expected = F.cross_entropy(output.logits, torch.tensor([1, 0]))
    torch.testing.assert_close(output.loss, expected)


def test_a_vilt_learns_it(files, processor, tmp_path):
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    torch.manual_seed(0)
    config = ViltConfig(
        **sizes, vocab_size=len(WORDS), image_size=48, patch_size=16, num_images=2, modality_type_vocab_size=3
    )
    model = ViltForImagesAndTextClassification(config)
    arguments = TrainingArguments(
        str(tmp_path / "out"),
        per_device_train_batch_size=4,
        max_steps=40,
        learning_rate=1e-2,
        remove_unused_columns=False,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
    )
    data = dataset(files, processor)
    collator = nlvr2.NLVR2Collator(processor)
    trainer = Trainer(model, arguments, collator, data, data, compute_metrics=nlvr2.compute_metrics)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    predicted = nlvr2.LABELS.decode(trainer.predict(data).predictions)
    found = trainer.evaluate()
    assert found["eval_accuracy"] == nlvr2.accuracy(predicted, data.examples)
    assert found["eval_loss"] < 0.8 * before
