"""Arguments, language models, inputs and batches that DVP refuses."""

import pytest
import torch
import torch.nn.functional as F
from dvp_checks import every_family, words_and_images
from tiny_dvp import CLASSES, LABELS, LAYERS, SIZES, TOKENS, VISUAL, make_inputs, make_language_model, make_model
from tiny_families import FAMILIES
from transformers import DynamicCache, T5Config, T5EncoderModel

from petl_ext.models import DVPT5, DVPBert, DVPLlama


@every_family
def test_wrong_arguments_are_refused(family):
    name = CLASSES[family].__name__
    language_model = make_language_model(family)
    before = [p.requires_grad for p in language_model.parameters()]
    vision = FAMILIES["clip_vision_model"].make(1)
    refusals = [
        ({"insert_layer": LAYERS}, r"insert_layer must be an integer in \[0, 2\], got 3"),
        ({"insert_layer": -1}, "insert_layer .*got -1"),
        ({"insert_layer": 1.0}, "insert_layer .*got 1.0"),
        ({"num_labels": 0}, "num_labels must be a positive integer, got 0"),
        ({"visual_dim": None}, "visual_dim is needed"),
        ({"visual_dim": 30, "vision_model": vision}, "vision_model's hidden_size, 24, got 30"),
        ({"candidates": 3}, 'candidates must be None or "all", got 3'),
        ({"original": 1}, "original must be True or False, got 1"),
        ({"use_adapters": "yes"}, "use_adapters must be True or False, got 'yes'"),
        ({"num_heads": 3}, "multiple of num_heads"),
    ]
    for wrong, message in refusals:
        with pytest.raises(ValueError, match=message):
            CLASSES[family](language_model, **{**SIZES, "num_labels": LABELS, **wrong})
    assert [p.requires_grad for p in language_model.parameters()] == before
    model = make_model(family)
    for layer in (LAYERS, -1, True, None):
        with pytest.raises(ValueError, match=rf"{name}: insert_layer must be .*got {layer}"):
            model.insert_layer = layer
    assert model.insert_layer == 0


def test_wrong_language_models_are_refused():
    for family, other in (("bert", "t5"), ("t5", "llama"), ("llama", "roberta")):
        wrong = FAMILIES[other].make(*[1] * (2 if other == "t5" else 1))
        with pytest.raises(ValueError, match=f"of the type '{family}', got {type(wrong).__name__}"):
            CLASSES[family](wrong, **SIZES, num_labels=3)
    encoder = T5EncoderModel(T5Config(d_model=8, d_kv=2, d_ff=8, num_layers=1, num_heads=2, vocab_size=9))
    with pytest.raises(ValueError, match="must have 'decoder', which T5EncoderModel lacks"):
        DVPT5(encoder, **SIZES, num_labels=3)
    t5 = make_language_model("t5")
    t5.config.decoder_start_token_id = None
    with pytest.raises(ValueError, match=r"must have a config\.decoder_start_token_id"):
        DVPT5(t5, **SIZES, num_labels=3)
    bert = make_language_model("bert")
    bert.config.is_decoder = True
    with pytest.raises(ValueError, match="must be an encoder"):
        DVPBert(bert, **SIZES, num_labels=3)
    with pytest.raises(ValueError, match="num_labels is needed where language_model has no lm_head"):
        DVPLlama(make_language_model("llama").model, **SIZES)
    with pytest.raises(ValueError, match="num_labels must be a positive integer, got None"):
        DVPT5(make_language_model("t5"), **SIZES)
    used = make_language_model("bert")
    DVPBert(used, **SIZES, num_labels=3, use_adapters=True)
    with pytest.raises(ValueError, match=r"encoder.layer.0.attention.output.dropout .*already has a child 'adapter'"):
        DVPBert(used, **SIZES, num_labels=3, use_adapters=True)


