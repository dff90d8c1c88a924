"""What METER reads: images of other sizes, token types, given embeddings; and what it refuses."""

import subprocess
import sys

import pytest
import torch
from meter_checks import assert_same_weights, cross_entropy_by_hand, every_model
from tiny_meter import IMAGE, PATCH, TEXT, make_inputs, make_model, run

from petl_ext.models import (
    MeterForImageAndTextRetrieval,
    MeterForImagesAndTextClassification,
    MeterForQuestionAnswering,
    MeterForVisualEntailment,
    MeterModel,
    resize_position_embeddings,
)


@pytest.mark.parametrize("grid", [1, 2, 3, 5, 8])
def test_constant_positions_stay_constant(grid):
    weight = torch.full((10, 4), 0.7)
    weight[0] = -2.0
    resized = resize_position_embeddings(weight, grid)
    assert resized.shape == (1 + grid**2, 4)
    assert torch.equal(resized[0], weight[0])
    torch.testing.assert_close(resized[1:], torch.full((grid**2, 4), 0.7))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_positions_of_the_same_grid_are_untouched(dtype):
    weight = torch.randn(17, 3).to(dtype)
    assert resize_position_embeddings(weight, 4) is weight
    assert resize_position_embeddings(weight, 5).dtype is dtype


def test_positions_grow_where_they_were():
    """A patch of row 1 and column 2 of 4 x 4: after doubling, its four quarters hold the most, and weights are those
    of Keys' cubic with a = -0.75 at a quarter of a patch from its center."""
    weight = torch.zeros(17, 2)
    weight[1 + 1 * 4 + 2, 1] = 1.0
    resized = resize_position_embeddings(weight, 8)[1:, 1].view(8, 8)
    near, a = 0.25, -0.75
    cubic = (a + 2) * near**3 - (a + 3) * near**2 + 1
    torch.testing.assert_close(resized[2:4, 4:6], torch.full((2, 2), cubic**2))
    assert resized.abs().argmax() in (2 * 8 + 4, 2 * 8 + 5, 3 * 8 + 4, 3 * 8 + 5)
    assert not resize_position_embeddings(weight, 8)[:, 0].any()


@pytest.mark.parametrize(
    ("weight", "grid", "message"),
    [
        (torch.zeros(17, 3), 0, "grid must be a positive integer, got 0"),
        (torch.zeros(17, 3), 4.0, "grid must be a positive integer, got 4.0"),
        (torch.zeros(16, 3), 4, r"a class token and a square of patches, got \[16, 3\]"),
        (torch.zeros(1, 3), 4, r"got \[1, 3\]"),
        (torch.zeros(0, 3), 4, r"got \[0, 3\]"),
        (torch.zeros(1, 17, 3), 4, r"got \[1, 17, 3\]"),
    ],
)
def test_positions_that_are_no_square_are_refused(weight, grid, message):
    with pytest.raises(ValueError, match=message):
        resize_position_embeddings(weight, grid)


