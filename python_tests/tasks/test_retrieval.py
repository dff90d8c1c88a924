"""The readers of Karpathy's splits, random captions, recalls, and what is said about bad input."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import tiny_meter
import torch
import torch.nn.functional as F
from accelerate.data_loader import BatchSamplerShard, DataLoaderShard, SeedableRandomSampler
from PIL import Image
from transformers import (
    BertTokenizer,
    CLIPImageProcessorPil,
    Trainer,
    TrainerState,
    TrainingArguments,
    ViltConfig,
    ViltImageProcessorPil,
    ViltProcessor,
)

from petl_ext.hf import EpochCallback
from petl_ext.models import ViltForImageAndTextRetrieval
from petl_ext.tasks import retrieval
from petl_ext.tasks.inputs import TextAndImage
from petl_ext.tasks.retrieval_scores import score_all

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{number}" for number in range(12)), "."]
COUNTS = [("val2014", "a.jpg", "test", 2), ("train2014", "b.jpg", "train", 3), ("val2014", "c.jpg", "train", 1)]
COUNTS += [("val2014", "d.jpg", "restval", 2)]


def official():
    """dataset_coco.json, in the form that its author's page describes."""
    images, sentid = [], 0
    for imgid, (folder, name, split, count) in enumerate(COUNTS):
        sentences = []
        for _ in range(count):
            sentences.append({"tokens": [f"w{sentid}"], "raw": f"W{sentid}.", "imgid": imgid, "sentid": sentid})
            sentid += 1
        sentids = [sentence["sentid"] for sentence in sentences]
        entry = {"filepath": folder, "sentids": sentids, "filename": name, "imgid": imgid, "split": split}
        images.append(entry | {"sentences": sentences, "cocoid": 100 + imgid})
    return {"images": images, "dataset": "coco"}


@pytest.fixture
def files(tmp_path):
    (tmp_path / "dataset_coco.json").write_text(json.dumps(official()))
    for number, (folder, name, _, _) in enumerate(COUNTS):
        (tmp_path / folder).mkdir(exist_ok=True)
        Image.new("RGB", (48, 32) if number % 2 else (32, 32), (51 * number, 0, 0)).save(
            tmp_path / folder / name, quality=100
        )
    return tmp_path


@pytest.fixture(scope="module")
def processor():
    tokenizer = BertTokenizer(vocab={word: index for index, word in enumerate(WORDS)})
    return ViltProcessor(ViltImageProcessorPil(do_resize=False, do_normalize=False, do_pad=False), tokenizer)


def dataset(files, processor, **changes):
    arguments = {"annotations": files / "dataset_coco.json", "images": files, "processor": processor}
    return retrieval.RetrievalDataset(**arguments | {"splits": ("train", "restval")} | changes)


def test_images_of_the_splits_in_the_order_of_the_file(files):
    images = retrieval.read_images(files / "dataset_coco.json", ["restval", "train"])
    assert [image.image_id for image in images] == ["train2014/b.jpg", "val2014/c.jpg", "val2014/d.jpg"]
    assert [image.captions for image in images] == [("W2.", "W3.", "W4."), ("W5.",), ("W6.", "W7.")]


def test_flickr_has_no_folders(files):
    content = official()
    for entry in content["images"]:
        del entry["filepath"]
    (files / "dataset_flickr30k.json").write_text(json.dumps(content))
    images = retrieval.read_images(files / "dataset_flickr30k.json", ["test"])
    assert [image.image_id for image in images] == ["a.jpg"]