@every_family
def test_wrong_inputs_are_refused(family):
    model = make_model(family)
    inputs = make_inputs(model)
    nothing = inputs["attention_mask"].clone()
    nothing[1] = 0
    blind = torch.ones(3, VISUAL)
    blind[2] = 0
    visual = inputs["visual_features"]
    refusals = [
        ({"visual_features": visual[:2]}, r"images and texts must be as many, got 2 and input_ids \[3, 6\]"),
        ({"visual_features": visual[..., 1:]}, r"visual_features must be \[B, N, 24\], got \[3, 7, 23\]"),
        ({"visual_features": visual[0]}, r"visual_features must be .*got \[7, 24\]"),
        ({"visual_features": None}, "give either pixel_values or visual_features"),
        ({"pixel_values": visual}, "give either pixel_values or visual_features"),
        ({"visual_features": None, "pixel_values": visual}, "pixel_values need a vision_model"),
        ({"attention_mask": nothing}, "attention_mask hides all tokens of sample 1"),
        ({"attention_mask": nothing[:, 1:]}, r"shape of input_ids, \[3, 6\], got \[3, 5\]"),
        ({"input_ids": inputs["input_ids"][0]}, r"input_ids must be \[B, T\].*got \[6\]"),
        ({"visual_mask": blind}, "mask hides all tokens of sample 2"),
        ({"visual_mask": blind[:, 1:]}, r"mask must be bool \[3, 7\]"),
        ({"labels": torch.zeros(3)}, r"labels must be a score for each answer, \[3, 5\], got \[3\]"),
        ({"labels": torch.zeros(2, dtype=torch.long)}, r"labels must be 3 class indices, \[3\], got torch.int64 \[2\]"),
    ]
    for wrong, message in refusals:
        with pytest.raises(ValueError, match=message):
            model(**inputs | wrong)


def test_bert_padded_on_the_left_is_refused():
    model = make_model("bert")
    inputs = make_inputs(model)
    inputs["attention_mask"] = inputs["attention_mask"].flip(1)
    with pytest.raises(ValueError, match=r"attention_mask hides the first token, \[CLS\], of sample 0"):
        model(**inputs)


@torch.no_grad()
def test_wrong_caches_are_refused():
    model = make_model("llama", insert_layer=1, num_labels=None)
    inputs = words_and_images(model)
    cache = DynamicCache(config=model.language_model.config)
    model(**inputs, cache=cache)
    token, mask = inputs["input_ids"][:, :1], F.pad(inputs["attention_mask"], (0, 1), value=1)
    with pytest.raises(ValueError, match="holds the prompt already, but an image is given again"):
        model(token, mask, visual_features=inputs["visual_features"], cache=cache)
    with pytest.raises(ValueError, match=r"must cover 6 tokens before and 1 now, \[3, 7\], got \[3, 6\]"):
        model(token, mask[:, 1:], cache=cache)
    for layer in (0, 2):
        model.insert_layer = layer
        with pytest.raises(ValueError, match=rf"be that of insert_layer {layer}, .*got \[6, 7, 7\] rows"):
            model(token, mask, cache=cache)
    with pytest.raises(ValueError, match="cache and past_key_values are two names of one argument"):
        model(token, mask, cache=cache, past_key_values=cache)
    with pytest.raises(ValueError, match=r"labels must be tokens \[3, 6\], got \[3, 5\]"):
        model(**inputs, labels=inputs["input_ids"][:, 1:])
    classifier = make_model("llama")
    with pytest.raises(ValueError, match="a cache is for language modeling"):
        classifier(**inputs, past_key_values=DynamicCache())


@pytest.mark.parametrize("family", CLASSES)
def test_a_batch_in_which_no_answer_is_known_has_no_loss(family):
    model = make_model(family)
    loss = model(**make_inputs(model), labels=torch.full((3,), -100)).loss
    loss.backward()
    assert loss.item() == 0 and all(p.grad is None or not p.grad.any() for p in model.parameters())


def test_a_batch_in_which_no_token_is_asked_for_has_no_loss():
    model = make_model("llama", num_labels=None)
    inputs = words_and_images(model)
    labels = torch.full_like(inputs["input_ids"], -100)
    assert model(**inputs, labels=labels, question_end=torch.full((3,), TOKENS - 1)).loss.item() == 0
