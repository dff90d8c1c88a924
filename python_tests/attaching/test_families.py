"""APT and adapters on every model family, by one body."""

import copy
import functools

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from tiny_families import ALL_FAMILIES, VISION, make_inputs, make_model, run
from tiny_vilt import randomize, snapshot
from tolerance import assert_as_good_as_torch
from torch.utils.checkpoint import checkpoint
from transformers import (
    CLIPConfig,
    CLIPForImageClassification,
    CLIPModel,
    T5Config,
    T5EncoderModel,
    VisionTextDualEncoderModel,
    ViTConfig,
    ViTModel,
)
from transformers_names import enable_checkpointing

import petl_ext
from petl_ext import AdapterConfig, APTConfig, nn
from petl_ext.nn.adapter import adapter_macs
from petl_ext.nn.apt import apt_macs, apt_parameters
from petl_ext.ops import adapter_reference, apt_reference

LAYERS = 1
CONFIGS = [APTConfig(num_prompts=5, rank=2), AdapterConfig(bottleneck=6), AdapterConfig(kind="parallel", bottleneck=6)]
every_family = pytest.mark.parametrize("family", ALL_FAMILIES)
every_method = pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.row)

# Where layers go in a model of one layer per stack.
_TEXT, _VISION = "text_model.encoder.layers.0", "vision_model.encoder.layers.0"
_T5 = [
    "encoder.block.0.layer.0.SelfAttention",
    "encoder.block.0.layer.1.DenseReluDense",
    "decoder.block.0.layer.0.SelfAttention",
    "decoder.block.0.layer.1.EncDecAttention",
    "decoder.block.0.layer.2.DenseReluDense",
]
_UP = ("up_blocks.1.attentions.0", "up_blocks.1.attentions.1")
_UNET = [
    f"{block}.transformer_blocks.0.{part}"
    for block in ("down_blocks.0.attentions.0", *_UP, "mid_block.attentions.0")
    for part in ("attn1", "attn2", "ff")
]
SITES = {
    "clip": [f"{layer}.{part}" for layer in (_TEXT, _VISION) for part in ("self_attn", "mlp")],
    "clip_text_model": ["encoder.layers.0.self_attn", "encoder.layers.0.mlp"],
    "clip_vision_model": ["encoder.layers.0.self_attn", "encoder.layers.0.mlp"],
    "t5": _T5,
    "llama": ["model.layers.0.self_attn", "model.layers.0.mlp"],
    "unet": _UNET,
}
MLPS = ("mlp", "DenseReluDense", "ff")


def sites_of(family, config):
    behind_all = config.row == "sequential_adapter"
    return tuple(name for name in SITES[family] if behind_all or not name.endswith(MLPS))


def frozen(family):
    return make_model(family, LAYERS).requires_grad_(False)


@every_method
@pytest.mark.parametrize("family", SITES)
def test_where_layers_go(family, config):
    attachment = petl_ext.attach(make_model(family, LAYERS), config)
    assert attachment.sites == sites_of(family, config)


@every_method
@every_family
def test_the_life_of_an_attachment(family, config, tmp_path):
    model = frozen(family)
    inputs, before, output = make_inputs(model), snapshot(model), run(model, make_inputs(model))
    attachment = petl_ext.attach(model, config)
    randomize(attachment)
    changed = run(model, inputs)
    assert not torch.allclose(changed, output, rtol=0.01, atol=0.01 * output.abs().max().item())
    changed.square().mean().backward()
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == (parameter.grad is not None) == (name not in before[0]), name
    model.zero_grad()
    with attachment.disable():
        assert torch.equal(run(model, inputs), output)
    attachment.save(tmp_path / "saved")
    torch.save(model, tmp_path / "model.pt")
    others = [copy.deepcopy(model), torch.load(tmp_path / "model.pt", weights_only=False), frozen(family)]
    petl_ext.load(others[-1], tmp_path / "saved")
    attachment.detach()
    assert torch.equal(run(model, inputs), output)
    assert snapshot(model) == before
    for other in others:
        assert torch.equal(run(other, inputs), changed)
        other.petl_attachment.detach()
        assert torch.equal(run(other, inputs), output)


def at_every_site(model, attachment, inputs):
    """What each site gives in one step, and each new parameter's gradient."""
    given, hooks = {}, []
    for name in attachment.sites:
        keep = functools.partial(lambda name, _, __, output: given.update({name: first(output).detach()}), name)
        hooks.append(model.get_submodule(name).register_forward_hook(keep))
    model.zero_grad()
    run(model, inputs).double().square().mean().backward()
    for hook in hooks:
        hook.remove()
    return [given[name] for name in attachment.sites], [p.grad.clone() for p in attachment.parameters()]


