"""DVP as a language model: its formula, its cache, generation, its loss."""

import pytest
import torch
import torch.nn.functional as F
from dvp_checks import assert_same, every_layer, logits, words_and_images
from tiny_dvp import END, LAYERS, TOKENS, llama_states, make_model
from transformers import DynamicCache


@every_layer
@torch.no_grad()
def test_language_modeling_is_the_formula(insert_layer):
    model = make_model("llama", insert_layer=insert_layer, num_labels=None)
    inputs = words_and_images(model)
    states = llama_states(model, *inputs.values(), ends=[TOKENS // 2 - 1, TOKENS - 1, TOKENS - 1])[:, 1:]
    expected = states @ model.language_model.lm_head.weight.T
    shown = inputs["attention_mask"] == 1
    assert_same(logits(model, inputs)[shown], expected[shown])


@pytest.mark.parametrize("padding", ["right", "left"])
@every_layer
@torch.no_grad()
def test_a_cache_changes_no_logits(insert_layer, padding):
    """Question, then one token, then two more at once; against all at once with the query at the question's end."""
    model = make_model("llama", insert_layer=insert_layer, num_labels=None)
    inputs = words_and_images(model, padding)
    question, mask = inputs["input_ids"], inputs["attention_mask"]
    new = torch.tensor([[7, 8, 9], [10, 11, 12], [END, 14, 15]])
    whole = {"input_ids": torch.cat([question, new], 1), "attention_mask": F.pad(mask, (0, 3), value=1)}
    last = {"right": [TOKENS // 2 - 1, TOKENS - 1, TOKENS - 1], "left": [TOKENS - 1] * 3}[padding]
    expected = logits(model, inputs | whole | {"question_end": torch.tensor(last)})
    cache = DynamicCache(config=model.language_model.config)
    shown = mask == 1
    assert_same(model(**inputs, cache=cache).logits[shown], expected[:, :TOKENS][shown])
    lengths = [cache.get_seq_length(i) for i in range(LAYERS)]
    assert lengths == [TOKENS] * insert_layer + [TOKENS + 1] * (LAYERS - insert_layer)
    one = model(new[:, :1], F.pad(mask, (0, 1), value=1), cache=cache).logits
    assert_same(one, expected[:, TOKENS : TOKENS + 1])
    two = model(new[:, 1:], F.pad(mask, (0, 3), value=1), cache=cache).logits
    assert_same(two, expected[:, TOKENS + 1 :])


@every_layer
@torch.no_grad()
def test_a_cache_without_a_mask(insert_layer):
    model = make_model("llama", insert_layer=insert_layer, num_labels=None)
    inputs = words_and_images(model)
    del inputs["attention_mask"]
    words = inputs.pop("input_ids")
    end = torch.full((3,), TOKENS - 3)
    expected = logits(model, inputs | {"input_ids": words, "question_end": end})
    cache = DynamicCache()
    parts = [model(words[:, :-2], **inputs, past_key_values=cache).logits]
    parts += [model(words[:, i : i + 1], cache=cache).logits for i in (TOKENS - 2, TOKENS - 1)]
    assert_same(torch.cat(parts, 1), expected)


@pytest.mark.parametrize("padding", ["right", "left"])
@every_layer
@torch.no_grad()
def test_generation(insert_layer, padding):
    """Against runs of the whole text for each new token, of one sample at a time and without padding."""
    model = make_model("llama", insert_layer=insert_layer, num_labels=None)
    inputs = words_and_images(model, padding)
    found = model.generate(**inputs, max_new_tokens=5)
    for row, words, mask, visual in zip(found, *inputs.values(), strict=True):
        text = words[mask == 1][None]
        end = torch.tensor([text.size(1) - 1])
        for i, token in enumerate(row):
            following = logits(model, {"input_ids": text, "visual_features": visual[None], "question_end": end})
            assert following[0, -1].argmax() == token or END in row[:i]
            text = torch.cat([text, token[None, None]], 1)
        ended = (row == END).cumsum(0) > 0
        assert (row[ended] == END).all()


@torch.no_grad()
def test_generation_stops_at_the_end():
    model = make_model("llama", insert_layer=1, num_labels=None)
    inputs = words_and_images(model)
    free = model.generate(**inputs, max_new_tokens=6)
    # The end is what one text says third: it repeats it, while the others go on until they say it too.
    end = next(token for token in free[0, 1:].tolist() if token not in (free[0, 0], *inputs["input_ids"].flatten()))
    model.language_model.config.eos_token_id = end
    found = model.generate(**inputs, max_new_tokens=6)
    for row, unstopped in zip(found.tolist(), free.tolist(), strict=True):
        stop = unstopped.index(end) if end in unstopped else 6
        assert row == (unstopped[:stop] + [end] * 6)[: found.size(1)] if stop < 6 else unstopped
    one = {name: tensor[:1] for name, tensor in inputs.items()}
    short = model.generate(**one, max_new_tokens=6)
    assert short.size(1) == free[0].tolist().index(end) + 1 < 6


@torch.no_grad()
def test_language_modeling_loss_does_not_show_the_answer():
    model = make_model("llama", insert_layer=1, num_labels=None)
    inputs = words_and_images(model)
    labels = inputs["input_ids"].clone()
    labels[:, : TOKENS - 2] = -100
    labels[0] = -100
    labels[0, 2] = inputs["input_ids"][0, 2]
    output = model(**inputs, labels=labels)
    answered = torch.tensor([1, TOKENS - 3, TOKENS - 3])
    assert_same(output.logits, logits(model, inputs | {"question_end": answered}))
    chosen = [(0, 1, 2), (1, TOKENS - 3, TOKENS - 2), (1, TOKENS - 2, TOKENS - 1)]
    chosen += [(2, t, u) for _, t, u in chosen[1:]]
    by_hand = [-output.logits[b, t].log_softmax(-1)[inputs["input_ids"][b, u]] for b, t, u in chosen]
    torch.testing.assert_close(output.loss, torch.stack(by_hand).mean(), check_dtype=False, rtol=1e-5, atol=1e-6)
    other = inputs["input_ids"].clone()
    other[1:, TOKENS - 2 :] = 9
    changed = model(**inputs | {"input_ids": other}, labels=labels).logits
    assert_same(changed[:, : TOKENS - 2], output.logits[:, : TOKENS - 2])


def test_language_modeling_trains_its_head():
    for use_adapters in (False, True):
        model = make_model("llama", num_labels=None, use_adapters=use_adapters)
        inputs = words_and_images(model)
        model(**inputs, labels=inputs["input_ids"].masked_fill(torch.arange(TOKENS) < 3, -100)).loss.backward()
        assert {n for n, p in model.named_parameters() if p.requires_grad} == {
            n for n, p in model.named_parameters() if p.grad is not None
        }
        assert model.language_model.lm_head.weight.requires_grad != use_adapters
