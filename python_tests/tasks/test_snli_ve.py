"""The SNLI-VE readers (official jsonl, OFA's tsv), metrics, and what they say about bad input."""

import base64
import io
import json
import pickle
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import BertTokenizer, ViltImageProcessorPil, ViltProcessor

from petl_ext.tasks import snli_ve

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "two", "dogs", "are", "people", "run", "."]
COLORS = {"4705552913": (255, 0, 51), "2407214681": (0, 255, 102)}
ROWS = [
    ("4705552913", "4705552913.jpg#2r1n", "Two dogs run.", "neutral"),
    ("2407214681", "2407214681.jpg#0r1c", "Two people.", "contradiction"),
    ("4705552913", "4705552913.jpg#2r1e", "Dogs are.", "-"),
    ("4705552913", "4705552913.jpg#1r1e", "Dogs run.", "entailment"),
]


def official(image_id, pair_id, hypothesis, label):
    """A line of snli_ve_train.jsonl, whose keys SNLI and SNLI-VE's generator define."""
    return {
        "Flickr30K_ID": image_id,
        "annotator_labels": [label, "neutral"],
        "captionID": f"{image_id}.jpg#2",
        "gold_label": label,
        "pairID": pair_id,
        "sentence1": "Two women.",
        "sentence1_binary_parse": "( Two women )",
        "sentence1_parse": "(ROOT (NP (CD Two) (NNS women)))",
        "sentence2": hypothesis,
        "sentence2_binary_parse": "( x )",
        "sentence2_parse": "(ROOT x)",
    }


def png(color):
    """A noisy picture of a color: its base64 has both + and /."""
    noise = np.random.default_rng(0).integers(0, 20, size=(64, 48, 1))
    stream = io.BytesIO()
    Image.fromarray(np.clip(np.array(color) - noise, 0, 255).astype(np.uint8)).save(stream, "PNG")
    return stream.getvalue()


def tsv_lines(encode):
    return [
        b"\t".join(
            [pair_id.encode(), image_id.encode(), encode(png(COLORS[image_id])), text.encode(), b"Two women.", label]
        )
        for image_id, pair_id, text, label in [(*row[:3], row[3].encode()) for row in ROWS]
    ]


@pytest.fixture
def files(tmp_path):
    (tmp_path / "images").mkdir()
    for image_id, color in COLORS.items():
        Image.new("RGB", (48, 64), color).save(tmp_path / "images" / f"{image_id}.jpg")
    lines = [json.dumps(official(*row)) for row in ROWS]
    (tmp_path / "snli_ve_dev.jsonl").write_text("\n".join(lines) + "\n")
    (tmp_path / "snli_ve_dev.tsv").write_bytes(b"\n".join(tsv_lines(base64.urlsafe_b64encode)) + b"\n")
    return tmp_path


@pytest.fixture(scope="module")
def processor():
    tokenizer = BertTokenizer(vocab={word: index for index, word in enumerate(WORDS)})
    return ViltProcessor(ViltImageProcessorPil(do_resize=False, do_normalize=False, do_pad=False), tokenizer)


def official_dataset(files, processor, **changes):
    arguments = {"pairs": files / "snli_ve_dev.jsonl", "images": files / "images", "processor": processor}
    return snli_ve.SNLIVEDataset(**arguments | changes)


def tsv_dataset(files, processor, **changes):
    arguments = {"pairs": files / "snli_ve_dev.tsv", "images": None, "processor": processor}
    return snli_ve.SNLIVEDataset(**arguments | changes)


def refused(path, content, message):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=message):
        snli_ve.read_pairs(path)


def test_labels_are_those_of_dvp():
    assert snli_ve.LABELS.index == {"contradiction": 0, "neutral": 1, "entailment": 2}


@pytest.mark.parametrize("name", ["snli_ve_dev.jsonl", "snli_ve_dev.tsv"])
def test_rows_without_a_label_are_left_out_and_counted(files, name):
    pairs = snli_ve.read_pairs(files / name)
    assert pairs.left_out == 1
    expected = [(line, *row) for line, row in enumerate(ROWS, start=1) if row[3] != "-"]
    assert [(it.line, it.image_id, it.pair_id, it.hypothesis, it.label) for it in pairs.labeled] == expected


def test_the_image_field_of_early_files(tmp_path):
    entry = official(*ROWS[0])
    entry["Flikr30kID"] = entry.pop("Flickr30K_ID") + ".jpg"
    (tmp_path / "early.jsonl").write_text(json.dumps(entry))
    assert snli_ve.read_pairs(tmp_path / "early.jsonl").labeled[0].image_id == "4705552913"


