"""Inference of a ViLT of published size with layers skipped: four of its twelve blocks are bypass adapters."""

import pytest
import torch
from shapes import VILT, VILT_ONE
from transformers import ViltConfig, ViltModel

import petl_ext
from petl_ext import DASConfig

SKIPPED = [2, 5, 7, 9]
# 10 x 20 patches: with the image's class token and the text, as many tokens as the shape says.
PATCHES, IMAGE = 200, (320, 640)


def make_inputs(shape):
    generator = torch.Generator().manual_seed(0)
    text = shape.tokens - PATCHES - 1
    return {
        "input_ids": torch.randint(1, ViltConfig().vocab_size, (shape.batch, text), generator=generator),
        "pixel_values": torch.randn(shape.batch, 3, *IMAGE, generator=generator),
    }


def make_model(skip=None):
    """Without an attachment where `skip` is None. Each has weights of its own; the values cost no time."""
    model = ViltModel(ViltConfig()).eval()
    if skip is not None:
        petl_ext.attach(model, DASConfig(bottleneck=96, bypass_bottleneck=192)).skip(skip)
    return model


def forward(model, inputs):
    def run():
        with torch.no_grad():
            model(**inputs)

    return run


@pytest.mark.parametrize("shape", [VILT_ONE, VILT], ids=str)
def test_skipping(shape, compare):
    inputs = make_inputs(shape)
    models = {"backbone": make_model(), "nothing skipped": make_model([]), "skipped": make_model(SKIPPED)}
    contenders = {name: forward(model, inputs) for name, model in models.items()}
    compare(f"skipping {len(SKIPPED)} of 12 layers forward float32 {shape}", shape, contenders, "skipped")
