"""What the tests of DVP share: families and layers to run on, inputs, and when two outputs are the same."""

import pytest
import torch
from tiny_dvp import CLASSES, END, LAYERS, TOKENS, make_inputs

every_family = pytest.mark.parametrize("family", CLASSES)
every_layer = pytest.mark.parametrize("insert_layer", range(LAYERS))
with_and_without_adapters = pytest.mark.parametrize("use_adapters", [False, True], ids=["plain", "adapters"])


def logits(model, inputs):
    return model(**inputs).logits


def assert_same(found, expected):
    """Up to what transformers' norms of T5 and LLaMA round, which work in float32 whatever they are given."""
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def differ(found, expected):
    return (found - expected).abs().max() > 1e-2


# Modules of the language model that have an adapter, written out for one layer of each stack.
ADAPTER_PLACES = {
    "bert": ["encoder.layer.{i}.attention.output.dropout", "encoder.layer.{i}.output.dropout"],
    "t5": [
        "encoder.block.{i}.layer.0.SelfAttention",
        "encoder.block.{i}.layer.1.DenseReluDense",
        "decoder.block.{i}.layer.0.SelfAttention",
        "decoder.block.{i}.layer.1.EncDecAttention",
        "decoder.block.{i}.layer.2.DenseReluDense",
    ],
    "llama": ["model.layers.{i}.self_attn", "model.layers.{i}.mlp"],
}


def filled(names):
    return {name.format(i=i) for name in names for i in range(LAYERS)}


def words_and_images(model, padding="right"):
    """Questions whose end is their last token, the first of them padded."""
    inputs = make_inputs(model)
    inputs["input_ids"][inputs["input_ids"] == END] = 5
    if padding == "left":
        inputs |= {name: inputs[name].roll(TOKENS // 2, 1) for name in ("input_ids",)}
        inputs["attention_mask"] = inputs["attention_mask"].flip(1)
    return inputs