def first(output):
    return output[0] if isinstance(output, tuple) else output


def to_dtype(inputs, dtype):
    return {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in inputs.items()}


def by_kernel_and_reference(family, config, monkeypatch, dtype=torch.float32, autocast=False):
    """`at_every_site` with the kernels, with the references, and with the references in float64."""
    model = frozen(family).to(dtype)
    inputs = to_dtype(make_inputs(model), dtype)
    attachment = petl_ext.attach(model, config)
    randomize(attachment)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        ours = at_every_site(model, attachment, inputs)
        monkeypatch.setattr(nn.apt, "apt", apt_reference)
        monkeypatch.setattr(nn.adapter, "adapter", adapter_reference)
        theirs = at_every_site(model, attachment, inputs)
    model.double()
    return ours, theirs, at_every_site(model, attachment, to_dtype(inputs, torch.float64))


def assert_sites_as_good(ours, theirs, oracle):
    """By the tolerance rule for all sites together, each in units of its largest value. A few numbers, such as logits,
    would not do: the rounding of a whole model may by chance cancel in the reference's."""
    sizes = [output.abs().max() for output in oracle]
    together = [
        torch.cat([(output / size).flatten() for output, size in zip(outputs, sizes, strict=True)])
        for outputs in (ours, theirs, oracle)
    ]
    assert_as_good_as_torch("outputs", *together)


@every_method
@every_family
def test_kernels_are_as_good_as_references(family, config, monkeypatch):
    found = by_kernel_and_reference(family, config, monkeypatch)
    outputs, gradients = zip(*found, strict=True)
    assert_sites_as_good(*outputs)
    assert_as_good_as_torch("gradients", *(torch.cat([g.flatten() for g in each]) for each in gradients))


@pytest.mark.parametrize("autocast", [True, False], ids=["autocast", "bfloat16"])
@every_method
@every_family
def test_kernels_are_as_good_as_references_in_bfloat16(family, config, autocast, monkeypatch):
    dtype = torch.float32 if autocast else torch.bfloat16
    (ours, gradients), (theirs, _), (oracle, _) = by_kernel_and_reference(family, config, monkeypatch, dtype, autocast)
    assert [output.dtype for output in ours] == [output.dtype for output in theirs]
    assert_sites_as_good(ours, theirs, oracle)
    assert all(gradient.dtype is dtype and gradient.isfinite().all() and gradient.any() for gradient in gradients)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("family", ["clip", "t5", "llama", "unet"])
def test_gradient_checkpointing_gives_the_same_gradients(family, reentrant):
    model = make_model(family, LAYERS)
    attachment, inputs, calls = petl_ext.attach(model, CONFIGS[0]), make_inputs(model), []
    randomize(attachment)
    model.train().get_submodule(attachment.sites[0]).register_forward_hook(lambda *_: calls.append(1))
    _, plain = at_every_site(model, attachment, inputs)
    if family == "unet":
        model.enable_gradient_checkpointing(functools.partial(checkpoint, use_reentrant=reentrant))
        inputs["sample"].requires_grad_()
    else:
        enable_checkpointing(model, use_reentrant=reentrant)
    _, checkpointed = at_every_site(model, attachment, inputs)
    assert len(calls) == 3  # once without checkpointing, twice with it
    torch.testing.assert_close(checkpointed, plain, rtol=1e-4, atol=1e-5)


def rows(dim, tokens=4):
    return torch.randn(2, tokens, dim, generator=torch.Generator().manual_seed(4))


# One block each, as whole models take twenty seconds to trace.
BLOCKS = {
    "clip": ("vision_model.encoder.layers.0", {"hidden_states": rows(24), "attention_mask": None}),
    "t5": ("decoder.block.0", {"hidden_states": rows(32), "encoder_hidden_states": rows(32, 6)}),
    "llama": ("model.layers.0", {"hidden_states": rows(32), "position_embeddings": (rows(8), rows(8))}),
    "unet": (
        "mid_block.attentions.0.transformer_blocks.0",
        {"hidden_states": rows(64), "encoder_hidden_states": rows(32, 6)},
    ),
}


