"""The published totals, and the formulas of the ops against the multiplications that torch and the kernels count."""

import subprocess
import sys

import pytest
import torch
from tiny_vilt import CONFIGS, DIM, LAYERS, TOKENS, make_inputs, make_model, run
from torch_macs import counted_macs

import petl_ext
from petl_ext import AdapterLayer, APTConfig, DeepPromptConfig, counting
from petl_ext.attaching.methods.deep_prompts import deep_prompt_macs, deep_prompt_parameters
from petl_ext.nn.adapter import adapter_macs, adapter_parameters
from petl_ext.nn.apt import apt_macs, apt_parameters
from petl_ext.ops import adapter, adapter_reference, apt, apt_reference, attention_pool, attention_pool_reference

VILT = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "initializer_range": 0.02}
# Rows of the published MACs, one per stream of the model; the number of text tokens is what makes the totals right.
VILT_TOKENS, METER_TOKENS = (243,), (41, 577)
ROWS, PROMPTS, BOTTLENECK, HEADS = 10, 7, 6, 3


def test_published_parameters():
    """Of the APT and the DAS repository."""
    assert 12 * apt_parameters(dim=768, num_prompts=200, rank=4) == 1_916_940
    assert 24 * apt_parameters(dim=768, num_prompts=200, rank=4) == 3_833_880
    assert 12 * deep_prompt_parameters(dim=768, num_prompts=200) == 1_843_200
    assert 24 * adapter_parameters(dim=768, bottleneck=96) == 3_559_680
    assert 36 * adapter_parameters(dim=768, bottleneck=96) == 5_339_520
    assert 12 * adapter_parameters(dim=768, bottleneck=96, layer_norm=True) == 1_798_272
    assert 24 * adapter_parameters(dim=768, bottleneck=102, layer_norm=True) == 3_817_872
    assert adapter_parameters(dim=768, bottleneck=192, layer_norm=True) == 297_408
    assert adapter_parameters(dim=768, bottleneck=288, layer_norm=True) == 444_960


def apt_of_width_768(tokens):
    return apt_macs(tokens, dim=768, num_prompts=200, rank=4)


def adapter_of_width_96(tokens):
    return adapter_macs(tokens, dim=768, bottleneck=96)


def scaled_adapter_of_width_96(tokens):
    """As the counter of the APT repository, thop, has it: 4 for each element that a LayerNorm with weights takes."""
    return adapter_of_width_96(tokens) + 4 * tokens * 768


@pytest.mark.parametrize(
    ("macs_of_site", "sites", "tokens", "published"),
    [
        (apt_of_width_768, 12, VILT_TOKENS, 0.91),
        (apt_of_width_768, 12, METER_TOKENS, 2.31),
        (adapter_of_width_96, 24, VILT_TOKENS, 0.86),
        (adapter_of_width_96, 18, METER_TOKENS, 1.64),
        (scaled_adapter_of_width_96, 12, VILT_TOKENS, 0.44),
        (scaled_adapter_of_width_96, 12, METER_TOKENS, 1.12),
        (lambda tokens: deep_prompt_macs(tokens, 768, 200, projections=3), 12, VILT_TOKENS, 5.14),
    ],
)
def test_published_macs(macs_of_site, sites, tokens, published):
    """Of the APT repository's README, in G. METER has `sites` in the text stream and as many in the image stream."""
    assert round(sites * sum(map(macs_of_site, tokens)) / 1e9, 2) == published


@pytest.mark.parametrize(
    ("config", "parameters", "macs"),
    [(APTConfig(), 1_916_940, 910_540_800), (DeepPromptConfig(), 1_843_200, 3_726_950_400)],
)
def test_a_vilt_of_published_size_gets_them(config, parameters, macs):
    report = petl_ext.attach(make_model(**VILT), config).report(tokens=243)
    assert (report.trained, report.macs) == (parameters, macs)


def test_apt_macs_are_what_torch_counts():
    layer = petl_ext.APTLayer(DIM, num_prompts=7, rank=3)
    x = torch.randn(1, TOKENS, DIM)
    counted = counted_macs(lambda: apt_reference(x, x, layer.prompts, layer.keys(), layer.log_scale))
    assert counted == apt_macs(TOKENS, DIM, num_prompts=7, rank=3)


@pytest.mark.parametrize("layer_norm", [False, True])
def test_adapter_macs_and_parameters_are_what_torch_counts(layer_norm):
    layer = AdapterLayer(DIM, BOTTLENECK, layer_norm=layer_norm)
    x, weights = torch.randn(1, TOKENS, DIM), (layer.down, layer.down_bias, layer.up, layer.up_bias)
    norm = {"norm_weight": layer.norm_weight, "norm_bias": layer.norm_bias}
    counted = counted_macs(lambda: adapter_reference(x, *weights, **norm))
    assert counted == adapter_macs(TOKENS, DIM, BOTTLENECK)
    assert counting.count_parameters(layer)[1] == adapter_parameters(DIM, BOTTLENECK, layer_norm)


