"""Checkpoints of DVP's authors: what fills a model on BERT, T5 and LLaMA, what that computes, what is refused."""

import original_checkpoints as originals
import original_models
import pytest
import tiny_dvp
import tiny_vilt
import torch
import torch.nn.functional as F
from checkpoint_checks import assert_equal, assert_refused, outcome_of
from tiny_dvp import CLASSES, DIM, LABELS, LAYERS, SIZES, VISUAL_DIM, restated
from tiny_families import FAMILIES
from transformers import BertForMaskedLM, BertForPreTraining, T5Model

from petl_ext.models import load_dvp_checkpoint, load_meter_checkpoint

every_family = pytest.mark.parametrize("family", CLASSES)
MODELS = {"plain": {}, "adapters": {"use_adapters": True}, "search": {"candidates": "all"}}
every_model = pytest.mark.parametrize("made", MODELS)


def make_model(family, seed=0, **options):
    vision = FAMILIES["clip_vision_model"].make(2, seed=seed)
    return tiny_dvp.make_model(family, seed, vision_model=vision, **options).float()


def make_inputs(model):
    inputs = tiny_dvp.make_inputs(model)
    del inputs["visual_features"]
    return inputs | {"pixel_values": torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))}


@every_model
@every_family
@torch.no_grad()
def test_every_tensor_and_output_is_the_originals(save, family, made):
    trained, fresh = (make_model(family, seed=seed, **MODELS[made]) for seed in (1, 0))
    state = originals.dvp_checkpoint(trained)
    report = load_dvp_checkpoint(fresh, save(originals.lightning(state)))
    head = {name for name, _ in fresh.named_parameters(remove_duplicate=False) if ".lm_head." in name}
    theirs = trained.state_dict()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in fresh.state_dict().items() if name not in head)
    if made == "search":
        trained.insert_layer = state["layer_alphas"].argmax().item()
    else:
        fresh.insert_layer = trained.insert_layer = 1
    inputs = make_inputs(trained)
    assert torch.equal(fresh(**inputs).logits, trained(**inputs).logits)
    assert [outcome.key for outcome in report.keys] == list(state)
    buffers = {name for name, _ in fresh.named_buffers()}
    assert report.unfilled.keys() - buffers == head
    left_out = {outcome.key: outcome.note for outcome in report.keys if outcome.action == "left out"}
    copies = ("bert_embeddings.", "bert_encoder.", "t5_encoder.", "t5_decoder.", "embed_tokens.", "layers.", "norm.")
    besides = {key for key in left_out if not key.startswith(copies)} - {"visumodel.proj", "layer_alphas"}
    assert all(key.endswith(("position_ids", "inv_freq")) for key in besides)
    copied = [(key, note) for key, note in left_out.items() if note.startswith("the same tensor as ")]
    assert copied and all(torch.equal(state[key], state[note.split()[-1]]) for key, note in copied)
    assert ("layer_alphas" in left_out) == (made == "search")


def assert_same(found, expected):
    """Up to what transformers' norms of T5 and LLaMA round, which work in float32 whatever they are given."""
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def prompt(state, key, features, query):
    """The cross-attention of spec section 2.1, by the names in the file."""
    q, k, v = (
        F.linear(x, state[f"{key}.linear_{part}.weight"], state[f"{key}.linear_{part}.bias"])
        for part, x in (("q", query[:, None]), ("k", features), ("v", features))
    )
    q, k, v = (rows.unflatten(-1, (SIZES["num_heads"], -1)).transpose(1, 2) for rows in (q, k, v))
    attended = ((q @ k.mT / q.shape[-1] ** 0.5).softmax(-1) @ v).transpose(1, 2).flatten(2)
    return F.linear(attended, state[f"{key}.linear_merge.weight"], state[f"{key}.linear_merge.bias"])[:, 0]