def test_maybe_is_neutral(tmp_path):
    (tmp_path / "a.tsv").write_bytes(b"1\t2\tabc\tDogs run.\tcaption\tmaybe")
    pairs = snli_ve.read_pairs(tmp_path / "a.tsv")
    assert [pair.label for pair in pairs.labeled] == ["neutral"]


def test_items_of_official_files(files, processor):
    data = official_dataset(files, processor)
    assert len(data) == 3 and data.left_out == 1
    assert [data[index]["labels"] for index in range(3)] == [1, 0, 2]
    assert data[0]["input_ids"] == [2, 5, 6, 9, 10, 3]
    # JPEG keeps one color to a few steps of 255
    torch.testing.assert_close(data[1]["pixel_values"].mean((1, 2)), torch.tensor([0.0, 1.0, 0.4]), atol=0.02, rtol=0)
    batch = snli_ve.SNLIVECollator(processor)([data[0], data[1]])
    assert batch["labels"].tolist() == [1, 0] and batch["pixel_values"].shape == (2, 3, 64, 48)
    assert batch["input_ids"].tolist() == [[2, 5, 6, 9, 10, 3], [2, 5, 8, 10, 3, 0]]


@pytest.mark.parametrize("encode", [base64.urlsafe_b64encode, base64.b64encode])
@pytest.mark.parametrize("newline", [b"\n", b"\r\n"])
def test_items_of_a_tsv(files, processor, encode, newline):
    lines = tsv_lines(encode)
    images = b"".join(line.split(b"\t")[2] for line in lines)
    assert all(mark in images for mark in (b"-_" if encode is base64.urlsafe_b64encode else b"+/"))
    (files / "snli_ve_dev.tsv").write_bytes(newline.join(lines) + newline)
    data = tsv_dataset(files, processor)
    for index, row in enumerate([ROWS[0], ROWS[1], ROWS[3]]):
        pixels = np.array(Image.open(io.BytesIO(png(COLORS[row[0]]))), dtype=np.float32) / 255
        expected = torch.from_numpy(pixels).permute(2, 0, 1)
        torch.testing.assert_close(data[index]["pixel_values"], expected)
        assert data[index]["labels"] == snli_ve.LABELS.index[row[3]]


def test_no_image_of_a_tsv_stays_in_memory(files, processor):
    data = tsv_dataset(files, processor)
    assert (files / "snli_ve_dev.tsv").stat().st_size > 10_000
    data[0]
    assert len(pickle.dumps((data.pairs, data.images, data._cache))) < 1000
    cached = tsv_dataset(files, processor, cache_images=True)
    assert cached[2]["pixel_values"] is cached[0]["pixel_values"]


def test_workers_read_a_tsv(files, processor):
    data = tsv_dataset(files, processor)
    collator = snli_ve.SNLIVECollator(processor)
    batches = list(torch.utils.data.DataLoader(data, batch_size=2, num_workers=2, collate_fn=collator))
    assert torch.cat([batch["labels"] for batch in batches]).tolist() == [1, 0, 2]
    assert batches[0]["pixel_values"][1].equal(data[1]["pixel_values"])


def test_images_are_where_the_format_has_them(files, processor):
    with pytest.raises(ValueError, match=r"images must be None for a \.tsv"):
        tsv_dataset(files, processor, images=files / "images")
    with pytest.raises(ValueError, match="images must be the folder of the images, got None"):
        official_dataset(files, processor, images=None)


def test_missing_and_broken_images_are_named(files, processor):
    path = files / "images" / "2407214681.jpg"
    path.write_bytes(path.read_bytes()[:300])
    where = r"image_id 2407214681, pair 2407214681\.jpg#0r1c, line 2"
    with pytest.raises(ValueError, match=rf"2407214681\.jpg must be an image \({where}\)"):
        official_dataset(files, processor)[1]
    path.unlink()
    with pytest.raises(FileNotFoundError, match=rf"2407214681\.jpg must be .* {where} \(1 of 3 pairs lack theirs"):
        official_dataset(files, processor)


@pytest.mark.parametrize("image", [b"", b"not base64!", base64.b64encode(b"not an image"), None])
def test_a_broken_image_of_a_tsv_is_named(files, processor, image):
    columns = [line.split(b"\t") for line in tsv_lines(base64.b64encode)]
    columns[1][2] = columns[1][2][:400] if image is None else image
    (files / "snli_ve_dev.tsv").write_bytes(b"\n".join(b"\t".join(row) for row in columns))
    data = tsv_dataset(files, processor)
    assert data[0]["labels"] == 1 and data[2]["labels"] == 2
    with pytest.raises(ValueError, match=r"snli_ve_dev\.tsv: line 2 must be an image .*pair 2407214681\.jpg#0r1c"):
        data[1]