def test_items_and_batches(files, processor):
    data = dataset(files, processor, negatives=2)
    assert len(data) == 6 and data.image_of == [0, 0, 0, 1, 2, 2]
    item = data[3]
    right, *others = [processor.tokenizer.decode(ids, skip_special_tokens=True) for ids in item["input_ids"]]
    assert right == "w5." and len(others) == 2 and item["labels"] == 0
    assert item["pixel_values"][0].mean().item() == pytest.approx(0.4, abs=0.02)
    assert data[-1]["pixel_values"].equal(data[5]["pixel_values"])
    with pytest.raises(IndexError):
        data[6]
    batch = retrieval.RetrievalCollator(processor)([data[0], item])
    assert batch["input_ids"].shape == batch["attention_mask"].shape == (2, 3, 4)
    assert batch["pixel_values"].shape == (2, 3, 32, 48) and batch["labels"].tolist() == [0, 0]
    assert batch["input_ids"][1].tolist() == item["input_ids"]
    with pytest.raises(ValueError, match=r"items must have equally many texts, got \[2, 3\]"):
        retrieval.RetrievalCollator(processor)([item, dataset(files, processor, negatives=1)[0]])


def test_random_captions_are_of_other_images_and_all_of_them(files, processor):
    data = dataset(files, processor, negatives=400)
    for index, image in enumerate(data.image_of):
        counts = np.bincount(data.drawn(index), minlength=len(data))
        others = [other != image for other in data.image_of]
        assert (counts > 0).tolist() == others
        expected = 400 / sum(others)
        assert np.abs(counts[others] - expected).max() < 5 * np.sqrt(expected)
    assert (np.bincount(dataset(files, processor, negatives=400, own_captions=True).drawn(0), minlength=6) > 0).all()
    assert dataset(files, processor).negatives == 15


def test_draws_depend_on_seed_epoch_and_item_alone(files, processor):
    data = dataset(files, processor)
    drawn = [data.drawn(index) for index in range(len(data))]
    assert drawn == [dataset(files, processor).drawn(index) for index in range(len(data))][: len(data)]
    assert len(set(map(tuple, drawn))) == len(data)
    assert dataset(files, processor, seed=1).drawn(0) != drawn[0]
    data.set_epoch(1)
    assert data.drawn(0) != drawn[0]
    data.set_epoch(0)
    assert data.drawn(0) == drawn[0]


def by_sorting(scores, image_of):
    """Recalls from their description, for scores without ties."""
    found = {}
    for k in (1, 5, 10):
        rows = [any(image_of[j] == i for j in np.argsort(-row)[:k]) for i, row in enumerate(scores)]
        columns = [image_of[j] in np.argsort(-column)[:k] for j, column in enumerate(scores.T)]
        found |= {f"TR@{k}": np.mean(rows), f"IR@{k}": np.mean(columns)}
    return found


@pytest.mark.parametrize("images", [3, 40, 300])
def test_recalls_are_those_of_the_sorted_scores(images):
    rng = np.random.default_rng(images)
    image_of = np.repeat(np.arange(images), rng.integers(1, 6, size=images))
    image_of = image_of[rng.permutation(len(image_of))]
    scores = rng.permutation(images * len(image_of)).reshape(images, -1).astype(np.float32)
    scores[image_of, np.arange(len(image_of))] += scores.max() * 0.25
    found = retrieval.recalls(torch.from_numpy(scores), image_of.tolist())
    assert found == pytest.approx(by_sorting(scores, image_of))
    assert images == 3 or len(set(found.values())) > 3


def test_a_tie_counts_against_the_model():
    image_of = [0, 0, 1, 1, 2, 2]
    assert retrieval.recalls(torch.zeros(3, 6), image_of) == {
        "TR@1": 0,
        "TR@5": 1,
        "TR@10": 1,
        "IR@1": 0,
        "IR@5": 1,
        "IR@10": 1,
    }
    right = torch.eye(3).repeat_interleave(2, dim=1)
    assert set(retrieval.recalls(right, image_of).values()) == {1}
    right[0, 2] = 1  # as high as the first image's own captions, and as the caption's own image
    found = retrieval.recalls(right, image_of)
    assert found["TR@1"] == pytest.approx(2 / 3) and found["IR@1"] == pytest.approx(5 / 6)
    own = torch.tensor([[1.0, 1, 0], [0, 0, 1]])
    assert retrieval.recalls(own, [0, 0, 1])["TR@1"] == 1  # two right ones that tie