@torch.no_grad()
def test_the_vision_model_and_the_prompt_are_computed_as_the_file_names_them(save):
    """With random tensors, and by the authors' formulas: nothing here has been made from one of our models."""
    fresh = make_model("bert", candidates="all")
    generator = torch.Generator().manual_seed(3)
    state = {
        key: torch.randn(tensor.shape, generator=generator) * 0.3 if tensor.is_floating_point() else tensor
        for key, tensor in originals.dvp_checkpoint(fresh).items()
    }
    for copy, part in (("bert_embeddings", "embeddings"), ("bert_encoder", "encoder")):
        state |= {key: state[key.replace(copy, f"bert_model.{part}", 1)] for key in state if key.startswith(f"{copy}.")}
    load_dvp_checkpoint(fresh, save(state))
    pixels, query = make_inputs(fresh)["pixel_values"], torch.randn(3, DIM, generator=generator)
    features = original_models.visual(state, "visumodel", pixels)
    torch.testing.assert_close(fresh.vision_model(pixels).last_hidden_state, features, rtol=1e-4, atol=1e-4)
    for layer in range(LAYERS):
        expected = prompt(state, f"cross_attn_options.{layer}", features, query)
        torch.testing.assert_close(fresh.visual_prompts[layer](features, query), expected, rtol=1e-4, atol=1e-4)
        types = state[f"token_type_embeddings_options.{layer}.weight"]
        assert torch.equal(fresh.type_embeddings[layer].weight, types)
    x = torch.randn(3, DIM, generator=generator)
    first, norm, last = ([state[f"vqa_classifier.{i}.{part}"] for part in ("weight", "bias")] for i in (0, 1, 3))
    expected = F.linear(F.gelu(F.layer_norm(F.linear(x, *first), (2 * DIM,), *norm)), *last)
    torch.testing.assert_close(fresh.classifier(x), expected)


# Which adapter of which list, by the spec's indices, is where.
PLACES = {
    "bert": {
        ("adapter_modules", 2): "encoder.layer.1.attention.output.dropout",
        ("adapter_modules", 5): "encoder.layer.2.output.dropout",
    },
    "t5": {
        ("encoder_adapter", 2): "encoder.block.1.layer.0.SelfAttention",
        ("encoder_adapter", 5): "encoder.block.2.layer.1.DenseReluDense",
        ("decoder_adapter", 3): "decoder.block.1.layer.0.SelfAttention",
        ("decoder_adapter", 7): "decoder.block.2.layer.1.EncDecAttention",
        ("decoder_adapter", 5): "decoder.block.1.layer.2.DenseReluDense",
    },
    "llama": {("adapter_modules", 2): "layers.1.self_attn", ("adapter_modules", 5): "layers.2.mlp"},
}


@every_family
@torch.no_grad()
def test_adapters_are_where_the_authors_count_them(save, family):
    fresh = make_model(family, use_adapters=True)
    state = originals.dvp_checkpoint(fresh)
    for (key, index), place in PLACES[family].items():
        value = torch.randn(DIM)
        load_dvp_checkpoint(fresh, save(state | {f"{key}.{index}.up_sampler.bias": value}))
        assert torch.equal(fresh.language_model.base_model.get_submodule(f"{place}.adapter").up_bias, value)


@pytest.mark.parametrize("head", ["vqa_classifier", "gqa_classifier", "snli_ve_classifier", None])
def test_heads(save, head):
    trained, fresh = make_model("bert", seed=1), make_model("bert")
    before = fresh.classifier[3].weight.clone()
    report = load_dvp_checkpoint(fresh, save(originals.dvp_checkpoint(trained, head)))
    assert torch.equal(fresh.classifier[3].weight, trained.classifier[3].weight if head else before)
    assert ("classifier.3.weight" in report.unfilled) == (head is None)
    wide = make_model("bert", num_labels=LABELS + 1)
    if head:
        message = assert_refused(load_dvp_checkpoint, wide, save(originals.dvp_checkpoint(trained, head)), "num_labels")
        assert f"name '{head}' in ignore" in message


@torch.no_grad()
def test_language_models_with_a_head_of_their_own(save):
    """BERT's pooler, which DVP does not run, is left out where there is none; a head that DVP does not use stays."""
    trained = make_model("bert", seed=1)
    state = originals.dvp_checkpoint(trained)
    for language_class, has_pooler in ((BertForMaskedLM, False), (BertForPreTraining, True)):
        language_model = language_class(trained.language_model.config)
        vision = FAMILIES["clip_vision_model"].make(2)
        fresh = CLASSES["bert"](language_model, vision, **SIZES, num_labels=LABELS).eval()
        report = load_dvp_checkpoint(fresh, save(state))
        outcome = outcome_of(report, "bert_model.pooler.dense.weight")
        assert outcome.action == ("loaded" if has_pooler else "left out")
        assert report.unfilled["language_model.cls.predictions.transform.dense.bias"].startswith("stays as it is")
        assert torch.equal(fresh(**make_inputs(fresh)).logits, trained(**make_inputs(trained)).logits)
    t5 = make_model("t5", seed=1)
    bare = CLASSES["t5"](T5Model(t5.language_model.config), t5.vision_model, **SIZES, num_labels=LABELS).eval()
    load_dvp_checkpoint(bare, save(originals.dvp_checkpoint(t5)))
    assert torch.equal(bare(**make_inputs(bare)).logits, t5(**make_inputs(t5)).logits)