def test_deep_prompt_macs_are_what_torch_counts():
    model = make_model()
    inputs = make_inputs(model, batch=1)
    attachment = petl_ext.attach(model, CONFIGS[1])
    with attachment.disable():
        backbone = counted_macs(lambda: run(model, inputs))
    counted = counted_macs(lambda: run(model, inputs)) - backbone
    assert counted == attachment.report(TOKENS).macs == LAYERS * deep_prompt_macs(TOKENS, DIM, num_prompts=3)


def test_shared_parameters_count_once():
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Linear(3, 2))
    model[1].weight = model[0].weight
    model[0].bias.requires_grad_(False)
    assert counting.count_parameters(model) == (8, 10)


def backward_macs(function, inputs, trained):
    """Of the forward pass and of the gradients of the inputs named in `trained`."""
    tensors = {name: tensor.detach().requires_grad_(name in trained) for name, tensor in inputs.items()}
    return counted_macs(lambda: function(**tensors).sum().backward())


def forward_macs(function, inputs):
    """Where nothing trains, and where all does: autograd's forward is another path."""
    with torch.no_grad():
        untrained = counted_macs(lambda: function(**inputs))
    trained = {name: tensor.detach().requires_grad_() for name, tensor in inputs.items()}
    return untrained, counted_macs(lambda: function(**trained))


def apt_inputs():
    shapes = {"x": (2, 5, DIM), "y": (2, 5, DIM), "prompts": (PROMPTS, DIM), "keys": (PROMPTS, DIM), "log_scale": (1,)}
    return {name: torch.randn(shape) for name, shape in shapes.items()}


def adapter_inputs():
    shapes = {
        "x": (2, 5, DIM),
        "residual": (2, 5, DIM),
        "norm_weight": (DIM,),
        "norm_bias": (DIM,),
        "down": (BOTTLENECK, DIM),
        "down_bias": (BOTTLENECK,),
        "up": (DIM, BOTTLENECK),
        "up_bias": (DIM,),
        "scale": (1,),
    }
    return {name: torch.randn(shape) for name, shape in shapes.items()}


def attention_pool_inputs():
    return {"visual": torch.randn(2, 5, DIM), "query": torch.randn(2, HEADS, DIM)}


# The matrix products of backward, by what trains.
APT_PRODUCTS = [
    (["y"], 1),
    (["log_scale"], 1),
    (["x"], 2),
    (["prompts"], 2),
    (["keys"], 2),
    (["x", "y", "prompts", "keys", "log_scale"], 4),
]
ADAPTER_PRODUCTS = [
    (["residual"], 0),
    (["x"], 2),
    (["scale"], 1),
    (["down", "down_bias", "up", "up_bias"], 3),
    (list(adapter_inputs()), 4),
]


@pytest.mark.parametrize(("trained", "products"), APT_PRODUCTS, ids=str)
def test_apt_kernels_count(trained, products):
    forward = 2 * ROWS * PROMPTS * DIM
    assert forward_macs(apt, apt_inputs()) == (forward, forward)
    assert backward_macs(apt, apt_inputs(), trained) == forward + products * ROWS * PROMPTS * DIM


@pytest.mark.parametrize(("trained", "products"), ADAPTER_PRODUCTS, ids=str)
def test_adapter_kernels_count(trained, products):
    forward = 2 * ROWS * BOTTLENECK * DIM
    assert forward_macs(adapter, adapter_inputs()) == (forward, forward)
    assert backward_macs(adapter, adapter_inputs(), trained) == forward + products * ROWS * BOTTLENECK * DIM


@pytest.mark.parametrize(("trained", "products"), [(["query"], 3), (["visual"], 4), (["visual", "query"], 5)], ids=str)
def test_attention_pool_kernels_count(trained, products):
    forward = 2 * ROWS * HEADS * DIM
    assert forward_macs(attention_pool, attention_pool_inputs()) == (forward, forward)
    assert backward_macs(attention_pool, attention_pool_inputs(), trained) == forward + products * ROWS * HEADS * DIM


def test_kernels_against_their_references(monkeypatch):
    """The backward of attention pooling computes one product more: it keeps no weights. So does the adapter's where its
    forward has kept no hidden units."""
    inputs = attention_pool_inputs()
    reference = backward_macs(attention_pool_reference, inputs, inputs)
    assert backward_macs(attention_pool, inputs, inputs) == reference + ROWS * HEADS * DIM
    assert backward_macs(apt, apt_inputs(), apt_inputs()) == backward_macs(apt_reference, apt_inputs(), apt_inputs())
    reference = backward_macs(adapter_reference, adapter_inputs(), adapter_inputs())
    assert backward_macs(adapter, adapter_inputs(), adapter_inputs()) == reference
    monkeypatch.setattr(sys.modules["petl_ext.ops.adapter"], "MIXING", ())
    assert backward_macs(adapter, adapter_inputs(), adapter_inputs()) == reference + ROWS * BOTTLENECK * DIM


def test_registering_formulas_is_late_and_harmless():
    counting.register_flop_formulas()
    counting.register_flop_formulas()
    script = "import sys, petl_ext, petl_ext.counting; sys.exit('torch.utils.flop_counter' in sys.modules)"
    subprocess.run([sys.executable, "-c", script], check=True)