def test_scores_that_are_none_are_refused():
    scores = torch.zeros(3, 3)
    scores[2, 0] = torch.nan
    with pytest.raises(ValueError, match="scores must be numbers, got NaN for image 2"):
        retrieval.recalls(scores, [0, 1, 2])
    for image_of in ([0, 1], [0, 1, 1], [0, 1, 3]):
        with pytest.raises(ValueError, match="image_of must have one of the 3 images for each of 3 captions"):
            retrieval.recalls(torch.zeros(3, 3), image_of)


def test_the_right_text_must_score_higher_than_all_others():
    scores = np.array([[2.0, 1, 0], [1, 1, 0], [0, 0, 0], [0, 1, 3]])
    prediction = SimpleNamespace(predictions=scores, label_ids=np.array([0, 0, 0, 2]))
    assert retrieval.compute_metrics(prediction) == {"accuracy": 0.5}


def changed(change):
    content = official()
    change(content["images"])
    return json.dumps(content)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (json.dumps(official())[:-100], "must be a JSON file, got one that does not parse"),
        ("\ufeff" + json.dumps(official()), "must be a JSON file, got one that does not parse: .*BOM"),
        ("[]", "must be a JSON object with a list under 'images', got list"),
        (changed(lambda images: images[1].pop("split")), r"images\[1\] must have the field 'split'"),
        (changed(lambda images: images[1].update(filename=3)), r"images\[1\]: 'filename' must be str, got 3"),
        (
            changed(lambda images: images[1].update(sentences=[])),
            r"images\[1\] \(train2014/b.jpg\) must have at least one",
        ),
        (
            changed(lambda images: images[1]["sentences"].append({"raw": "x"})),
            r"sentences\[3\] must have the field 'sentid'",
        ),
        (
            changed(lambda images: images.append(images[0])),
            r"images\[4\] \(val2014/a.jpg\): the 'filename' val2014/a.jpg must",
        ),
        (
            changed(lambda images: images[2].update(imgid=0)),
            r"images\[2\] \(val2014/c.jpg\): the 'imgid' 0 must come once",
        ),
        (
            changed(lambda images: images[2]["sentences"][0].update(sentid=0)),
            r"sentences\[0\]: the 'sentid' 0 must come once",
        ),
        (changed(lambda images: images.pop()), r"splits must be some of \['test', 'train'\], those of .*'restval'"),
    ],
)
def test_malformed_files(files, processor, content, message):
    (files / "dataset_coco.json").write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        dataset(files, processor)


def test_bad_arguments_and_images(files, processor):
    with pytest.raises(ValueError, match=r"splits must be some of .*, got 'train'"):
        dataset(files, processor, splits="train")
    with pytest.raises(ValueError, match="negatives must be at least 1, got 0"):
        dataset(files, processor, negatives=0)
    with pytest.raises(ValueError, match=r"must have at least 2 images in \['test'\], got 1"):
        dataset(files, processor, splits=["test"])
    path = files / "val2014" / "c.jpg"
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(ValueError, match=r"c\.jpg must be an image \(.*dataset_coco\.json: images\[2\]"):
        dataset(files, processor)[3]
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"c\.jpg must be the image of .*images\[2\].* \(1 of 3 images lack"):
        dataset(files, processor)