def test_without_a_vision_model_clip_is_left_out(save):
    trained, fresh = make_model("bert", seed=1), tiny_dvp.make_model("bert").float()
    report = load_dvp_checkpoint(fresh, save(originals.dvp_checkpoint(trained)))
    notes = {outcome.note for outcome in report.keys if outcome.key.startswith("visumodel.transformer")}
    assert notes == {"this model has no vision_model"}
    trained.vision_model = None
    assert_equal(fresh, trained)


@every_family
def test_copies_must_agree(save, family):
    trained, fresh = make_model(family, seed=1), make_model(family)
    state = originals.dvp_checkpoint(trained)
    copy, original = {
        "bert": ("bert_encoder.layer.1.output.dense.bias", "encoder.layer.1.output.dense.bias"),
        "t5": ("t5_decoder.final_layer_norm.weight", "decoder.final_layer_norm.weight"),
        "llama": ("layers.1.mlp.up_proj.weight", "layers.1.mlp.up_proj.weight"),
    }[family]
    for changed in (state[copy] + 1, state[copy].double(), state[copy][:-1]):
        path = save(state | {copy: changed})
        message = assert_refused(load_dvp_checkpoint, fresh, path, r"copies of one tensor that differ \(1\): ")
        assert message.endswith(f"{copy} and {family}_model.{original}")
    load_dvp_checkpoint(fresh, save(state | {copy: state[copy] + 1}), [copy])
    fresh = make_model(family)
    del state[f"{family}_model.{original}"]
    load_dvp_checkpoint(fresh, save(state))
    assert torch.equal(fresh.language_model.base_model.get_parameter(original), state[copy])


def test_a_model_of_another_kind_than_the_file(save):
    files = {made: originals.dvp_checkpoint(make_model("bert", seed=1, **MODELS[made])) for made in MODELS}
    plain, searched = make_model("bert"), make_model("bert", candidates="all")
    adapters = r"make it with use_adapters=True \(24\): adapter_modules.0.down_sampler.weight, "
    assert_refused(load_dvp_checkpoint, plain, save(files["adapters"]), adapters)
    options = r'of a search: make the model with candidates="all" \(27\): cross_attn_options.0.linear_v.weight, '
    assert_refused(load_dvp_checkpoint, plain, save(files["search"]), options)
    one = r"without a search: make the model with candidates=None \(9\): cross_attn.linear_v.weight, "
    assert_refused(load_dvp_checkpoint, searched, save(files["plain"]), one)
    with_adapters = make_model("bert", use_adapters=True)
    report = load_dvp_checkpoint(with_adapters, save(files["plain"]))
    place = "language_model.encoder.layer.0.output.dropout.adapter.up"
    assert report.unfilled[place] == "stays as it is: the file holds no such layers"


@every_family
@torch.no_grad()
def test_a_search_says_where_the_prompt_enters(save, family):
    """The original evaluates with the layer that the search prefers."""
    trained, fresh = (make_model(family, seed=seed, candidates="all", insert_layer=1) for seed in (1, 0))
    state = originals.dvp_checkpoint(trained) | {"layer_alphas": torch.tensor([-0.5, 0.1, 0.7])}
    report = load_dvp_checkpoint(fresh, save(state))
    assert fresh.insert_layer == 2
    assert report.settings == {"insert_layer": "2, was 1"}
    assert "insert_layer: 2, was 1" in str(report)
    trained.double(), fresh.double()
    inputs = tiny_dvp.make_inputs(trained)
    trained.insert_layer = 2
    assert_same(fresh(**inputs).logits, restated(trained, **inputs))
    trained.insert_layer = 1
    assert not torch.allclose(fresh(**inputs).logits, restated(trained, **inputs), rtol=1e-2)
    ignored = make_model(family, candidates="all", insert_layer=1)
    assert load_dvp_checkpoint(ignored, save(state), ["layer_alphas"]).settings == {}
    assert ignored.insert_layer == 1


@pytest.mark.parametrize("alphas", [torch.zeros(LAYERS + 1), torch.zeros(1, LAYERS), torch.tensor([0.0, torch.nan, 0])])
def test_preferences_that_are_none(save, alphas):
    model = make_model("bert", candidates="all", insert_layer=1)
    state = originals.dvp_checkpoint(make_model("bert", seed=1, candidates="all")) | {"layer_alphas": alphas}
    message = rf"layer_alphas must be a finite number for each of the 3 layers of DVPBert, got \[.*{alphas.size(-1)}\]"
    assert_refused(load_dvp_checkpoint, model, save(state), message)
    assert model.insert_layer == 1


