"""Adapters behind and beside mixtures of experts, and what else only some of a family's checkpoints have."""

from itertools import combinations

import pytest
import torch
from modern_models import lacking, make, make_inputs, run
from modern_text_sizes import FULL, SLIDING
from skipping_checks import cache_error
from tiny_vilt import randomize, snapshot

import petl_ext
from petl_ext import AdapterConfig, APTConfig, DASConfig

BOTTLENECK = {"bottleneck": 4, "activation": "gelu"}
MIXTURES = {
    "mixtral": r"layers\.1\.mlp",
    "gpt_oss": r"layers\.1\.mlp",
    "qwen3_next": r"layers\.1\.mlp",
    "llama4_text": r"layers\.1\.feed_forward",
}
# As published: the last layers take the keys and values of earlier ones, full attentions their keys for values, and
# experts stand beside each MLP.
GEMMA4 = {
    "num_hidden_layers": 6,
    "layer_types": [SLIDING, FULL] * 3,
    "num_kv_shared_layers": 2,
    "attention_k_eq_v": True,
    "enable_moe_block": True,
    "num_experts": 4,
    "top_k_experts": 2,
    "moe_intermediate_size": 16,
}


def made(name, **changes):
    if lacking(name):
        pytest.skip(lacking(name))
    return make(name, **changes)


@pytest.mark.parametrize("manner", ["sequential", "parallel"])
@pytest.mark.parametrize("name", MIXTURES)
def test_what_a_mixture_says_is_changed_and_what_its_router_says_is_not(name, manner):
    model = made(name)
    attachment = petl_ext.attach(model, AdapterConfig(manner, **BOTTLENECK, sites=[MIXTURES[name]]))
    randomize(attachment)
    mixture = model.get_submodule(attachment.sites[0])
    x = torch.randn(2, 3, 32)
    changed = mixture(x)
    with attachment.disable():
        plain = mixture(x)
    ours, theirs = (output if isinstance(output, tuple) else (output,) for output in (changed, plain))
    expected = (
        mixture.adapter(theirs[0]) if manner == "sequential" else mixture.adapter(x, residual=theirs[0].view(x.shape))
    )
    torch.testing.assert_close(ours[0].view(x.shape), expected.view(x.shape))
    assert len(ours) == len(theirs) and all(map(torch.equal, ours[1:], theirs[1:]))


def test_mlps_and_mixtures_in_one_stack():
    model = made("qwen3_moe", mlp_only_layers=[0])
    assert type(model.model.layers[0].mlp) is not type(model.model.layers[1].mlp)
    sites = petl_ext.attach(model, AdapterConfig(**BOTTLENECK)).sites
    assert [name for name in sites if name.endswith("mlp")] == [f"model.layers.{index}.mlp" for index in range(3)]


def test_a_mixture_with_something_behind_it_is_refused():
    model = made("mixtral")
    model.model.layers[1].mlp.norm = torch.nn.LayerNorm(32)
    before = snapshot(model)
    message = r"layers\.1\.mlp: its experts must be its last step, but norm\.weight, norm\.bias may come behind"
    with pytest.raises(ValueError, match=message):
        petl_ext.attach(model, AdapterConfig(**BOTTLENECK, sites=[MIXTURES["mixtral"]]))
    assert snapshot(model) == before


@pytest.mark.parametrize("config", [APTConfig(num_prompts=5), AdapterConfig(**BOTTLENECK)], ids=["apt", "adapter"])
def test_gemma_4_as_it_is_published(config):
    model = made("gemma4_text", **GEMMA4)
    inputs = make_inputs("gemma4_text")
    before = run(model, inputs)
    attachment = petl_ext.attach(model, config)
    randomize(attachment)
    parts = [name.rpartition(".")[2] for name in attachment.sites]
    expected = ["self_attn"] if isinstance(config, APTConfig) else ["self_attn", "mlp", "experts"]
    assert parts == expected * 6
    run(model, inputs).square().sum().backward()
    assert all(parameter.grad.any() for _, parameter in attachment.named_parameters())
    attachment.detach()
    assert torch.equal(run(model, inputs), before)


@torch.no_grad()
def test_layers_whose_keys_others_take_must_run():
    model = made("gemma4_text", **GEMMA4)
    before = snapshot(model)
    sizes = {"bottleneck": 4, "bypass_bottleneck": 4}
    with pytest.raises(ValueError, match=r"layers\.2: it must run, as later layers take its keys and values; name the"):
        petl_ext.attach(model, DASConfig(**sizes))
    assert snapshot(model) == before
    attachment = petl_ext.attach(model, DASConfig(**sizes, sites=[r"layers\.[0145]"]))
    randomize(attachment)
    words = torch.randint(5, 50, (1, 11), generator=torch.Generator().manual_seed(3))
    for skip in (each for size in range(5) for each in combinations(range(4), size)):
        attachment.skip(skip)
        assert cache_error(model, {}, "input_ids", words) <= 1e-4, skip
