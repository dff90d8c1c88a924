"""Decoders that skip layers: their cache, and generation with it."""

import inspect
from itertools import combinations

import pytest
import torch
import transformers
from skipping_checks import attached
from tiny_families import LAYERS, make_inputs
from tiny_vilt import randomize
from transformers_names import CACHE

import petl_ext


@pytest.mark.parametrize("skip", [[0], [0, 1], [1]], ids=str)
@pytest.mark.parametrize("family", ["llama", "t5"])
def test_the_cache_gives_what_the_whole_sequence_gives(family, skip):
    model, attachment = attached(family)
    randomize(attachment)
    first = len(attachment.layers) - LAYERS  # of the decoder
    attachment.skip([first + index for index in skip])
    torch.manual_seed(0)
    words = torch.randint(3, 40, (2, 7))
    name, others = ("decoder_input_ids", {"input_ids": words.flip(1)}) if family == "t5" else ("input_ids", {})
    expected = model(**{name: words}, **others).logits
    cache, steps = None, []
    for step in (slice(0, 4), slice(4, 5), slice(5, 6), slice(6, 7)):
        output = model(**{name: words[:, step]}, **others, **{CACHE: cache}, use_cache=True)
        cache = output[CACHE]
        steps.append(output.logits)
    torch.testing.assert_close(torch.cat(steps, 1), expected)


SLIDING, FULL, LINEAR = "sliding_attention", "full_attention", "linear_attention"
OF_SEVERAL_SLOT_TYPES = {
    "Gemma2": {"head_dim": 8, "layer_types": [SLIDING, FULL] * 2},
    "Cohere2": {"layer_types": [SLIDING, SLIDING, SLIDING, FULL], "eos_token_id": 1, "bos_token_id": 2},
    "Qwen2": {"layer_types": [FULL, SLIDING, FULL, SLIDING], "use_sliding_window": True, "max_window_layers": 1},
    "Qwen3_5": {
        "layer_types": [LINEAR, FULL, LINEAR, FULL],
        "head_dim": 8,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
    },
}


def attached_with_slot_types(name):
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 64,
        "max_position_embeddings": 64,
        "sliding_window": 6,
    }
    if not hasattr(transformers, f"{name}ForCausalLM"):
        pytest.skip(f"transformers {transformers.__version__} has no {name}")
    config_class = getattr(transformers, f"{name}TextConfig", None) or getattr(transformers, f"{name}Config")
    config = config_class(**sizes | OF_SEVERAL_SLOT_TYPES[name])
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    if inspect.signature(type(model.model.layers[0]).forward).return_annotation is not torch.Tensor:
        pytest.skip(f"transformers {transformers.__version__} does not declare what layers of {name} return")
    sites = [r"model\.layers\.\d+"]
    return model, petl_ext.attach(model, petl_ext.DASConfig(bottleneck=4, bypass_bottleneck=4, sites=sites))


@pytest.mark.parametrize(
    "skip", [list(subset) for size in range(4) for subset in combinations(range(4), size)], ids=str
)
@pytest.mark.parametrize("name", OF_SEVERAL_SLOT_TYPES)
def test_each_running_layer_takes_a_slot_of_its_own_type_in_the_cache(name, skip):
    model, attachment = attached_with_slot_types(name)
    slot_types = OF_SEVERAL_SLOT_TYPES[name]["layer_types"]
    if {slot_type for index, slot_type in enumerate(slot_types) if index not in skip} < set(slot_types):
        with pytest.raises(ValueError, match=r"no layer of model\.layers that is \w+_attention would run"):
            attachment.skip(skip)
        assert attachment.skipped == ()
        attachment.skip(skip, decodes=False)
        assert attachment.skipped == tuple(skip)
        return
    attachment.skip(skip)
    words = torch.randint(5, 60, (1, 15), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected, cache, steps = model(input_ids=words).logits, None, []
        for position in range(words.size(1)):
            output = model(input_ids=words[:, position : position + 1], **{CACHE: cache}, use_cache=True)
            cache = output[CACHE]
            steps.append(output.logits)
    torch.testing.assert_close(torch.cat(steps, 1), expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())


def test_a_search_may_draw_what_cannot_decode():
    model = attached_with_slot_types("Gemma2")[0]
    search = petl_ext.DepthSearch(model, num_skip=2, interval=1, seed=1)
    words = torch.randint(5, 60, (1, 5))
    drawn = set()
    for _ in range(12):
        drawn.add(search.sample())
        search.update(lambda: model(input_ids=words, labels=words).loss)
    assert {(0, 2), (1, 3)} & drawn


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_generation_is_the_same_with_and_without_a_cache(family):
    model, attachment = attached(family)
    randomize(attachment)
    attachment.skip([0, len(attachment.layers) - LAYERS])
    inputs = {
        "input_ids": make_inputs(model)["input_ids"],
        "max_new_tokens": 6,
        "do_sample": False,
        "min_new_tokens": 6,
    }
    torch.testing.assert_close(model.generate(**inputs, use_cache=True), model.generate(**inputs, use_cache=False))
