"""Adapters behind and beside attentions and MLPs: against formulas written out by hand, and the published counts."""

import pytest
import tiny_meter
import tiny_vilt
import torch
from tiny_families import make_inputs, make_model, run
from tiny_vilt import randomize

import petl_ext
from petl_ext import AdapterConfig, APTConfig, DASConfig
from petl_ext.ops import adapter_reference

VILT = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "initializer_range": 0.02}
POST_NORM = ("meter", "bert", "roberta")


def by_hand(adapter, x, residual):
    return adapter_reference(
        x,
        adapter.down,
        adapter.down_bias,
        adapter.up,
        adapter.up_bias,
        scale=adapter.scale,
        norm_weight=adapter.norm_weight,
        norm_bias=adapter.norm_bias,
        residual=residual,
    )


def record(modules):
    """Lists that fill with (arguments, output) of each module when the model runs."""
    calls = {module: [] for module in modules}
    for module, seen in calls.items():
        module.register_forward_hook(lambda _, arguments, output, seen=seen: seen.append((arguments, output)))
    return calls


def one_call(calls, module):
    ((arguments, output),) = calls[module]
    return arguments, output


def check(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def attached(family, config):
    model = make_model(family)
    attachment = petl_ext.attach(model, config)
    randomize(attachment)
    return model, attachment


@pytest.mark.parametrize("family", POST_NORM)
def test_sequential_in_post_norm_blocks(family):
    model, attachment = attached(family, AdapterConfig(bottleneck=5))
    sites = [model.get_submodule(name) for name in attachment.sites]
    calls = record([module for site in sites for module in (site, site.dense)])
    run(model, make_inputs(model))
    assert len(sites) == {"meter": 18, "bert": 6, "roberta": 6}[family]
    for site in sites:
        (_, residual), output = one_call(calls, site)
        _, projected = one_call(calls, site.dense)
        check(output, site.LayerNorm(by_hand(site.adapter, projected, projected) + residual))


@pytest.mark.parametrize("family", POST_NORM)
def test_parallel_in_post_norm_blocks(family):
    model, attachment = attached(family, AdapterConfig(kind="parallel", bottleneck=5))
    sites = [model.get_submodule(name) for name in attachment.sites]
    calls = record([module for site in sites for module in (site, site.dense)])
    run(model, make_inputs(model))
    assert len(sites) == {"meter": 12, "bert": 3, "roberta": 3}[family]
    for site in sites:
        (_, residual), output = one_call(calls, site)
        _, projected = one_call(calls, site.dense)
        assert site.adapter.scale == 4.0 and site.adapter.norm_weight is not None
        check(output, by_hand(site.adapter, residual, site.LayerNorm(projected + residual)))


def vilt_calls(config):
    model, attachment = attached("vilt", config)
    blocks = list(model.vilt.encoder.layer)
    modules = [m for b in blocks for m in (b, b.layernorm_before, b.layernorm_after, b.attention.output.dense)]
    calls = record(modules + [m for b in blocks for m in (b.attention.output, b.output, b.output.dense)])
    run(model, make_inputs(model))
    return attachment, blocks, calls


def test_sequential_in_vilt():
    attachment, blocks, calls = vilt_calls(AdapterConfig(bottleneck=5))
    assert len(attachment.sites) == 2 * len(blocks)
    for block in blocks:
        attention, mlp = block.attention.output, block.output
        _, projected = one_call(calls, attention.dense)
        check(one_call(calls, attention)[1], by_hand(attention.adapter, projected, projected))
        (_, stream), output = one_call(calls, mlp)
        _, projected = one_call(calls, mlp.dense)
        check(output, by_hand(mlp.adapter, projected, projected) + stream)
        check(one_call(calls, block)[1][0], output)


def test_parallel_in_vilt_reads_the_normalized_stream():
    attachment, blocks, calls = vilt_calls(AdapterConfig(kind="parallel", bottleneck=5))
    assert len(attachment.sites) == len(blocks)
    for block in blocks:
        attention = block.attention.output
        _, normed = one_call(calls, block.layernorm_before)
        _, projected = one_call(calls, attention.dense)
        check(one_call(calls, attention)[1], by_hand(attention.adapter, normed, projected))


def test_parallel_beside_the_mlp_too_where_sites_say_so():
    sites = [r"layer\.\d\.attention\.output", r"layer\.\d\.output"]
    attachment, blocks, calls = vilt_calls(AdapterConfig(kind="parallel", bottleneck=5, scale=1.0, sites=sites))
    assert len(attachment.sites) == 2 * len(blocks)
    for block in blocks:
        (_, stream), output = one_call(calls, block.output)
        _, projected = one_call(calls, block.output.dense)
        check(output, by_hand(block.output.adapter, stream, projected + stream))


def test_das_in_vilt_reads_the_stream_itself():
    _, blocks, calls = vilt_calls(DASConfig(bottleneck=5))
    for block in blocks:
        (stream, *_), (output,) = one_call(calls, block)
        _, attended = one_call(calls, block.attention.output)
        (after, *_), _ = one_call(calls, block.layernorm_after)
        check(after, by_hand(block.adapter, stream, attended + stream))
        _, projected = one_call(calls, block.output.dense)
        check(output, by_hand(block.output.adapter, after, projected + after))


@pytest.mark.parametrize("family", POST_NORM)
def test_das_in_post_norm_blocks(family):
    model, attachment = attached(family, DASConfig(bottleneck=5))
    blocks = [model.get_submodule(name) for name in attachment.layers]
    attentions = [
        module.output for block in blocks for name, module in block.named_children() if name.endswith("attention")
    ]
    mlps = [block.output for block in blocks]
    calls = record([m for site in attentions + mlps for m in (site, site.dense)])
    run(model, make_inputs(model))
    for site in attentions:
        (_, residual), output = one_call(calls, site)
        _, projected = one_call(calls, site.dense)
        check(output, site.LayerNorm(by_hand(site.adapter, residual, projected + residual)))
    for site in mlps:
        (_, residual), output = one_call(calls, site)
        _, projected = one_call(calls, site.dense)
        check(output, by_hand(site.adapter, residual, site.LayerNorm(projected + residual)))


def test_published_counts_on_vilt():
    model = tiny_vilt.make_model(**VILT)
    for config, parameters, layers in (
        (AdapterConfig(), 3_559_680, 24),
        (AdapterConfig(kind="parallel"), 1_798_272, 12),
        (APTConfig(), 1_916_940, 12),
        (DASConfig(), 12 * 2 * 149_856 + 12 * 297_408, 36),
    ):
        attachment = petl_ext.attach(model, config)
        rows = attachment.report().rows
        assert (sum(row.parameters for row in rows), len(rows)) == (parameters, layers)
        bypasses = {row.parameters for row in rows if row.layer.endswith("bypass")}
        assert bypasses == ({297_408} if config == DASConfig() else set())
        attachment.detach()


def test_published_counts_on_meter():
    """The fusion layers at published size; neither encoder carries a layer."""
    sizes = {"hidden_size": 768, "num_fusion_layers": 6, "num_attention_heads": 12, "initializer_range": 0.02}
    model = tiny_meter.make_model(**sizes, intermediate_size=64)
    for config, parameters, layers in (
        (AdapterConfig(), 5_339_520, 36),
        (AdapterConfig(kind="parallel", bottleneck=102), 3_817_872, 24),
        (APTConfig(), 3_833_880, 24),
        (DASConfig(), 12 * 3 * 149_856 + 5_339_520, 48),
    ):
        attachment = petl_ext.attach(model, config)
        rows = attachment.report().rows
        assert (sum(row.parameters for row in rows), len(rows)) == (parameters, layers)
        assert all(row.layer.startswith("meter.cross_modal_") for row in rows)
        bypasses = {row.parameters for row in rows if row.layer.endswith("bypass")}
        assert bypasses == ({444_960} if config == DASConfig() else set())
        attachment.detach()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "houlsby"}, 'kind must be "sequential" or "parallel", got \'houlsby\''),
        ({"bottleneck": 0}, "bottleneck must be a positive integer, got 0"),
        ({"scale": "4"}, "scale must be a finite number, got '4'"),
        ({"layer_norm": 1}, "layer_norm must be True or False, got 1"),
        ({"sites": []}, "sites must be None, one of the towers vision, .*, or a list of towers and regular expr"),
    ],
)
def test_a_wrong_configuration_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        AdapterConfig(**options)


def test_options_reach_the_layers():
    options = {"activation": "gelu", "layer_norm": True, "scale": 0.5, "dropout": 0.2, "trainable_scale": True}
    model = make_model("bert")
    inputs, before = make_inputs(model), run(model, make_inputs(model))
    petl_ext.attach(model, AdapterConfig(bottleneck=7, zero_init=True, **options))
    layer = model.encoder.layer[0].output.adapter
    assert layer.down.shape == (7, 32) and layer.gain.item() == 0.5
    assert (layer.activation, layer.dropout, layer.norm_weight is not None) == ("gelu", 0.2, True)
    torch.testing.assert_close(run(model, inputs), before)


def test_no_site_is_an_error_that_lists_candidates():
    model = make_model("llama")
    model.config.model_type = "my_llama"
    families = r"LlamaForCausalLM belongs to none of the families with sites for adapter"
    with pytest.raises(ValueError, match=rf"{families}.*Candidates, .*: model.layers.0.self_attn, model.layers.0.mlp"):
        petl_ext.attach(model, AdapterConfig())