@pytest.mark.parametrize(("family", "config"), list(zip(BLOCKS, [*CONFIGS, CONFIGS[0]], strict=True)))
def test_blocks_compile_in_one_graph(family, config):
    model = frozen(family)
    name, inputs = BLOCKS[family]
    attachment = petl_ext.attach(model, config)
    randomize(attachment)
    block = model.get_submodule(name)
    weights = [parameter for parameter in block.parameters() if parameter.requires_grad]
    found = []
    for forward in (block, torch.compile(block, backend="aot_eager", fullgraph=True)):
        output = forward(**inputs)
        output = output[0] if isinstance(output, tuple) else output
        found.append([output, *torch.autograd.grad(output.square().sum(), weights)])
    torch.testing.assert_close(found[1], found[0])


@pytest.mark.parametrize("family", ["t5", "llama"])
def test_generation_with_a_cache_is_that_without(family):
    model = frozen(family)
    randomize(petl_ext.attach(model, CONFIGS[0]))
    inputs = {name: make_inputs(model)[name] for name in ("input_ids", "attention_mask")}
    settings = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": 1}
    words = [model.generate(**inputs, **settings, use_cache=cached) for cached in (True, False)]
    assert torch.equal(*words)


def test_attentions_and_hidden_states_are_recorded():
    model = frozen("clip_text_model")
    model.set_attn_implementation("eager")
    inputs = make_inputs(model)
    asked = {"output_attentions": True, "output_hidden_states": True}
    before = model(**inputs, **asked)
    attachment = petl_ext.attach(model, CONFIGS[0])
    after = model(**inputs, **asked)
    torch.testing.assert_close(after.attentions, before.attentions)  # of the first layer, which sees no other one
    assert len(after.hidden_states) == len(before.hidden_states) == LAYERS + 1
    with attachment.disable():
        assert torch.equal(model(**inputs, **asked).hidden_states[-1], before.hidden_states[-1])


@pytest.mark.parametrize("family", ["clip", "t5", "llama", "bert"])
def test_lora_goes_inside_the_same_attentions(family):
    peft = pytest.importorskip("peft")
    model = frozen(family)
    inputs = make_inputs(model)
    attachment = petl_ext.attach(model, CONFIGS[0])
    randomize(attachment)
    output = run(model, inputs)
    projections = {"clip": "out_proj", "t5": "o", "llama": "o_proj", "bert": "attention.output.dense"}
    wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=[projections[family]], init_lora_weights=True))
    torch.testing.assert_close(run(wrapped, inputs), output)
    run(wrapped, inputs).sum().backward()
    assert any("lora" in name and parameter.grad is not None for name, parameter in model.named_parameters())
    attachment.detach()
    again = petl_ext.attach(model, CONFIGS[0])  # onto projections that are LoRA's by now
    assert again.sites == attachment.sites
    with again.disable():
        inner = run(model, inputs)
    assert not torch.allclose(run(model, inputs), inner)


@torch.no_grad()
def test_what_diffusers_does_to_attentions_leaves_the_layers():
    model = frozen("unet")
    inputs = make_inputs(model)
    bare = run(model, inputs)
    attachment = petl_ext.attach(model, CONFIGS[0])
    randomize(attachment)
    output = run(model, inputs)
    model.set_attn_processor(AttnProcessor())
    torch.testing.assert_close(run(model, inputs), output, rtol=1e-4, atol=1e-4)
    model.set_attention_slice(1)
    torch.testing.assert_close(run(model, inputs), output, rtol=1e-4, atol=1e-4)
    model.set_default_attn_processor()
    model.fuse_qkv_projections()
    torch.testing.assert_close(run(model, inputs | {"cross_attention_kwargs": {}}), output, rtol=1e-4, atol=1e-4)
    attachment.detach()
    torch.testing.assert_close(run(model, inputs), bare, rtol=1e-4, atol=1e-4)
    assert petl_ext.attach(model, CONFIGS[0]).sites == attachment.sites
    model.unfuse_qkv_projections()


@pytest.mark.parametrize(
    ("sites", "expected"),
    [
        ([r"vision_model\..*self_attn"], ["vision_model.encoder.layers.0.self_attn"]),
        ([r"text_model\..*"], ["text_model.encoder.layers.0.self_attn", "text_model.encoder.layers.0.mlp"]),
        (["mlp"], ["text_model.encoder.layers.0.mlp", "vision_model.encoder.layers.0.mlp"]),
    ],
)
def test_sites_choose_a_part_of_a_model(sites, expected):
    attachment = petl_ext.attach(make_model("clip", LAYERS), AdapterConfig(bottleneck=6, sites=sites))
    assert list(attachment.sites) == expected