def test_a_truncated_jsonl_names_its_last_line(tmp_path):
    first, second = (json.dumps(official(*row)) for row in ROWS[:2])
    for end in range(1, len(second), 53):
        refused(tmp_path / "a.jsonl", f"{first}\n{second[:end]}", r"a\.jsonl: line 2 must be a JSON object, got")


def test_a_truncated_tsv_names_its_last_line(tmp_path):
    first, second = tsv_lines(base64.b64encode)[:2]
    for end in (1, 30, 60, len(second) // 2, len(second) - 20, len(second) - 14):
        refused(
            tmp_path / "a.tsv", first + b"\n" + second[:end], r"a\.tsv: line 2 must have 6 columns \(unique id, .*got"
        )
    refused(tmp_path / "a.tsv", first + b"\n" + second[:-3], r"a\.tsv: line 2 \(pair 2407214681.*got 'contradict'")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", "", "must have at least one line, got an empty file"),
        ("a.tsv", "", "must have at least one line, got an empty file"),
        ("a.json", "{}", r"must be a file whose name ends in one of \['.jsonl', '.tsv'\], got '.json'"),
        ("a.jsonl", "3", "line 1 must be a JSON object, got 3"),
        (
            "a.jsonl",
            json.dumps(official("1", "p", "x", "yes")),
            r"line 1 \(pair p\) must be one of the labels .*'yes'",
        ),
        ("a.jsonl", json.dumps(official(1, "p", "x", "neutral")), "line 1: 'Flickr30K_ID' must be str, got 1"),
        ("a.jsonl", '{"pairID": "p", "gold_label": "-", "sentence2": "x"}', "must have the field 'Flickr30K_ID'"),
        ("a.jsonl", '{"pairID": "p", "gold_label": "-"}', "line 1 must have the field 'sentence2', got only"),
        ("a.tsv", "1\t2\tabc\tx\tcaption\tneutral\textra", "line 1 must have 6 columns .* got 7"),
        ("a.tsv", "1\t2\tabc\tx\tcaption\tunknown", r"line 1 \(pair 1\) must be one of the labels .*'unknown'"),
        ("a.tsv", b"1\t2\tabc\t\xff\tcaption\tneutral", "line 1 must be UTF-8"),
        ("a.jsonl", b'{"pairID": "\xff"}', "line 1 must be a JSON object"),
        ("a.jsonl", b"\xef\xbb\xbf{}", "line 1 must be UTF-8 without a byte-order mark, got one at its start"),
        ("a.tsv", b"\xef\xbb\xbf1\t2\tabc\tx\tcaption\tneutral", "line 1 must be UTF-8 without a byte-order mark"),
        (
            "a.jsonl",
            "\n".join(json.dumps(official("1", pair, "x", "neutral")) for pair in "aba"),
            r"a\.jsonl: line 3: pair a must come once, got it in line 1",
        ),
    ],
)
def test_malformed_files(tmp_path, name, content, message):
    refused(tmp_path / name, content, message)


def test_metrics_by_hand(files):
    pairs = snli_ve.read_pairs(files / "snli_ve_dev.jsonl").labeled  # neutral, contradiction, entailment
    predicted = ["entailment", "contradiction", "entailment"]
    assert snli_ve.accuracy(predicted, pairs) == pytest.approx(2 / 3)
    assert snli_ve.confusion(predicted, pairs) == {
        "contradiction": {"contradiction": 1, "neutral": 0, "entailment": 0},
        "neutral": {"contradiction": 0, "neutral": 0, "entailment": 1},
        "entailment": {"contradiction": 0, "neutral": 0, "entailment": 1},
    }
    assert snli_ve.LABELS.decode([[0.1, 0.3, 0.2]]) == ["neutral"]
    prediction = SimpleNamespace(predictions=np.eye(3), label_ids=np.array([0, 1, 1]))
    assert snli_ve.compute_metrics(prediction) == {"accuracy": pytest.approx(2 / 3)}
    with pytest.raises(ValueError, match="predicted must be 3, one per pair, got 1"):
        snli_ve.accuracy(["neutral"], pairs)
    with pytest.raises(ValueError, match=r"predicted must be labels of .*, got 'maybe'"):
        snli_ve.confusion(["maybe"] * 3, pairs)
