"""ViLT for retrieval: several texts to an image score as each alone, and the loss chooses among them."""

import original_checkpoints as originals
import pytest
import torch
import torch.nn.functional as F
import transformers
from tiny_vilt import IMAGE, make_model

import petl_ext
from petl_ext.models import ViltForImageAndTextRetrieval, load_vilt_checkpoint

BATCH, TEXTS, TOKENS = 2, 3, 6


@pytest.fixture
def model():
    return make_model(ViltForImageAndTextRetrieval)


@pytest.fixture
def inputs():
    generator = torch.Generator().manual_seed(1)
    attention_mask = torch.ones(BATCH, TEXTS, TOKENS, dtype=torch.long)
    attention_mask[0, 1, 3:] = 0
    pixel_mask = torch.ones(BATCH, IMAGE, IMAGE, dtype=torch.long)
    pixel_mask[1, :, IMAGE // 2 :] = 0
    return {
        "input_ids": torch.randint(1, 50, (BATCH, TEXTS, TOKENS), generator=generator),
        "attention_mask": attention_mask,
        "token_type_ids": torch.zeros(BATCH, TEXTS, TOKENS, dtype=torch.long),
        "pixel_values": torch.randn(BATCH, 3, IMAGE, IMAGE, generator=generator),
        "pixel_mask": pixel_mask,
    }


def each_alone(model, inputs):
    """Scores [B, K], one text at a time, by transformers' own forward."""
    alone = []
    for text in range(TEXTS):
        one = {
            name: tensor[:, text] if tensor.shape[1] == TEXTS and tensor.dim() == 3 else tensor
            for name, tensor in inputs.items()
        }
        alone.append(transformers.ViltForImageAndTextRetrieval.forward(model, **one).logits)
    return torch.cat(alone, dim=1)


def test_several_texts_score_as_each_alone(model, inputs):
    output = model(**inputs)
    assert output.logits.shape == (BATCH, TEXTS) and output.loss is None
    expected = each_alone(model, inputs)
    torch.testing.assert_close(output.logits, expected, atol=1e-5, rtol=1e-5)
    assert expected.std() > 0.01
    del inputs["pixel_mask"]
    torch.testing.assert_close(model(**inputs).logits, each_alone(model, inputs), atol=1e-5, rtol=1e-5)


def test_the_loss_chooses_among_the_texts_of_an_image(model, inputs):
    labels = torch.tensor([0, 2])
    output = model(**inputs, labels=labels)
    torch.testing.assert_close(output.loss, F.cross_entropy(output.logits, labels))
    output.loss.backward()
    assert model.rank_output.weight.grad.abs().sum() > 0


def test_one_text_is_transformers_own(model, inputs):
    one = {name: inputs[name][:, 0] for name in ("input_ids", "attention_mask", "token_type_ids")}
    one["pixel_values"] = inputs["pixel_values"]
    theirs = transformers.ViltForImageAndTextRetrieval(model.config).eval()
    theirs.load_state_dict(model.state_dict())
    torch.testing.assert_close(model(**one).logits, theirs(**one).logits, atol=1e-5, rtol=1e-5)


def test_methods_attach(model, inputs):
    before = model(**inputs).logits
    attachment = petl_ext.attach(model, petl_ext.APTConfig(num_prompts=4), keep=["rank_output"])
    with torch.no_grad():
        for parameter in attachment.parameters():
            parameter += 0.5
    assert not torch.allclose(model(**inputs).logits, before, atol=1e-2)
    torch.testing.assert_close(model(**inputs).logits, each_alone(model, inputs), atol=1e-4, rtol=1e-4)


def test_the_authors_checkpoint_loads(model, inputs):
    trained = make_model(ViltForImageAndTextRetrieval, seed=1)
    load_vilt_checkpoint(model, originals.vilt_checkpoint(trained, "rank_output"))
    for name, tensor in trained.state_dict().items():
        assert model.state_dict()[name].equal(tensor), name


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"labels": torch.tensor([0.0, 1.0])}, r"labels must be 2 class indices, \[2\], got torch.float32"),
        ({"pixel_values": None}, r"need pixel_values \[B, 3, H, W\] .* got \[2, 3, 6\], None"),
        ({"image_embeds": torch.zeros(1)}, r"no embeddings, got .*\['image_embeds'\]"),
        ({"pixel_values": torch.zeros(1, 3, IMAGE, IMAGE)}, r"got \[2, 3, 6\], \[1, 3, 32, 32\]"),
        (
            {"input_ids": torch.ones(2, 6, dtype=torch.long), "labels": torch.tensor([0, 0])},
            r"\[B, K, T\], got \[2, 6\]",
        ),
        ({"input_ids": None, "labels": torch.tensor([0, 0])}, r"\[B, K, T\], got None"),
    ],
)
def test_what_does_not_fit_is_refused(model, inputs, changes, message):
    with pytest.raises(ValueError, match=f"ViltForImageAndTextRetrieval: .*{message}"):
        model(**inputs | changes)
