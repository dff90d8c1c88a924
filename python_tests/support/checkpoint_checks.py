"""What the tests of all checkpoint loaders share."""

import original_checkpoints as originals
import pytest
import tiny_meter
import tiny_vilt
import torch

from petl_ext import AdapterConfig, APTConfig, DASConfig
from petl_ext.models import load_meter_checkpoint, load_vilt_checkpoint

VILT = (tiny_vilt, originals.vilt_checkpoint, load_vilt_checkpoint)


METER = (tiny_meter, originals.meter_checkpoint, load_meter_checkpoint)


METHODS = {
    "apt": APTConfig(num_prompts=5, rank=2),
    "sequential": AdapterConfig(bottleneck=3),
    "parallel": AdapterConfig(kind="parallel", bottleneck=3),
    "das": DASConfig(bottleneck=3, bypass_bottleneck=4),
}


def outcome_of(report, key):
    (outcome,) = (outcome for outcome in report.keys if outcome.key == key)
    return outcome


def assert_equal(model, expected):
    ours, theirs = model.state_dict(), expected.state_dict()
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


def assert_refused(load, model, path, message, ignore=(), error=ValueError):
    before = tiny_vilt.snapshot(model)
    with pytest.raises(error, match=message) as caught:
        load(model, path, ignore)
    assert tiny_vilt.snapshot(model) == before
    return str(caught.value)
