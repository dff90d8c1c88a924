"""The published totals, and the formulas against the multiply-adds that torch counts."""

import pytest
import torch
from tiny_vilt import CONFIGS, DIM, LAYERS, TOKENS, make_inputs, make_model, run
from torch.utils.flop_counter import FlopCounterMode

import petl_ext
from petl_ext import APTConfig, DeepPromptConfig, cost
from petl_ext.ops import apt_reference

VILT = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "initializer_range": 0.02}


def test_published_totals():
    assert 12 * cost.apt_parameters(dim=768, num_prompts=200, rank=4) == 1_916_940
    assert 24 * cost.apt_parameters(dim=768, num_prompts=200, rank=4) == 3_833_880
    assert 12 * cost.deep_prompt_parameters(dim=768, num_prompts=200) == 1_843_200
    assert round(12 * cost.apt_macs(243, dim=768, num_prompts=200, rank=4) / 1e9, 2) == 0.91
    assert round(12 * cost.deep_prompt_macs(243, dim=768, num_prompts=200, projections=3) / 1e9, 2) == 5.14
    assert round(12 * sum(cost.apt_macs(n, dim=768, num_prompts=200, rank=4) for n in (40, 577)) / 1e9, 1) == 2.3


@pytest.mark.parametrize(
    ("config", "parameters", "macs"),
    [(APTConfig(), 1_916_940, 910_540_800), (DeepPromptConfig(), 1_843_200, 3_726_950_400)],
)
def test_a_vilt_of_published_size_gets_them(config, parameters, macs):
    report = petl_ext.attach(make_model(**VILT), config).report(tokens=243)
    assert (report.trained, report.macs) == (parameters, macs)


def counted_macs(compute):
    with FlopCounterMode(display=False) as counter:
        compute()
    return counter.get_total_flops() // 2


def test_apt_macs_are_what_torch_counts():
    layer = petl_ext.APTLayer(DIM, num_prompts=7, rank=3)
    x = torch.randn(1, TOKENS, DIM)
    counted = counted_macs(lambda: apt_reference(x, x, layer.prompts, layer.keys(), layer.log_scale))
    assert counted == cost.apt_macs(TOKENS, DIM, num_prompts=7, rank=3)


def test_deep_prompt_macs_are_what_torch_counts():
    model = make_model()
    inputs = make_inputs(model, batch=1)
    attachment = petl_ext.attach(model, CONFIGS[1])
    with attachment.disable():
        backbone = counted_macs(lambda: run(model, inputs))
    counted = counted_macs(lambda: run(model, inputs)) - backbone
    assert counted == attachment.report(TOKENS).macs == LAYERS * cost.deep_prompt_macs(TOKENS, DIM, num_prompts=3)


def test_shared_parameters_count_once():
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Linear(3, 2))
    model[1].weight = model[0].weight
    model[0].bias.requires_grad_(False)
    assert cost.count_parameters(model) == (8, 10)
