"""Whole models of published size, bare and with trained layers: what those cost, and what our kernels save of it.

    python -m pytest bench/whole_models.py --keep [--rounds 5] [-k "vit and forward"]

`make bench` leaves it out: a training step of a batch of eight takes seconds on one thread. The same model is compared

- bare;
- own: with the trained module of an original code base at twelve places, AdaptFormer's adapter with its dropout of 0.1
  or APT's prompts;
- patched: the same after `petl_ext.patch`;
- attached: with our layer of the same size by `petl_ext.attach`;
- lora: by peft, of rank 8 in queries and values.

In training, the trained layers and a classifier learn.
"""

import pytest
import torch
import torch.nn.functional as F
from clock import thread_clock
from original_modules import ParallelAdapter, approximate_prompt
from peft import LoraConfig, inject_adapter_in_model
from shapes import CLIP_IMAGE, CLIP_IMAGE_ONE, VILT, VILT_ONE
from test_skipping import make_inputs
from torch import nn
from transformers import ViltConfig, ViltModel, ViTConfig, ViTModel

import petl_ext

LABELS = 10
DTYPES = {"float32": torch.float32, "bfloat16 autocast": torch.bfloat16}


def vit(sizes):
    return ViTModel(ViTConfig(**sizes), add_pooling_layer=False)


def vilt(sizes):
    return ViltModel(ViltConfig(**sizes), add_pooling_layer=False)


def pixels(shape):
    return {"pixel_values": torch.randn(shape.batch, 3, 224, 224, generator=torch.Generator().manual_seed(0))}


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


def _added(mlp, arguments, out):
    return out + mlp.trained(arguments[0], False)


def _prompted(attention, arguments, out):
    return (attention.trained(out[0], arguments[0]), *out[1:])


# Of each model: how it is made, its inputs, the original module at its places, and our configuration.
MODELS = {
    "vit adapters": (
        vit,
        pixels,
        with_adapters,
        petl_ext.AdapterConfig(kind="parallel", bottleneck=64, scale=0.1, dropout=0.1),
    ),
    "vilt prompts": (vilt, make_inputs, with_prompts, petl_ext.APTConfig(num_prompts=200)),
}
SHAPES = {"vit adapters": (CLIP_IMAGE_ONE, CLIP_IMAGE), "vilt prompts": (VILT_ONE, VILT)}


class Classifier(nn.Module):
    """A model's first token, classified. Of the model the trained layers alone train."""

    def __init__(self, name, contender, **sizes):
        super().__init__()
        make, _, add_own, config = MODELS[name]
        self.model = make(sizes).requires_grad_(False)
        if contender in ("own", "patched"):
            add_own(self.model)
        if contender == "patched":
            petl_ext.patch(self.model)
        if contender == "attached":
            petl_ext.attach(self.model, config)
        if contender == "lora":
            inject_adapter_in_model(LoraConfig(r=8, target_modules=["query", "value", "q_proj", "v_proj"]), self.model)
        self.classifier = nn.Linear(self.model.config.hidden_size, LABELS)

    def forward(self, inputs):
        return self.classifier(self.model(**inputs).last_hidden_state[:, 0])


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
    inputs = MODELS[name][1](shape)
    contenders = {
        contender: direction(Classifier(name, contender), inputs, DTYPES[dtype]) for contender in (*others, ours)
    }
    title = f"whole {name} {ours} {direction.__name__} {dtype} {shape}"
    compare(title, shape, contenders, ours, thread_clock)
