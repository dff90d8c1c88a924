"""What the tests of METER share: the models to run on, equal weights, and a loss by hand."""

import pytest
import torch
from tiny_meter import MODELS

every_model = pytest.mark.parametrize("model_class", MODELS, ids=lambda model_class: model_class.__name__)


def assert_same_weights(model, expected):
    """Bit for bit. Outputs may differ by a rounding: loaded tensors lie elsewhere in memory."""
    weights, expected = model.state_dict(), expected.state_dict()
    assert weights.keys() == expected.keys()
    assert [name for name in weights if not torch.equal(weights[name], expected[name])] == []


def cross_entropy_by_hand(logits, labels):
    return -sum(row.softmax(0)[label].log() for row, label in zip(logits, labels, strict=True)) / len(labels)
