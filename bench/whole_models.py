"""Whole models of published size, bare and with trained layers: what those cost, and what our kernels save of it.

    python -m pytest bench/whole_models.py --keep [--rounds 5] [-k "vit and forward"]

`make bench` leaves it out: a training step of a batch of eight takes seconds on one thread. The same model is compared

- bare;
- own: with the trained modules of an original code base, AdaptFormer's adapter with its dropout of 0.1 (ViT), APT's
  prompts (ViLT) or APT's and DAS's adapters (METER's fusion layers, of states that its two encoders made);
- patched: the same after `petl_ext.patch`;
- attached: with our layer of the same size by `petl_ext.attach`;
- lora: by peft, of rank 8 in queries and values.

In training, the trained layers and a classifier learn.
"""

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from clock import thread_clock
from original_modules import Adapter, ParallelAdapter, approximate_prompt
from peft import LoraConfig, inject_adapter_in_model
from shapes import CLIP_IMAGE, CLIP_IMAGE_ONE, METER_IMAGE, METER_IMAGE_ONE, METER_TEXT_ONE, VILT, VILT_ONE
from test_skipping import make_inputs
from torch import nn
from transformers import ViltConfig, ViltModel, ViTConfig, ViTModel

import petl_ext
from petl_ext import AdapterConfig, APTConfig
from petl_ext.models import MeterConfig, MeterModel

LABELS = 10
DTYPES = {"float32": torch.float32, "bfloat16 autocast": torch.bfloat16}


class Fusion(MeterModel):
    """METER from its fusion layers on."""

    def forward(self, text_states, image_states):
        return self.fuse(text_states, image_states)


def vit():
    return ViTModel(ViTConfig(), add_pooling_layer=False)


def vilt():
    return ViltModel(ViltConfig(), add_pooling_layer=False)


def meter():
    encoder = {"num_hidden_layers": 1}
    return Fusion(MeterConfig(text_config=encoder, vision_config=encoder))


def pixels(shape):
    return {"pixel_values": torch.randn(shape.batch, 3, 224, 224, generator=torch.Generator().manual_seed(0))}


def states(shape):
    generator = torch.Generator().manual_seed(0)
    tokens = {"text_states": METER_TEXT_ONE.tokens, "image_states": shape.tokens}
    return {name: torch.randn(shape.batch, count, shape.dim, generator=generator) for name, count in tokens.items()}


def with_adapters(model):
    """AdaptFormer's module beside every MLP."""
    for block in model.layers:
        block.mlp.trained = ParallelAdapter(model.config.hidden_size, 64, dropout=0.1, adapter_scalar="0.1")
        block.mlp.register_forward_hook(_added)


def with_prompts(model):
    """APT's module, of an attention's input and output."""
    for block in model.encoder.layer:
        attention = block.attention
        attention.trained = approximate_prompt(model.config.num_attention_heads, model.config.hidden_size, 4, 200)
        attention.register_forward_hook(_prompted)


def with_bottlenecks(model):
    """An adapter behind every attention and MLP of the fusion layers, where their outputs are not added yet."""
    for name, module in [*model.named_modules()]:
        if name.startswith("cross_modal") and name.endswith("output.dropout"):
            module.trained = Adapter(model.config.hidden_size, 96)
            module.register_forward_hook(_adapted)


def _adapted(dropout, arguments, out):
    return dropout.trained(out)


def _added(mlp, arguments, out):
    return out + mlp.trained(arguments[0], False)


def _prompted(attention, arguments, out):
    return (attention.trained(out[0], arguments[0]), *out[1:])


class WholeModel(NamedTuple):
    """How a model is made, its inputs, the original modules at their sites, our configuration, and the first output."""

    make: Callable
    inputs: Callable
    add_own: Callable
    config: object
    output: str = "last_hidden_state"


MODELS = {
    "vit adapters": WholeModel(
        vit, pixels, with_adapters, AdapterConfig(kind="parallel", bottleneck=64, scale=0.1, dropout=0.1)
    ),
    "vilt prompts": WholeModel(vilt, make_inputs, with_prompts, APTConfig(num_prompts=200)),
    "meter adapters": WholeModel(
        meter, states, with_bottlenecks, AdapterConfig(kind="sequential", bottleneck=96), "text_last_hidden_state"
    ),
}
SHAPES = {
    "vit adapters": (CLIP_IMAGE_ONE, CLIP_IMAGE),
    "vilt prompts": (VILT_ONE, VILT),
    "meter adapters": (METER_IMAGE_ONE, METER_IMAGE),
}


class Classifier(nn.Module):
    """A model's first token, classified. Of the model the trained layers alone train."""

    def __init__(self, whole, contender):
        super().__init__()
        self.output = whole.output
        self.model = whole.make().requires_grad_(False)
        if contender in ("own", "patched"):
            whole.add_own(self.model)
        if contender == "patched":
            petl_ext.patch(self.model)
        if contender == "attached":
            petl_ext.attach(self.model, whole.config)
        if contender == "lora":
            inject_adapter_in_model(LoraConfig(r=8, target_modules=["query", "value", "q_proj", "v_proj"]), self.model)
        self.classifier = nn.Linear(self.model.config.hidden_size, LABELS)

    def forward(self, inputs):
        return self.classifier(self.model(**inputs)[self.output][:, 0])


def forward(classifier, inputs, dtype):
    classifier.eval()

    def run():
        with torch.no_grad(), torch.autocast("cpu", dtype, enabled=dtype is not torch.float32):
            classifier(inputs)

    return run


def training_step(classifier, inputs, dtype):
    classifier.train()
    trained = [parameter for parameter in classifier.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained)

    def run():
        with torch.autocast("cpu", dtype, enabled=dtype is not torch.float32):
            logits = classifier(inputs)
            loss = F.cross_entropy(logits.float(), torch.zeros(len(logits), dtype=torch.long))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return run


@pytest.mark.parametrize("direction", [forward, training_step], ids=lambda f: f.__name__)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("name", "shape"), [(name, shape) for name in MODELS for shape in SHAPES[name]], ids=str)
@pytest.mark.parametrize(("ours", "others"), [("patched", ("bare", "own")), ("attached", ("bare", "lora"))])
def test_whole_model(ours, others, name, shape, dtype, direction, compare):
    torch.manual_seed(0)
    whole = MODELS[name]
    inputs = whole.inputs(shape)
    contenders = {
        contender: direction(Classifier(whole, contender), inputs, DTYPES[dtype]) for contender in (*others, ours)
    }
    title = f"whole {name} {ours} {direction.__name__} {dtype} {shape}"
    compare(title, shape, contenders, ours, thread_clock)
