"""Scoring all captions of all images: blocks, a file to resume from, and files that do not belong."""

import json

import pytest
import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import BertTokenizer, ViltConfig, ViltImageProcessorPil, ViltProcessor

from petl_ext.models import ViltForImageAndTextRetrieval
from petl_ext.tasks.retrieval import RetrievalDataset
from petl_ext.tasks.retrieval_scores import score_all

IMAGES, CAPTIONS = 7, 3  # captions of each image
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{number}" for number in range(8))]


@pytest.fixture
def data(tmp_path):
    images, generator = [], torch.Generator().manual_seed(0)
    for imgid in range(IMAGES):
        pixels = torch.randint(256, (32, 32 if imgid % 2 else 48, 3), generator=generator, dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(tmp_path / f"{imgid}.png")
        sentids = range(imgid * CAPTIONS, (imgid + 1) * CAPTIONS)
        texts = [" ".join(f"w{(sentid + word) % 8}" for word in range(1 + sentid % 4)) for sentid in sentids]
        sentences = [{"raw": text, "sentid": sentid} for text, sentid in zip(texts, sentids, strict=True)]
        images.append({"filename": f"{imgid}.png", "split": "test", "imgid": imgid, "sentences": sentences})
    (tmp_path / "dataset.json").write_text(json.dumps({"images": images}))
    tokenizer = BertTokenizer(vocab={word: index for index, word in enumerate(WORDS)})
    processor = ViltProcessor(ViltImageProcessorPil(do_resize=False, do_normalize=False, do_pad=False), tokenizer)
    return RetrievalDataset(tmp_path / "dataset.json", tmp_path, processor, ["test"])


@pytest.fixture
def model():
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    torch.manual_seed(0)
    config = ViltConfig(**sizes, vocab_size=len(WORDS), image_size=48, patch_size=16, initializer_range=0.5)
    return ViltForImageAndTextRetrieval(config)


class Dies(Exception):
    """As a killed process leaves things: nothing of it is caught."""


def dying_after(model, calls):
    """Makes the model's forward raise after so many calls; returns how to undo it."""
    left = iter(range(calls))

    def count(module, arguments, given):
        if next(left, None) is None:
            raise Dies

    return model.register_forward_pre_hook(count, with_kwargs=True).remove


def counted(model):
    """The number of images in each call of the model, as they come."""
    seen = []
    model.register_forward_pre_hook(
        lambda module, arguments, given: seen.append(len(given["pixel_values"])), with_kwargs=True
    )
    return seen


def one_by_one(model, data):
    model.eval()
    rows = []
    for index in range(len(data.entries)):
        pixels = data.pixels_of(index)[None]
        mask = torch.ones_like(pixels[:, 0], dtype=torch.long)
        texts = [data.processor.tokenizer(text, return_tensors="pt") for text in data.captions]
        with torch.no_grad():
            rows.append([model(**text, pixel_values=pixels, pixel_mask=mask).logits.item() for text in texts])
    return torch.tensor(rows)


@pytest.mark.parametrize(("images", "captions", "workers"), [(3, 4, 0), (100, 100, 0), (2, 5, 2)])
def test_blocks_score_as_pairs_do(model, data, images, captions, workers):
    found = score_all(model, data, images, captions, num_workers=workers, progress=False)
    assert found.shape == (IMAGES, IMAGES * CAPTIONS) and found.dtype == torch.float32
    torch.testing.assert_close(found, one_by_one(model, data), atol=1e-4, rtol=1e-4)
    assert found.std() > 0.1


def test_a_model_in_training_goes_on_training(model, data):
    model.vilt.embeddings.dropout.p = 0.5
    model.train()
    first = score_all(model, data, progress=False)
    assert model.training and first.equal(score_all(model, data, progress=False))


def test_the_global_generator_is_left_alone(model, data):
    torch.manual_seed(5)
    score_all(model, data, progress=False)
    after = torch.rand(3)
    torch.manual_seed(5)
    assert after.equal(torch.rand(3))


def test_a_killed_scoring_goes_on_where_it_was(model, data, tmp_path):
    path = tmp_path / "scores.safetensors"
    whole = score_all(model, data, 2, 4, progress=False)
    blocks = 6  # of 21 captions, four at once
    heal = dying_after(model, 2 * blocks + 1)
    with pytest.raises(Dies):
        score_all(model, data, 2, 4, path, save_every=2, progress=False)
    heal()
    assert load_file(path)["scores"].equal(whole[:4])
    seen = counted(model)
    assert score_all(model, data, 2, 4, path, save_every=2, progress=False).equal(whole)
    assert seen == [2] + [2] * blocks + [1] * blocks  # the first block anew, then what was left
    assert load_file(path)["scores"].equal(whole)
    del seen[:]
    assert score_all(model, data, 2, 4, path, progress=False).equal(whole)
    assert seen == [2]
    assert [entry.name for entry in tmp_path.iterdir() if "scores" in entry.name] == ["scores.safetensors"]
    (tmp_path / "other").touch()
    assert path.stat().st_mode == (tmp_path / "other").stat().st_mode


def test_saving_waits_for_enough_images(model, data, tmp_path):
    path = tmp_path / "scores.safetensors"
    heal = dying_after(model, 5)
    with pytest.raises(Dies):
        score_all(model, data, 1, 100, path, save_every=3, progress=False)
    heal()
    assert len(load_file(path)["scores"]) == 3


def test_scores_of_something_else_are_refused(model, data, tmp_path):
    path = tmp_path / "scores.safetensors"
    score_all(model, data, path=path, progress=False)
    before = path.read_bytes()
    with torch.no_grad():
        model.rank_output.bias += 0.01 * score_all(model, data, progress=False).abs().max()
    with pytest.raises(ValueError, match=r"scores\.safetensors must hold scores of this model, got those of another"):
        score_all(model, data, path=path, progress=False)
    data.captions[0] = "w1"
    with pytest.raises(ValueError, match="must hold scores of these images and captions, got others"):
        score_all(model, data, path=path, progress=False)
    assert path.read_bytes() == before
    path.write_bytes(before[:-50])
    with pytest.raises(ValueError, match="must be a file of scores, got one that cannot be read"):
        score_all(model, data, path=path, progress=False)


@pytest.mark.parametrize("name", ["images_at_once", "captions_at_once", "save_every"])
def test_sizes_below_one_are_refused(model, data, name):
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
        score_all(model, data, progress=False, **{name: 0})


def test_a_full_disk_leaves_the_file_as_it_was(model, data, tmp_path, monkeypatch):
    path = tmp_path / "scores.safetensors"
    heal = dying_after(model, 3)
    with pytest.raises(Dies):
        score_all(model, data, 1, 100, path, save_every=2, progress=False)
    heal()
    before, names = path.read_bytes(), set(tmp_path.iterdir())

    def full(tensors, file, metadata):
        file.write_bytes(b"half")
        raise SafetensorError("No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(OSError, match=r"scores\.safetensors: No space left on device"):
        score_all(model, data, 1, 100, path, save_every=2, progress=False)
    assert path.read_bytes() == before and set(tmp_path.iterdir()) == names


def test_a_folder_that_is_not_there_is_refused_at_once(model, data, tmp_path):
    seen = counted(model)
    with pytest.raises(FileNotFoundError, match=r"path must be in a folder that is there, got .*nowhere/scores"):
        score_all(model, data, path=tmp_path / "nowhere" / "scores", progress=False)
    assert seen == []


def test_a_broken_image_is_named(model, data):
    path = data.images.of(data.entries[5])
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"5\.png must be an image .*images\[5\]"):
        score_all(model, data, images_at_once=1, progress=False)