@every_family
@torch.no_grad()
def test_adapters_are_as_wide_as_the_files(save, family):
    trained = make_model(family, seed=1, use_adapters=True, adapter_bottleneck=7)
    fresh, state = make_model(family, use_adapters=True), originals.dvp_checkpoint(trained)
    before = fresh.options["adapter_bottleneck"]
    report = load_dvp_checkpoint(fresh, state)
    assert report.settings == {"adapter_bottleneck": f"7, was {before}"}
    assert fresh.options == trained.options
    parameters = [dict(model.named_parameters()) for model in (fresh, trained)]
    assert all(
        parameter.requires_grad == parameters[1][name].requires_grad for name, parameter in parameters[0].items()
    )
    fresh.double(), trained.double()
    inputs = tiny_dvp.make_inputs(trained)
    assert_same(fresh(**inputs).logits, restated(trained, **inputs))
    narrow = make_model(family, use_adapters=True)
    state_before = before, narrow.insert_layer, tiny_vilt.snapshot(narrow)
    key = next(key for key in state if key.endswith("1.down_sampler.weight"))
    assert_refused(load_dvp_checkpoint, narrow, state | {key: torch.ones(8, DIM)}, rf"{key} \[8, {DIM}\] for")
    assert (narrow.options["adapter_bottleneck"], narrow.insert_layer, tiny_vilt.snapshot(narrow)) == state_before


DAMAGE = [
    (lambda s: s.pop("cross_attn.linear_k.bias"), r"file lacks \(1\): visual_prompts.0.key.bias$"),
    (lambda s: s.pop("token_type_embeddings.weight"), r"file lacks \(1\): type_embeddings.0.weight$"),
    (lambda s: s.pop("visumodel.class_embedding"), r"lacks \(1\): vision_model.embeddings.class_embedding$"),
    (lambda s: s.pop("visumodel.transformer.resblocks.1.attn.in_proj_bias"), r"lacks \(3\): vision_model.encoder.lay"),
    (lambda s: s.pop("adapter_modules.3.up_sampler.bias"), r"\(1\): language.*1.output.dropout.adapter.up_bias$"),
    (
        lambda s: [s.pop(f"{key}.layer.0.output.dense.bias") for key in ("bert_encoder", "bert_model.encoder")],
        r"file lacks \(1\): language_model.encoder.layer.0.output.dense.bias$",
    ),
    (lambda s: s.update({"cross_attn.linear_x.bias": torch.ones(1)}), r"unknown keys \(1\): cross_attn.linear_x.bias$"),
    (
        lambda s: s.update({"adapter_modules.6.up_sampler.bias": torch.ones(DIM)}),
        r"unknown keys \(1\): adapter_modules.6.up_sampler.bias$",
    ),
    (
        lambda s: s.update({"cross_attn.linear_v.weight": torch.ones(16, VISUAL_DIM + 1)}),
        rf"linear_v.weight \[16, {VISUAL_DIM + 1}\] for visual_prompts.0.value.weight \[16, {VISUAL_DIM}\]",
    ),
    (
        lambda s: s.update({"visumodel.positional_embedding": torch.ones(10, VISUAL_DIM)}),
        rf"positional_embedding \[10, {VISUAL_DIM}\] for vision_model",
    ),
]


@pytest.mark.parametrize(("damage", "message"), DAMAGE)
def test_a_file_that_does_not_fit_is_refused_whole(save, damage, message):
    model = make_model("bert", use_adapters=True)
    state = originals.dvp_checkpoint(make_model("bert", seed=1, use_adapters=True))
    damage(state)
    assert_refused(load_dvp_checkpoint, model, save(state), f"(?m){message}")


def test_files_and_models_of_another_kind(save):
    files = {family: originals.dvp_checkpoint(make_model(family)) for family in CLASSES}
    models = {family: make_model(family) for family in CLASSES}
    names = {"bert": ("BERT", "DVPBert"), "t5": ("T5", "DVPT5"), "llama": ("LLaMA", "DVPLlama")}
    for family, (name, model_class) in names.items():
        for other in set(names) - {family}:
            message = f"original DVP checkpoint on {name}, .*use load_dvp_checkpoint with a {model_class}$"
            assert_refused(load_dvp_checkpoint, models[other], save(files[family]), message)
    message = "a state dict of a DVP of petl_ext, .*use load_state_dict"
    assert_refused(load_dvp_checkpoint, models["bert"], save(models["bert"].state_dict()), message)
    path = save(files["bert"])
    with pytest.raises(TypeError, match="model must be a DVPBert, DVPT5 or DVPLlama, got Linear"):
        load_dvp_checkpoint(torch.nn.Linear(1, 1), path)
    with pytest.raises(TypeError, match="model must be a DVP model, got str"):
        load_dvp_checkpoint("bert", path)
    assert_refused(load_meter_checkpoint, models["bert"], path, "is no METER model", error=TypeError)