@pytest.mark.parametrize("image_size", [PATCH, IMAGE + PATCH])
@every_model
@torch.no_grad()
def test_images_of_another_size(model_class, image_size, tmp_path):
    model = make_model(model_class)
    before = model.base_model.vit_model.embeddings.position_embedding.weight.clone()
    model.base_model.vit_model.requires_grad_(False)
    model.resize_images(image_size)
    assert model.config.vision_config.image_size == image_size
    table = model.base_model.vit_model.embeddings.position_embedding
    assert torch.equal(table.weight, resize_position_embeddings(before, image_size // PATCH))
    assert isinstance(table.weight, torch.nn.Parameter) and not table.weight.requires_grad
    assert table.num_embeddings == 1 + (image_size // PATCH) ** 2
    output = run(model, make_inputs(model))
    model.save_pretrained(tmp_path)
    again = model_class.from_pretrained(tmp_path)
    assert_same_weights(again, model)
    torch.testing.assert_close(run(again, make_inputs(again)), output)


@torch.no_grad()
def test_the_same_image_size_changes_nothing():
    model = make_model()
    inputs = make_inputs(model)
    output = run(model, inputs)
    model.resize_images(IMAGE)
    assert torch.equal(run(model, inputs), output)


@pytest.mark.parametrize("image_size", [IMAGE + 1, 0, -PATCH, float(IMAGE), None])
def test_images_that_are_no_multiple_of_the_patch_are_refused(image_size):
    model = make_model()
    inputs = make_inputs(model)
    output = run(model, inputs)
    with pytest.raises(ValueError, match=f"a positive multiple of the patch size {PATCH}, got {image_size}"):
        model.resize_images(image_size)
    assert torch.equal(run(model, inputs), output)


@torch.no_grad()
def test_new_token_types_are_copies_of_the_last(tmp_path):
    model = make_model(MeterModel, modality_type_vocab_size=2)
    inputs = make_inputs(model)
    old = model.token_type_embeddings.weight.clone()
    model.resize_token_types(3)
    assert torch.equal(model.token_type_embeddings.weight, old[[0, 1, 1]])
    assert torch.equal(run(model, inputs | {"image_token_type_idx": 2}), run(model, inputs))
    model.save_pretrained(tmp_path)
    nlvr2 = MeterForImagesAndTextClassification.from_pretrained(tmp_path)
    assert torch.equal(nlvr2.meter.token_type_embeddings.weight, old[[0, 1, 1]])
    for wrong in (2, 3.0):
        with pytest.raises(ValueError, match=f"an integer of at least 3, got {wrong}"):
            model.resize_token_types(wrong)


def embedded(model, inputs):
    """The same text and image as what the two encoders make of them first."""
    meter = model.base_model
    images = inputs["pixel_values"]
    seen = meter.vit_model(images.flatten(0, -4)).last_hidden_state
    return {
        "inputs_embeds": meter.text_transformer.embeddings.word_embeddings(inputs["input_ids"]),
        "image_embeds": seen.unflatten(0, images.shape[:-3]),
        "attention_mask": inputs["attention_mask"],
    }


@every_model
@torch.no_grad()
def test_embeddings_of_text_and_image_can_be_given(model_class):
    model = make_model(model_class).double()
    inputs = make_inputs(model)
    inputs["pixel_values"] = inputs["pixel_values"].double()
    expected, given = run(model, inputs), embedded(model, inputs)
    torch.testing.assert_close(run(model, given), expected)
    mixed = {"input_ids": inputs["input_ids"], "image_embeds": given["image_embeds"]}
    torch.testing.assert_close(run(model, mixed | {"attention_mask": inputs["attention_mask"]}), expected)
    mixed = {"inputs_embeds": given["inputs_embeds"], "pixel_values": inputs["pixel_values"]}
    torch.testing.assert_close(run(model, mixed | {"attention_mask": inputs["attention_mask"]}), expected)
    fewer = given | {"image_embeds": given["image_embeds"][..., :4, :]}
    assert not torch.allclose(run(model, fewer), expected, rtol=1e-3)
    for name in ("inputs_embeds", "image_embeds"):
        changed = given | {name: given[name] + torch.randn(given[name].shape[-1])}
        assert not torch.allclose(run(model, changed), expected, rtol=1e-3)


@torch.no_grad()
def test_embeddings_of_many_texts():
    model = make_model(MeterForImageAndTextRetrieval).double()
    inputs = [make_inputs(model, seed=seed) for seed in range(3)]
    pixels = inputs[0]["pixel_values"].double()
    given = [embedded(model, entry | {"pixel_values": pixels}) for entry in inputs]
    texts = {name: torch.stack([entry[name] for entry in given], 1) for name in ("inputs_embeds", "attention_mask")}
    output = model(**texts, image_embeds=given[0]["image_embeds"], labels=torch.tensor([0, 2]))
    each = [model(**entry | {"pixel_values": pixels}).logits for entry in inputs]
    torch.testing.assert_close(output.logits, torch.cat(each, dim=1))
    torch.testing.assert_close(output.loss, cross_entropy_by_hand(torch.cat(each, dim=1), [0, 2]))


def test_gradients_reach_given_embeddings():
    model = make_model()
    given = {
        name: t.detach().requires_grad_(name != "attention_mask")
        for name, t in embedded(model, make_inputs(model)).items()
    }
    run(model, given).square().sum().backward()
    assert given["inputs_embeds"].grad.any() and given["image_embeds"].grad.any()


@every_model
def test_text_and_image_are_given_once(model_class):
    model = make_model(model_class)
    inputs = make_inputs(model)
    given = embedded(model, inputs)
    for name, pair in (
        ("inputs_embeds", "input_ids or inputs_embeds"),
        ("image_embeds", "pixel_values or image_embeds"),
    ):
        refused(model, f"give either {pair}, got both", **{name: given[name]})
        other = pair.partition(" ")[0]
        refused(model, f"give either {pair}, got neither", **{other: None})


def test_embeddings_of_a_wrong_shape_are_refused():
    model = make_model(MeterModel)
    given = embedded(model, make_inputs(model)) | {"input_ids": None, "pixel_values": None}
    words, seen = given["inputs_embeds"], given["image_embeds"]
    size = r"inputs_embeds must be \[B, T, 24\] with at most 10 tokens"
    refused(model, rf"{size}, got \[2, 6, 23\]", **given | {"inputs_embeds": words[..., :-1]})
    refused(model, rf"{size}, got \[2, 6\]", **given | {"inputs_embeds": words[..., 0]})
    refused(model, rf"{size}, got \[2, 12, 24\]", **given | {"inputs_embeds": words.repeat(1, 2, 1)})
    refused(model, r"image_embeds must be \[B, N, 40\], got \[2, 10, 39\]", **given | {"image_embeds": seen[..., :-1]})
    refused(model, r"image_embeds must be \[B, N, 40\], got \[2, 40\]", **given | {"image_embeds": seen[:, 0]})
    refused(
        model,
        r"inputs_embeds and image_embeds must hold the same number of samples, got \[2, 6, 24\] and \[1, 10, 40\]",
        **given | {"image_embeds": seen[:1]},
    )
    refused(model, r"shape of inputs_embeds, \[2, 6\], got \[2, 7\]", **given | {"attention_mask": torch.ones(2, 7)})
    pairs = make_model(MeterForImagesAndTextClassification)
    given = embedded(pairs, make_inputs(pairs)) | {"input_ids": None, "pixel_values": None}
    given["image_embeds"] = given["image_embeds"][:, :1]
    refused(pairs, r"image_embeds must be \[B, 2, N, D\], 2 images to a text, got \[2, 1, 10, 40\]", **given)


def refused(model, message, **changes):
    with pytest.raises(ValueError, match=message):
        model(**make_inputs(model) | changes)


def test_inputs_of_a_wrong_shape_are_refused():
    model = make_model(MeterModel)
    size = rf"\[B, 3, {IMAGE}, {IMAGE}\]"
    refused(
        model, rf"pixel_values must be {size}.*\[2, 3, 32, 32\].*resize_images", pixel_values=torch.zeros(2, 3, 32, 32)
    )
    refused(model, rf"must be {size}, got \[2, 1, 24, 24\]", pixel_values=torch.zeros(2, 1, IMAGE, IMAGE))
    refused(model, rf"must be {size}, got \[2, 24, 24\]", pixel_values=torch.zeros(2, IMAGE, IMAGE))
    refused(model, r"same number of samples, got \[2, 6\] and \[1, 3", pixel_values=torch.zeros(1, 3, IMAGE, IMAGE))
    refused(model, r"shape of input_ids, \[2, 6\], got \[2, 7\]", attention_mask=torch.ones(2, 7))
    long = {name: torch.ones(2, 11, dtype=torch.long) for name in ("input_ids", "attention_mask")}
    refused(model, r"\[B, T\] with at most 10 tokens, got \[2, 11\]", **long)
    refused(model, r"must be \[B, T\].*got \[2\]", input_ids=torch.ones(2, dtype=torch.long))
    for wrong in (0, 3, -1):
        refused(model, rf"image_token_type_idx must lie in \[1, 2\], got {wrong}", image_token_type_idx=wrong)


def test_a_wrong_number_of_images_is_refused():
    model = make_model(MeterForImagesAndTextClassification)
    for images in ((3,), (1,), ()):
        pixels = torch.zeros(2, *images, 3, IMAGE, IMAGE)
        refused(model, rf"2 images to a text, got \[{', '.join(map(str, pixels.shape))}\]", pixel_values=pixels)
    with pytest.raises(ValueError, match=r"modality_type_vocab_size must be at least 3, got 2; resize_token_types"):
        make_model(MeterForImagesAndTextClassification, modality_type_vocab_size=2)


def test_labels_of_a_wrong_shape_are_refused():
    vqa, snli = make_model(MeterForQuestionAnswering), make_model(MeterForVisualEntailment)
    refused(vqa, r"MeterForQuestionAnswering: labels .*\[2, 5\], got \[2\]", labels=torch.zeros(2))
    refused(vqa, r"\[2, 5\], got \[2, 4\]", labels=torch.zeros(2, 4))
    refused(snli, r"labels must be 2 class indices, \[2\], got torch.int64 \[2, 1\]", labels=torch.ones(2, 1).long())
    refused(snli, r"got torch.float32 \[2\]", labels=torch.ones(2))
    retrieval = make_model(MeterForImageAndTextRetrieval)
    refused(retrieval, r"labels need several texts.*got \[2, 6\]", labels=torch.zeros(2, dtype=torch.long))
    texts = {name: torch.ones(3, 4, TEXT, dtype=torch.long) for name in ("input_ids", "attention_mask")}
    refused(retrieval, r"same number of samples, got \[3, 4, 6\] and \[2, 3", **texts)


def test_without_transformers_the_message_names_the_package():
    script = "import sys; sys.modules['transformers'] = None; import petl_ext; import petl_ext.models"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == "ImportError: petl_ext.models needs transformers: pip install transformers"