def test_a_meter_takes_the_batch(files):
    tokenizer = BertTokenizer(vocab={word: index for index, word in enumerate(WORDS)})
    tokenizer.model_input_names = ["input_ids", "attention_mask"]
    size = {"height": tiny_meter.IMAGE, "width": tiny_meter.IMAGE}
    processor = TextAndImage(tokenizer, CLIPImageProcessorPil(size=size, crop_size=size))
    data = dataset(files, processor, negatives=2)
    batch = retrieval.RetrievalCollator(processor)([data[0], data[3], data[4]])
    model = tiny_meter.make_model(tiny_meter.MeterForImageAndTextRetrieval)
    output = model(**batch)
    assert output.logits.shape == (3, 3)
    torch.testing.assert_close(output.loss, F.cross_entropy(output.logits, batch["labels"]))
    scores = score_all(model, data, 2, 4, progress=False)
    rows = [data.image_of[index] for index in (0, 3, 4)]
    expected = torch.stack(
        [scores[row, [index, *data.drawn(index)]] for row, index in zip(rows, (0, 3, 4), strict=True)]
    )
    torch.testing.assert_close(output.logits, expected, atol=1e-5, rtol=1e-5)


def test_several_processes_draw_anew_in_each_epoch(files, processor):
    """accelerate's loader there does not tell the data; the callback does."""
    data = dataset(files, processor)
    sampler = SeedableRandomSampler(data, generator=torch.Generator())
    shard = BatchSamplerShard(torch.utils.data.BatchSampler(sampler, 2, False), 2, 0)
    loader = DataLoaderShard(data, batch_sampler=shard)
    loader.set_epoch(3)
    assert sampler.epoch == 3 and data.epoch == 0
    EpochCallback().on_epoch_begin(None, TrainerState(epoch=3.0), None, train_dataloader=loader)
    assert data.epoch == 3


def test_workers_that_live_on_are_refused(files, processor, tmp_path):
    settings = arguments(tmp_path / "out", dataloader_num_workers=1, dataloader_persistent_workers=True)
    data, collator = dataset(files, processor), retrieval.RetrievalCollator(processor)
    with pytest.raises(ValueError, match=r"dataloader_persistent_workers must be False, .* got True"):
        Trainer(small_vilt(), settings, collator, data, callbacks=[EpochCallback()]).train()


def small_vilt():
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    sizes |= {"image_size": 48, "patch_size": 16, "initializer_range": 0.2}
    torch.manual_seed(0)
    return ViltForImageAndTextRetrieval(ViltConfig(**sizes, vocab_size=len(WORDS)))


def arguments(folder, **changes):
    settings = {
        "per_device_train_batch_size": 6,
        "learning_rate": 2e-3,
        "remove_unused_columns": False,
        "report_to": [],
        "save_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": True,
    }
    return TrainingArguments(str(folder), **settings | changes)


def losses_of(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_a_training_that_resumes_has_the_same_losses(files, processor, tmp_path):
    """In the middle of the second epoch of two steps, where accelerate does not tell the data the epoch."""
    steps = {"per_device_train_batch_size": 3, "max_steps": 6, "logging_steps": 1, "logging_nan_inf_filter": False}
    steps |= {"save_strategy": "steps", "save_steps": 3}

    def trainer():
        collator = retrieval.RetrievalCollator(processor)
        settings, data = arguments(tmp_path / "out", **steps), dataset(files, processor)
        return Trainer(small_vilt(), settings, collator, data, callbacks=[EpochCallback()])

    whole, resumed = trainer(), trainer()
    whole.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-3"))
    assert len(losses_of(whole)) == 6 and len(set(losses_of(whole))) == 6
    assert losses_of(resumed) == losses_of(whole)


def test_a_vilt_learns_it(files, processor, tmp_path):
    data, collator = dataset(files, processor, negatives=4), retrieval.RetrievalCollator(processor)
    held = dataset(files, processor, negatives=4, seed=1)
    settings = arguments(tmp_path / "out", num_train_epochs=60)
    trainer = Trainer(small_vilt(), settings, collator, data, held, compute_metrics=retrieval.compute_metrics)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert data.epoch == 59  # other random captions in each epoch
    found = trainer.evaluate()
    assert found["eval_loss"] < 0.8 * before and found["eval_accuracy"] > 0.5