def test_a_model_with_a_family_in_one_part_needs_sites():
    """Layers in the text half alone would train without a word."""
    text, vit = make_model("bert", 1), ViTModel(ViTConfig(**VISION, num_hidden_layers=1))
    pair = VisionTextDualEncoderModel(vision_model=vit, text_model=text)
    for model in (pair, torch.nn.ModuleDict({"text": text, "vision": vit})):
        with pytest.raises(ValueError, match=r"belongs to none of the families .*Candidates, .*layer\.0\.attention"):
            petl_ext.attach(model, APTConfig())
    inside = torch.nn.ModuleDict({"text": text, "head": torch.nn.Linear(32, 3)})
    assert petl_ext.attach(inside, APTConfig()).sites == ("text.encoder.layer.0.attention.output",)


def test_a_t5_encoder_alone():
    config = T5Config(d_model=32, d_kv=8, d_ff=48, num_heads=4, num_layers=1, feed_forward_proj="gated-gelu")
    sites = petl_ext.attach(T5EncoderModel(config), CONFIGS[1]).sites
    assert sites == ("encoder.block.0.layer.0.SelfAttention", "encoder.block.0.layer.1.DenseReluDense")


def test_every_attention_of_stable_diffusions_unet():
    """Its four stages of two and three layers, made narrow: 16 transformer blocks, 32 attentions."""
    widths = (8, 16, 32, 32)
    model = UNet2DConditionModel(block_out_channels=widths, cross_attention_dim=24, norm_num_groups=4)
    attachment = petl_ext.attach(model, APTConfig(num_prompts=5, rank=2))
    rows = attachment.report().rows
    attentions = {8: 5 * 2, 16: 5 * 2, 32: 6 * 2}
    assert len(attachment.sites) == len(rows) == sum(attentions.values()) == 32
    assert sum(row.parameters for row in rows) == sum(
        count * apt_parameters(dim, 5, 2) for dim, count in attentions.items()
    )


def test_the_sizes_of_published_clip():
    """ViT-B/16: 12 layers of 768 that see images, 12 of 512 that read."""
    shared = {"num_hidden_layers": 12, "num_attention_heads": 8, "intermediate_size": 16}
    config = CLIPConfig(
        text_config={**shared, "hidden_size": 512, "vocab_size": 50, "max_position_embeddings": 8},
        vision_config={**shared, "hidden_size": 768, "image_size": 32, "patch_size": 32},
    )
    attachment = petl_ext.attach(CLIPModel(config), APTConfig())
    sizes = {row.layer: row.parameters for row in attachment.report().rows}
    assert [sum(size for site, size in sizes.items() if site.startswith(tower)) for tower in ("vision", "text")] == [
        12 * 159_745,
        12 * (200 * 512 + 2 * 4 * 512 + 1),
    ]


@every_method
@pytest.mark.parametrize("family", ["clip", "t5", "unet"])
def test_counted_macs_are_the_formulas_at_each_sites_own_tokens(family, config):
    model = frozen(family)
    attachment = petl_ext.attach(model, config)
    inputs = make_inputs(model, batch=1)
    tokens = [output.size(1) for output in at_every_site(model, attachment, inputs)[0]]
    assert len(set(tokens)) > 1 or family == "clip"  # whose two towers see as many here
    report = attachment.report(inputs=inputs)
    macs = {"apt": lambda rows, dim: apt_macs(rows, dim, 5, 2), "adapter": lambda rows, dim: adapter_macs(rows, dim, 6)}
    for row, rows_there in zip(report.rows, tokens, strict=True):
        dim = model.get_submodule(row.layer).up.size(0)
        assert row.macs == macs[config.method](rows_there, dim)
        assert row.kernel.startswith(config.method)
    assert report.all_macs == report.backbone_macs + report.macs


def test_a_folder_of_another_class_is_refused(tmp_path):
    petl_ext.attach(make_model("clip", LAYERS), CONFIGS[0]).save(tmp_path / "saved")
    for family, its_class in (("clip_vision_model", "CLIPVisionModel"), ("unet", "UNet2DConditionModel")):
        model = make_model(family, LAYERS)
        before = snapshot(model)
        with pytest.raises(ValueError, match=f"of the family 'clip', but {its_class} is of '(clip_vision|UNet2D).*'"):
            petl_ext.load(model, tmp_path / "saved")
        assert snapshot(model) == before
    vision = CLIPForImageClassification(make_model("clip", LAYERS).config)
    with pytest.raises(ValueError, match=r"does not fit the model, .*text_model.* unexpected"):
        petl_ext.load(vision, tmp_path / "saved")
