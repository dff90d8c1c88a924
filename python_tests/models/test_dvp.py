"""DVP on BERT, T5 and LLaMA: what it computes, what trains, files, generation, refusals."""

import copy
import json
import pickle
import warnings

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from accelerate import cpu_offload
from peft import LoraConfig, get_peft_model
from tiny_dvp import (
    CLASSES,
    DIM,
    END,
    LABELS,
    LAYERS,
    SIZES,
    TOKENS,
    VISUAL,
    VISUAL_DIM,
    llama_states,
    make_inputs,
    make_language_model,
    make_model,
    prompted,
    restated,
    with_prompt,
)
from tiny_families import FAMILIES
from tiny_vilt import randomise
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertModel,
    DynamicCache,
    LlamaConfig,
    LlamaModel,
    T5Config,
    T5EncoderModel,
    T5Model,
    Trainer,
    TrainingArguments,
)
from transformers_names import CHECKPOINTING_ARGUMENT, disable_checkpointing, enable_checkpointing

import petl_ext
from petl_ext import AdapterLayer
from petl_ext.counting import count_macs
from petl_ext.models import DVPT5, DVPBert, DVPLlama

every_family = pytest.mark.parametrize("family", CLASSES)
every_layer = pytest.mark.parametrize("insert_layer", range(LAYERS))
with_and_without_adapters = pytest.mark.parametrize("use_adapters", [False, True], ids=["plain", "adapters"])


def logits(model, inputs):
    return model(**inputs).logits


def assert_same(found, expected):
    """Up to what transformers' norms of T5 and LLaMA round, which work in float32 whatever they are given."""
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def differ(found, expected):
    return (found - expected).abs().max() > 1e-2


@with_and_without_adapters
@every_layer
@every_family
@torch.no_grad()
def test_it_is_the_formula(family, insert_layer, use_adapters):
    model = make_model(family, use_adapters=use_adapters)
    inputs = make_inputs(model)
    model.insert_layer = insert_layer
    expected = restated(model, **inputs)
    assert_same(logits(model, inputs), expected)
    for other in set(range(LAYERS)) - {insert_layer}:
        model.insert_layer = other
        assert differ(logits(model, inputs), expected)


@every_layer
@pytest.mark.parametrize("family", ["t5", "llama"])
@torch.no_grad()
def test_what_the_authors_compute(family, insert_layer):
    model = make_model(family, insert_layer=insert_layer, original=True)
    inputs = make_inputs(model)
    assert_same(logits(model, inputs), restated(model, **inputs, original=True))
    right = make_model(family, insert_layer=insert_layer)
    # LLaMA: only the text without an end, which is the last.
    assert differ(logits(model, inputs)[-1], logits(right, inputs)[-1])


@torch.no_grad()
def test_of_bert_the_authors_compute_the_same():
    models = [make_model("bert", insert_layer=1, original=original) for original in (False, True)]
    inputs = make_inputs(models[0])
    assert torch.equal(logits(models[0], inputs), logits(models[1], inputs))


@torch.no_grad()
def test_at_layer_0_bert_reads_a_longer_input():
    """Against transformers' own encoder."""
    model = make_model("bert")
    inputs = make_inputs(model)
    bert = model.language_model
    states = bert.embeddings(inputs["input_ids"])
    states = prompted(model, states, states[:, 0], inputs["visual_features"])
    seen = with_prompt(inputs["attention_mask"])[:, None, None].bool()
    states = bert.encoder(states, attention_mask=seen).last_hidden_state
    assert_same(logits(model, inputs), model.classifier(states[:, 1]))


@torch.no_grad()
def test_at_layer_0_t5_reads_a_longer_decoder_input():
    model = make_model("t5")
    inputs = make_inputs(model)
    t5, mask = model.language_model, inputs["attention_mask"]
    text = t5.encoder(inputs["input_ids"], attention_mask=mask).last_hidden_state
    query = (text * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
    start = t5.shared(torch.zeros(len(text), 1, dtype=torch.long))
    states = prompted(model, start, query, inputs["visual_features"])
    output = t5.decoder(inputs_embeds=states, encoder_hidden_states=text, encoder_attention_mask=mask)
    assert_same(logits(model, inputs), model.classifier(output.last_hidden_state[:, 1]))


@torch.no_grad()
def test_at_layer_0_llama_reads_a_longer_input():
    model = make_model("llama")
    inputs = make_inputs(model)
    llama, ends = model.language_model.model, torch.tensor([TOKENS // 2 - 1, TOKENS - 3, TOKENS - 1])
    embeddings, rows = llama.embed_tokens(inputs["input_ids"]), torch.arange(3)
    states = prompted(model, embeddings, embeddings[rows, ends], inputs["visual_features"])
    output = llama(inputs_embeds=states, attention_mask=with_prompt(inputs["attention_mask"])).last_hidden_state
    assert_same(logits(model, inputs), model.classifier(output[rows, ends + 1]))


@every_family
@torch.no_grad()
def test_eager_attention_computes_the_same(family):
    model = make_model(family, insert_layer=1)
    inputs = make_inputs(model)
    expected = logits(model, inputs)
    model.language_model.set_attn_implementation("eager")
    assert_same(logits(model, inputs), expected)


@every_family
@torch.no_grad()
def test_language_models_with_and_without_a_head(family):
    """tiny_families makes BERT without one, T5 and LLaMA with."""
    model = make_model(family, insert_layer=1)
    given = model.language_model
    other_class = {"bert": BertForMaskedLM, "t5": T5Model, "llama": LlamaModel}[family]
    other = other_class(given.config)
    other.base_model.load_state_dict(given.base_model.state_dict(), strict=False)
    again = CLASSES[family](other.double().eval(), **SIZES, num_labels=LABELS, insert_layer=1).double()
    new = {name: p for name, p in model.state_dict().items() if not name.startswith("language_model.")}
    again.load_state_dict(again.state_dict() | new)
    inputs = make_inputs(model)
    assert torch.equal(logits(again, inputs), logits(model, inputs))
    labels = torch.arange(3)
    with torch.enable_grad():
        again(**inputs, labels=labels).loss.backward()
    assert all((p.grad is not None) == p.requires_grad for p in again.parameters())


@every_family
@torch.no_grad()
def test_inputs_that_may_be_left_out(family):
    model = make_model(family, insert_layer=1)
    inputs = make_inputs(model)
    whole = {name: tensor[1:2] for name, tensor in inputs.items()}
    masked = logits(model, whole | {"visual_mask": torch.ones(1, VISUAL)})
    assert_same(logits(model, whole), masked)
    del whole["attention_mask"]
    assert_same(logits(model, whole), masked)


@every_layer
@every_family
@torch.no_grad()
def test_padding_changes_nothing(family, insert_layer):
    model = make_model(family, insert_layer=insert_layer)
    inputs = make_inputs(model)
    first = {name: tensor[:1] for name, tensor in inputs.items()}
    cut = first | {name: first[name][:, : TOKENS // 2] for name in ("input_ids", "attention_mask")}
    assert_same(logits(model, first), logits(model, cut))
    unmasked = first | {"attention_mask": torch.ones(1, TOKENS)}
    # LLaMA's question ends before what now is no padding.
    assert differ(logits(model, unmasked), logits(model, cut)) == (family != "llama")
    hidden = torch.arange(VISUAL)[None] < 4
    seen = first | {"visual_features": first["visual_features"][:, :4]}
    assert_same(logits(model, first | {"visual_mask": hidden}), logits(model, seen))


@every_layer
@torch.no_grad()
def test_llama_takes_padding_on_the_left(insert_layer):
    model = make_model("llama", insert_layer=insert_layer)
    inputs = make_inputs(model)
    first = {name: tensor[:1] for name, tensor in inputs.items()}
    left = first | {name: first[name].roll(TOKENS // 2, 1) for name in ("input_ids", "attention_mask")}
    assert left["attention_mask"].tolist() == [[0, 0, 0, 1, 1, 1]]
    assert_same(logits(model, left), logits(model, first))


@every_layer
@torch.no_grad()
def test_llamas_positions_and_lengths(insert_layer):
    """Rows and positions that each layer is given."""
    model = make_model("llama", insert_layer=insert_layer)
    given = []
    for layer in model._layers:
        layer.register_forward_pre_hook(
            lambda _, arguments, named: given.append((arguments[0].size(1), named["position_ids"].tolist())),
            with_kwargs=True,
        )
    inputs = {name: tensor[1:2] for name, tensor in make_inputs(model).items()}
    model(**inputs)
    below, above = (TOKENS, [list(range(TOKENS))]), (TOKENS + 1, [list(range(TOKENS + 1))])
    assert given == [below] * insert_layer + [above] * (LAYERS - insert_layer)


@every_family
@torch.no_grad()
def test_a_vision_model_is_run_frozen(family):
    vision = FAMILIES["clip_vision_model"].make(2)
    options = {"insert_layer": 1, "visual_dim": None}
    model = make_model(family, vision_model=vision.train(), **options)
    assert model.options["visual_dim"] == VISUAL_DIM
    inputs = make_inputs(model)
    del inputs["visual_features"]
    pixels = torch.randn(3, 3, 16, 16).double()
    features = vision(pixels).last_hidden_state
    assert features.shape == (3, 5, VISUAL_DIM)
    expected = logits(make_model(family, insert_layer=1), inputs | {"visual_features": features})
    assert_same(logits(model, inputs | {"pixel_values": pixels}), expected)
    model.train()
    assert model.language_model.training and not any(module.training for module in vision.modules())
    with torch.enable_grad():
        model(**inputs, pixel_values=pixels.requires_grad_(), labels=torch.arange(3)).loss.backward()
    assert pixels.grad is None
    assert all(p.grad is None and not p.requires_grad for p in vision.parameters())
    assert model.visual_prompts[0].value.weight.grad.any()


@every_family
@torch.no_grad()
def test_losses_go_by_the_kind_of_labels(family):
    model = make_model(family)
    inputs = make_inputs(model)
    scores, classes = torch.rand(3, LABELS), torch.tensor([4, 0, 2])
    output = model(**inputs, labels=scores)
    by_hand = -(scores * output.logits.sigmoid().log() + (1 - scores) * (-output.logits).sigmoid().log()).sum(1).mean()
    torch.testing.assert_close(output.loss, by_hand)
    by_hand = -output.logits.log_softmax(1)[range(3), classes].mean()
    torch.testing.assert_close(model(**inputs, labels=classes).loss, by_hand)
    assert model(**inputs).loss is None


@every_family
def test_candidates_have_layers_of_their_own(family):
    model = make_model(family, candidates="all")
    assert model.num_layers == len(model.visual_prompts) == LAYERS
    assert len(model.type_embeddings) == (0 if family == "llama" else LAYERS)
    inputs = make_inputs(model)
    for layer in range(LAYERS):
        model.insert_layer = layer
        model.zero_grad()
        output = model(**inputs, labels=torch.arange(3))
        assert_same(output.logits, restated(model, **inputs))
        output.loss.backward()
        for own in (model.visual_prompts, model.type_embeddings):
            reached = [all(p.grad is not None for p in table.parameters()) for table in own]
            missed = [all(p.grad is None for p in table.parameters()) for table in own]
            assert reached == [i == layer for i in range(len(own))] and missed == [not r for r in reached]


# What trains of the language model, written out for one layer of each kind.
NORMS = {
    "bert": [
        f"encoder.layer.{{i}}.{part}.LayerNorm.{kind}"
        for part in ("attention.output", "output")
        for kind in ("weight", "bias")
    ],
    "t5": [
        *(f"encoder.block.{{i}}.layer.{part}.layer_norm.weight" for part in (0, 1)),
        *(f"decoder.block.{{i}}.layer.{part}.layer_norm.weight" for part in range(3)),
        "encoder.final_layer_norm.weight",
        "decoder.final_layer_norm.weight",
    ],
    "llama": [
        "model.layers.{i}.input_layernorm.weight",
        "model.layers.{i}.post_attention_layernorm.weight",
        "model.norm.weight",
    ],
}
PLACES = {
    "bert": ["encoder.layer.{i}.attention.output.dropout", "encoder.layer.{i}.output.dropout"],
    "t5": [
        "encoder.block.{i}.layer.0.SelfAttention",
        "encoder.block.{i}.layer.1.DenseReluDense",
        "decoder.block.{i}.layer.0.SelfAttention",
        "decoder.block.{i}.layer.1.EncDecAttention",
        "decoder.block.{i}.layer.2.DenseReluDense",
    ],
    "llama": ["model.layers.{i}.self_attn", "model.layers.{i}.mlp"],
}
ADAPTER_PARTS = ("down", "down_bias", "up", "up_bias")
UNUSED = {"bert": "pooler.", "t5": "lm_head.", "llama": "lm_head."}


def filled(names):
    return {name.format(i=i) for name in names for i in range(LAYERS)}


def expected_to_train(model, family):
    """Names in the language model."""
    adapted = {f"{place}.adapter.{part}" for place in filled(PLACES[family]) for part in ADAPTER_PARTS}
    if model.options["use_adapters"]:
        return adapted | filled(NORMS[family])
    names = [name for name, _ in model.language_model.named_parameters()]
    return {name for name in names if not name.startswith(UNUSED[family])}


@with_and_without_adapters
@every_layer
@every_family
def test_gradients_reach_exactly_what_trains(family, insert_layer, use_adapters):
    model = make_model(family, insert_layer=insert_layer, use_adapters=use_adapters)
    model(**make_inputs(model), labels=torch.arange(3)).loss.backward()
    own = {name for name, _ in model.named_parameters() if not name.startswith("language_model.")}
    expected = own | {f"language_model.{name}" for name in expected_to_train(model, family)}
    parameters = dict(model.named_parameters())
    assert {name for name, p in parameters.items() if p.requires_grad} == expected
    assert {name for name, p in parameters.items() if p.grad is not None} == expected
    # Softmax takes out what is added to all keys alike, and a decoder of one row has nothing to weigh.
    nothing = [name for name in expected if not parameters[name].grad.any()]
    assert "visual_prompts.0.key.bias" in nothing
    single = "SelfAttention.q", "SelfAttention.k", "SelfAttention.relative_attention_bias"
    assert all(
        name.endswith("key.bias") or (family == "t5" and "decoder" in name and any(part in name for part in single))
        for name in nothing
    ), nothing


@with_and_without_adapters
@every_family
def test_gradient_checkpointing(family, use_adapters):
    model = make_model(family, insert_layer=1, use_adapters=use_adapters, dropout=0.0)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        if isinstance(getattr(module, "dropout", None), float):
            module.dropout = 0.0
    model.train()
    inputs = make_inputs(model)

    def gradients():
        model.zero_grad()
        model(**inputs, labels=torch.arange(3)).loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    plain = gradients()
    norm = next(module for module in model._layers[0].modules() if "Norm" in type(module).__name__)
    calls = []
    norm.register_forward_hook(lambda *_: calls.append(1))
    enable_checkpointing(model.language_model)
    checkpointed = gradients()
    assert len(calls) == 2, "the layer is computed again in backward"
    assert plain.keys() == checkpointed.keys()
    for name in plain:
        torch.testing.assert_close(checkpointed[name], plain[name])
    disable_checkpointing(model.language_model)
    gradients()
    assert len(calls) == 3


@every_family
def test_adapters_stand_where_the_authors_put_them(family):
    """Behind BERT's dropout, before T5's; what the formula test cannot tell."""
    model = make_model(family, insert_layer=1, use_adapters=True).train()
    seen = {}
    for name, module in model.language_model.named_modules():
        if name.endswith(".adapter"):
            module.register_forward_hook(lambda _, x, out, name=name: seen.update({name: (x[0] == 0).any().item()}))
    model(**make_inputs(model))
    assert seen.keys() == {f"{place}.adapter" for place in filled(PLACES[family])}
    assert all(dropped == (family == "bert") for dropped in seen.values())


@pytest.mark.parametrize(
    ("family", "bottleneck", "spread"), [("bert", DIM // 8, 0.01), ("t5", DIM // 8, 0.01), ("llama", 1, None)]
)
def test_adapters_start_as_the_authors_do(family, bottleneck, spread):
    layers = make_language_model(family)
    model = CLASSES[family](layers, **SIZES, num_labels=LABELS, use_adapters=True)
    adapters = [module for name, module in model.named_modules() if name.endswith(".adapter")]
    assert len(adapters) == len(filled(PLACES[family]))
    assert {adapter.activation for adapter in adapters} == {"silu" if family == "llama" else "relu"}
    for adapter in adapters:
        assert adapter.down.shape == (bottleneck, DIM) and not adapter.down_bias.any() and not adapter.up_bias.any()
    ups = torch.cat([adapter.up.flatten() for adapter in adapters])
    if spread is None:
        limit = (6 / (DIM + bottleneck)) ** 0.5
        assert 0.9 * limit < ups.abs().max() <= limit
    else:
        assert 0.9 * spread < ups.std() < 1.1 * spread


def test_the_head_and_the_types_start_as_the_authors_do():
    with torch.device("cpu"):
        model = DVPBert(make_language_model("bert"), **SIZES, num_labels=3129)
    first, norm, _, last = model.classifier
    assert (first.out_features, last.out_features) == (2 * DIM, 3129)
    for layer in (first, last):
        assert 0.018 < layer.weight.std() < 0.022 and not layer.bias.any()
    assert torch.equal(norm.weight, torch.ones(2 * DIM)) and not norm.bias.any()
    assert 0.7 < model.type_embeddings[0].weight.std() < 1.3
    llama = DVPLlama(make_language_model("llama"), **SIZES, num_labels=7)
    assert [layer.out_features for layer in (llama.classifier[0], llama.classifier[3])] == [DIM // 8, 7]


T5_BASE = {"d_model": 768, "d_kv": 64, "d_ff": 3072, "num_layers": 12, "num_heads": 12, "decoder_start_token_id": 0}
PUBLISHED = {
    "bert": (DVPBert, BertModel, BertConfig, {}, 2_362_368, 24 * 148_320),
    "t5": (DVPT5, T5Model, T5Config, T5_BASE, 2_362_368, 60 * 148_320),
    "llama": (DVPLlama, LlamaModel, LlamaConfig, {}, 4_986_368, 64 * 528_448),
}


def published(family, **options):
    model_class, backbone_class, config_class, sizes, _, _ = PUBLISHED[family]
    with torch.device("meta"):
        return model_class(backbone_class(config_class(**sizes)), visual_dim=768, num_labels=3129, **options)


@every_family
def test_published_sizes(family):
    *_, prompt, adapters = PUBLISHED[family]
    model = published(family, use_adapters=True)
    assert sum(p.numel() for p in model.visual_prompts.parameters()) == prompt
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    assert sum(size for name, size in sizes.items() if ".adapter." in name) == adapters
    if family != "llama":
        assert sum(p.numel() for p in model.type_embeddings.parameters()) == 2 * 768


def test_macs_of_the_language_model():
    """One prompt costs BERT-base less than a tenth of what all visual tokens would: 16 words, 197 visual tokens."""
    model = published("bert")
    words = torch.zeros(1, 16, dtype=torch.long, device="meta")
    with torch.device("meta"):
        counted = count_macs(model, {"input_ids": words, "visual_features": torch.zeros(1, 197, 768)})
        all_tokens = count_macs(model.language_model, {"inputs_embeds": torch.zeros(1, 16 + 197, 768)})
    ours = counted.total - counted.of("classifier")
    pooling = 12 * 197 * 768 * 2 + 4 * 768 * 768
    encoder = 12 * (17 * (4 * 768**2 + 2 * 768 * 3072) + 2 * 17 * 17 * 768)
    assert ours == pooling + encoder
    assert 0.05 < ours / all_tokens.total < 0.1


@with_and_without_adapters
@every_family
@torch.no_grad()
def test_files(family, use_adapters, tmp_path):
    model = make_model(family, insert_layer=1, use_adapters=use_adapters)
    inputs = make_inputs(model)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and name.startswith("language_model"):
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.insert_layer = 2
    model.save(tmp_path / "saved")
    tensors = safetensors.torch.load_file(tmp_path / "saved" / "petl_weights.safetensors")
    assert tensors.keys() == {name for name, p in model.named_parameters() if p.requires_grad}
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]
    again = type(model).from_folder(tmp_path / "saved", make_language_model(family).double())
    assert again.insert_layer == 2 and again.options == model.options
    assert torch.equal(logits(again, inputs), logits(model, inputs))


@every_family
@torch.no_grad()
def test_adapters_of_any_width(family, tmp_path):
    model = make_model(family, use_adapters=True, adapter_bottleneck=5)
    inputs = make_inputs(model)
    adapters = [module for module in model.modules() if isinstance(module, AdapterLayer)]
    assert {layer.down.shape for layer in adapters} == {(5, DIM)}
    assert_same(logits(model, inputs), restated(model, **inputs))
    model.save(tmp_path / "saved")
    again = type(model).from_folder(tmp_path / "saved", make_language_model(family).double())
    assert again.options["adapter_bottleneck"] == 5
    assert torch.equal(logits(again, inputs), logits(model, inputs))
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    model.train().resize_adapters(3)
    renewed = [module for module in model.modules() if isinstance(module, AdapterLayer)]
    assert len(renewed) == len(adapters) and {layer.down.shape for layer in renewed} == {(3, DIM)}
    assert all(layer.training and layer.down.dtype is torch.float64 for layer in renewed)
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == trained
    model.eval()
    assert_same(logits(model, inputs), restated(model, **inputs))


def test_widths_that_are_none():
    model = make_model("bert", use_adapters=True)
    assert model.options["adapter_bottleneck"] == DIM // 8 and make_model("bert").options["adapter_bottleneck"] is None
    for width in (0, 2.0, True):
        with pytest.raises(ValueError, match=f"DVPBert: adapter_bottleneck must be a positive integer, got {width}"):
            make_model("bert", use_adapters=True, adapter_bottleneck=width)
        with pytest.raises(ValueError, match="must be a positive integer"):
            model.resize_adapters(width)
    assert model.options["adapter_bottleneck"] == DIM // 8
    with pytest.raises(ValueError, match="DVPBert: adapter_bottleneck needs use_adapters=True, got 4 without"):
        make_model("bert", adapter_bottleneck=4)
    for width in (4, None):
        with pytest.raises(ValueError, match="DVPBert: "):
            make_model("bert").resize_adapters(width)


@pytest.mark.parametrize("use_adapters", [False, True])
def test_a_folder_of_before_knows_no_width(use_adapters, tmp_path):
    model = make_model("bert", use_adapters=use_adapters)
    model.save(tmp_path / "saved")
    options = json.loads((tmp_path / "saved" / "petl_config.json").read_text())["options"]
    edit_description(tmp_path / "saved", options={k: v for k, v in options.items() if k != "adapter_bottleneck"})
    again = DVPBert.from_folder(tmp_path / "saved", make_language_model("bert").double())
    assert again.options == model.options
    edit_description(tmp_path / "saved", options={k: v for k, v in options.items() if k != "num_heads"})
    with pytest.raises(ValueError, match=r"expected the keys .*num_heads.* found"):
        DVPBert.from_folder(tmp_path / "saved", make_language_model("bert").double())


@torch.no_grad()
def test_files_of_a_search(tmp_path):
    model = make_model("bert", candidates="all")
    model.save(tmp_path / "saved")
    again = DVPBert.from_folder(tmp_path / "saved", make_language_model("bert").double())
    assert len(again.visual_prompts) == LAYERS
    again.insert_layer = model.insert_layer = 2
    inputs = make_inputs(model)
    assert torch.equal(logits(again, inputs), logits(model, inputs))


def edit_description(folder, **changes):
    path = folder / "petl_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_tensors(folder, change):
    path = folder / "petl_weights.safetensors"
    tensors = safetensors.torch.load_file(path)
    change(tensors)
    safetensors.torch.save_file(tensors, path)


QUERY = "visual_prompts.0.query.weight"
BAD_FILES = {
    "another class": (lambda f: edit_description(f, model="DVPT5"), "saved from a DVPT5, not a DVPBert"),
    "another option": (lambda f: edit_description(f, options={"heads": 3}), "expected the keys .*num_heads.* found"),
    "another key": (lambda f: edit_description(f, extra=1), "expected the keys .* found .*extra"),
    "a later format": (lambda f: edit_description(f, format=2), "format 2"),
    "a missing tensor": (lambda f: edit_tensors(f, lambda t: t.pop(QUERY)), f"{QUERY}: missing"),
    "a tensor too many": (lambda f: edit_tensors(f, lambda t: t.update(x=torch.ones(1))), "x: unexpected"),
    "another shape": (lambda f: edit_tensors(f, lambda t: t.update({QUERY: torch.ones(1)})), f"{QUERY}: expected"),
    "no weights": (lambda f: (f / "petl_weights.safetensors").unlink(), "found no petl_weights.safetensors"),
}


@pytest.mark.parametrize(("edit", "message"), BAD_FILES.values(), ids=BAD_FILES)
def test_bad_files_leave_the_language_model_as_it_was(edit, message, tmp_path):
    folder = tmp_path / "saved"
    make_model("bert", use_adapters=True).save(folder)
    edit(folder)
    bert = make_language_model("bert")
    bert.embeddings.requires_grad_(False)
    state = {name: tensor.clone() for name, tensor in bert.state_dict().items()}
    trained = {name for name, p in bert.named_parameters() if p.requires_grad}
    classes = [type(module) for module in bert.modules()]
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        DVPBert.from_folder(folder, bert)
    assert bert.state_dict().keys() == state.keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in bert.state_dict().items())
    assert {name for name, p in bert.named_parameters() if p.requires_grad} == trained
    assert [type(module) for module in bert.modules()] == classes


def test_adapters_leave_room_for_what_is_attached():
    model = make_model("bert", use_adapters=True)
    inputs = make_inputs(model)
    own = {name: type(module) for name, module in model.named_modules()}
    before = logits(model, inputs)
    attachment = petl_ext.attach(model, petl_ext.APTConfig(num_prompts=3, sites=[r"attention\.output"]))
    randomise(attachment)
    assert not torch.allclose(logits(model, inputs), before)
    with attachment.disable():
        assert torch.equal(logits(model, inputs), before)
    attachment.detach()
    assert {name: type(module) for name, module in model.named_modules()} == own
    assert torch.equal(logits(model, inputs), before)


@every_family
def test_adapted_modules_are_still_what_they_were(family):
    model, bare = make_model(family, use_adapters=True), make_language_model(family)
    adapted = {name: module for name, module in model.language_model.named_modules() if hasattr(module, "adapter")}
    assert len(adapted) == len(filled(PLACES[family]))
    for name, module in adapted.items():
        own = type(bare.get_submodule(name))
        assert isinstance(module, own) and type(module).__name__ == own.__name__ and not module._forward_hooks


@every_family
@torch.no_grad()
def test_deepcopy_and_pickle(family):
    model = make_model(family, insert_layer=1, use_adapters=True)
    inputs = make_inputs(model)
    expected = logits(model, inputs)
    twins = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    for parameter in model.parameters():
        parameter.zero_()
    for twin in twins:
        assert torch.equal(logits(twin, inputs), expected)


@every_family
@torch.no_grad()
def test_state_dicts_hold_tied_weights_once(family):
    model = make_model(family, use_adapters=True)
    state = model.state_dict()
    assert len({tensor.data_ptr() for tensor in state.values()}) == len(state)
    assert set(state) >= {name for name, _ in model.named_parameters()}
    other = make_model(family, seed=5, use_adapters=True)
    inputs = make_inputs(model)
    assert differ(logits(other, inputs), logits(model, inputs))
    other.load_state_dict(state)
    assert torch.equal(logits(other, inputs), logits(model, inputs))
    parent = torch.nn.ModuleList([model])
    torch.nn.ModuleList([other]).load_state_dict(parent.state_dict())


@every_family
def test_the_trainer_trains_and_resumes(family, tmp_path):
    inputs = {
        name: tensor.float() if tensor.is_floating_point() else tensor
        for name, tensor in make_inputs(make_model(family)).items()
    }
    data = [{**{name: tensor[i] for name, tensor in inputs.items()}, "labels": torch.tensor(i)} for i in range(3)]

    def trained(steps, resume=None):
        model = make_model(family, insert_layer=1, use_adapters=True).float()
        options = {"per_device_train_batch_size": 3, "learning_rate": 1e-2, "lr_scheduler_type": "constant"}
        arguments = TrainingArguments(
            tmp_path,
            max_steps=steps,
            save_steps=2,
            **{CHECKPOINTING_ARGUMENT: True},
            use_cpu=True,
            report_to=[],
            disable_tqdm=True,
            **options,
        )
        Trainer(model, arguments, train_dataset=data).train(resume)
        return model

    whole, resumed = trained(4), trained(4, resume=str(tmp_path / "checkpoint-2"))
    state = make_model(family, insert_layer=1, use_adapters=True).float().state_dict()
    for name, tensor in resumed.state_dict().items():
        torch.testing.assert_close(tensor, whole.state_dict()[name])
    changed = {name for name, tensor in whole.state_dict().items() if not torch.equal(tensor, state[name])}
    trains = {name for name, parameter in whole.named_parameters() if parameter.requires_grad}
    assert changed <= trains and "visual_prompts.0.query.weight" in changed


@every_family
def test_a_training_step_under_autocast(family):
    model = make_model(family, insert_layer=1, use_adapters=True).float().train()
    inputs = make_inputs(model)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(**inputs, labels=torch.rand(3, LABELS)).loss
    loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.requires_grad)


@every_family
@torch.no_grad()
def test_a_language_model_in_bfloat16(family):
    model = make_model(family, insert_layer=1, use_adapters=True)
    inputs = make_inputs(model)
    expected = logits(model, inputs)
    found = logits(model.bfloat16(), inputs)
    assert found.dtype is torch.bfloat16
    assert (found - expected).abs().max() < 0.15 * expected.abs().max()


def words_and_images(model, padding="right"):
    """Questions whose end is their last token, the first of them padded."""
    inputs = make_inputs(model)
    inputs["input_ids"][inputs["input_ids"] == END] = 5
    if padding == "left":
        inputs |= {name: inputs[name].roll(TOKENS // 2, 1) for name in ("input_ids",)}
        inputs["attention_mask"] = inputs["attention_mask"].flip(1)
    return inputs


@every_layer
@torch.no_grad()
def test_language_modelling_is_the_formula(insert_layer):
    model = make_model("llama", insert_layer=insert_layer, num_labels=None)
    inputs = words_and_images(model)
    states = llama_states(model, *inputs.values(), ends=[TOKENS // 2 - 1, TOKENS - 1, TOKENS - 1])[:, 1:]
    expected = states @ model.language_model.lm_head.weight.T
    shown = inputs["attention_mask"] == 1
    assert_same(logits(model, inputs)[shown], expected[shown])


@pytest.mark.parametrize("padding", ["right", "left"])
@every_layer
@torch.no_grad()
def test_a_cache_changes_no_logits(insert_layer, padding):
    """Question, then one token, then two more at once; against all at once with the query at the question's end."""
    model = make_model("llama", insert_layer=insert_layer, num_labels=None)
    inputs = words_and_images(model, padding)
    question, mask = inputs["input_ids"], inputs["attention_mask"]
    new = torch.tensor([[7, 8, 9], [10, 11, 12], [END, 14, 15]])
    whole = {"input_ids": torch.cat([question, new], 1), "attention_mask": F.pad(mask, (0, 3), value=1)}
    last = {"right": [TOKENS // 2 - 1, TOKENS - 1, TOKENS - 1], "left": [TOKENS - 1] * 3}[padding]
    expected = logits(model, inputs | whole | {"question_end": torch.tensor(last)})
    cache = DynamicCache(config=model.language_model.config)
    shown = mask == 1
    assert_same(model(**inputs, cache=cache).logits[shown], expected[:, :TOKENS][shown])
    lengths = [cache.get_seq_length(i) for i in range(LAYERS)]
    assert lengths == [TOKENS] * insert_layer + [TOKENS + 1] * (LAYERS - insert_layer)
    one = model(new[:, :1], F.pad(mask, (0, 1), value=1), cache=cache).logits
    assert_same(one, expected[:, TOKENS : TOKENS + 1])
    two = model(new[:, 1:], F.pad(mask, (0, 3), value=1), cache=cache).logits
    assert_same(two, expected[:, TOKENS + 1 :])


@every_layer
@torch.no_grad()
def test_a_cache_without_a_mask(insert_layer):
    model = make_model("llama", insert_layer=insert_layer, num_labels=None)
    inputs = words_and_images(model)
    del inputs["attention_mask"]
    words = inputs.pop("input_ids")
    end = torch.full((3,), TOKENS - 3)
    expected = logits(model, inputs | {"input_ids": words, "question_end": end})
    cache = DynamicCache()
    parts = [model(words[:, :-2], **inputs, past_key_values=cache).logits]
    parts += [model(words[:, i : i + 1], cache=cache).logits for i in (TOKENS - 2, TOKENS - 1)]
    assert_same(torch.cat(parts, 1), expected)


@pytest.mark.parametrize("padding", ["right", "left"])
@every_layer
@torch.no_grad()
def test_generation(insert_layer, padding):
    """Against runs of the whole text for each new token, of one sample at a time and without padding."""
    model = make_model("llama", insert_layer=insert_layer, num_labels=None)
    inputs = words_and_images(model, padding)
    found = model.generate(**inputs, max_new_tokens=5)
    for row, words, mask, visual in zip(found, *inputs.values(), strict=True):
        text = words[mask == 1][None]
        end = torch.tensor([text.size(1) - 1])
        for i, token in enumerate(row):
            following = logits(model, {"input_ids": text, "visual_features": visual[None], "question_end": end})
            assert following[0, -1].argmax() == token or END in row[:i]
            text = torch.cat([text, token[None, None]], 1)
        ended = (row == END).cumsum(0) > 0
        assert (row[ended] == END).all()


@torch.no_grad()
def test_generation_stops_at_the_end():
    model = make_model("llama", insert_layer=1, num_labels=None)
    inputs = words_and_images(model)
    free = model.generate(**inputs, max_new_tokens=6)
    # The end is what one text says third: it repeats it, while the others go on until they say it too.
    end = next(token for token in free[0, 1:].tolist() if token not in (free[0, 0], *inputs["input_ids"].flatten()))
    model.language_model.config.eos_token_id = end
    found = model.generate(**inputs, max_new_tokens=6)
    for row, unstopped in zip(found.tolist(), free.tolist(), strict=True):
        stop = unstopped.index(end) if end in unstopped else 6
        assert row == (unstopped[:stop] + [end] * 6)[: found.size(1)] if stop < 6 else unstopped
    one = {name: tensor[:1] for name, tensor in inputs.items()}
    short = model.generate(**one, max_new_tokens=6)
    assert short.size(1) == free[0].tolist().index(end) + 1 < 6


@torch.no_grad()
def test_language_modelling_loss_does_not_show_the_answer():
    model = make_model("llama", insert_layer=1, num_labels=None)
    inputs = words_and_images(model)
    labels = inputs["input_ids"].clone()
    labels[:, : TOKENS - 2] = -100
    labels[0] = -100
    labels[0, 2] = inputs["input_ids"][0, 2]
    output = model(**inputs, labels=labels)
    answered = torch.tensor([1, TOKENS - 3, TOKENS - 3])
    assert_same(output.logits, logits(model, inputs | {"question_end": answered}))
    chosen = [(0, 1, 2), (1, TOKENS - 3, TOKENS - 2), (1, TOKENS - 2, TOKENS - 1)]
    chosen += [(2, t, u) for _, t, u in chosen[1:]]
    by_hand = [-output.logits[b, t].log_softmax(-1)[inputs["input_ids"][b, u]] for b, t, u in chosen]
    torch.testing.assert_close(output.loss, torch.stack(by_hand).mean(), check_dtype=False, rtol=1e-5, atol=1e-6)
    other = inputs["input_ids"].clone()
    other[1:, TOKENS - 2 :] = 9
    changed = model(**inputs | {"input_ids": other}, labels=labels).logits
    assert_same(changed[:, : TOKENS - 2], output.logits[:, : TOKENS - 2])


def test_language_modelling_trains_its_head():
    for use_adapters in (False, True):
        model = make_model("llama", num_labels=None, use_adapters=use_adapters)
        inputs = words_and_images(model)
        model(**inputs, labels=inputs["input_ids"].masked_fill(torch.arange(TOKENS) < 3, -100)).loss.backward()
        assert {n for n, p in model.named_parameters() if p.requires_grad} == {
            n for n, p in model.named_parameters() if p.grad is not None
        }
        assert model.language_model.lm_head.weight.requires_grad != use_adapters


@every_family
def test_wrong_arguments_are_refused(family):
    name = CLASSES[family].__name__
    language_model = make_language_model(family)
    before = [p.requires_grad for p in language_model.parameters()]
    vision = FAMILIES["clip_vision_model"].make(1)
    refusals = [
        ({"insert_layer": LAYERS}, r"insert_layer must be an integer in \[0, 2\], got 3"),
        ({"insert_layer": -1}, "insert_layer .*got -1"),
        ({"insert_layer": 1.0}, "insert_layer .*got 1.0"),
        ({"num_labels": 0}, "num_labels must be a positive integer, got 0"),
        ({"visual_dim": None}, "visual_dim is needed"),
        ({"visual_dim": 30, "vision_model": vision}, "vision_model's hidden_size, 24, got 30"),
        ({"candidates": 3}, 'candidates must be None or "all", got 3'),
        ({"original": 1}, "original must be True or False, got 1"),
        ({"use_adapters": "yes"}, "use_adapters must be True or False, got 'yes'"),
        ({"num_heads": 3}, "multiple of num_heads"),
    ]
    for wrong, message in refusals:
        with pytest.raises(ValueError, match=message):
            CLASSES[family](language_model, **{**SIZES, "num_labels": LABELS, **wrong})
    assert [p.requires_grad for p in language_model.parameters()] == before
    model = make_model(family)
    for layer in (LAYERS, -1, True, None):
        with pytest.raises(ValueError, match=rf"{name}: insert_layer must be .*got {layer}"):
            model.insert_layer = layer
    assert model.insert_layer == 0


def test_wrong_language_models_are_refused():
    for family, other in (("bert", "t5"), ("t5", "llama"), ("llama", "roberta")):
        wrong = FAMILIES[other].make(*[1] * (2 if other == "t5" else 1))
        with pytest.raises(ValueError, match=f"of the type '{family}', got {type(wrong).__name__}"):
            CLASSES[family](wrong, **SIZES, num_labels=3)
    encoder = T5EncoderModel(T5Config(d_model=8, d_kv=2, d_ff=8, num_layers=1, num_heads=2, vocab_size=9))
    with pytest.raises(ValueError, match="must have 'decoder', which T5EncoderModel lacks"):
        DVPT5(encoder, **SIZES, num_labels=3)
    t5 = make_language_model("t5")
    t5.config.decoder_start_token_id = None
    with pytest.raises(ValueError, match=r"must have a config\.decoder_start_token_id"):
        DVPT5(t5, **SIZES, num_labels=3)
    bert = make_language_model("bert")
    bert.config.is_decoder = True
    with pytest.raises(ValueError, match="must be an encoder"):
        DVPBert(bert, **SIZES, num_labels=3)
    with pytest.raises(ValueError, match="num_labels is needed where language_model has no lm_head"):
        DVPLlama(make_language_model("llama").model, **SIZES)
    with pytest.raises(ValueError, match="num_labels must be a positive integer, got None"):
        DVPT5(make_language_model("t5"), **SIZES)
    used = make_language_model("bert")
    DVPBert(used, **SIZES, num_labels=3, use_adapters=True)
    with pytest.raises(ValueError, match=r"encoder.layer.0.attention.output.dropout .*already has a child 'adapter'"):
        DVPBert(used, **SIZES, num_labels=3, use_adapters=True)


@every_family
def test_wrong_inputs_are_refused(family):
    model = make_model(family)
    inputs = make_inputs(model)
    nothing = inputs["attention_mask"].clone()
    nothing[1] = 0
    blind = torch.ones(3, VISUAL)
    blind[2] = 0
    visual = inputs["visual_features"]
    refusals = [
        ({"visual_features": visual[:2]}, r"images and texts must be as many, got 2 and input_ids \[3, 6\]"),
        ({"visual_features": visual[..., 1:]}, r"visual_features must be \[B, N, 24\], got \[3, 7, 23\]"),
        ({"visual_features": visual[0]}, r"visual_features must be .*got \[7, 24\]"),
        ({"visual_features": None}, "give either pixel_values or visual_features"),
        ({"pixel_values": visual}, "give either pixel_values or visual_features"),
        ({"visual_features": None, "pixel_values": visual}, "pixel_values need a vision_model"),
        ({"attention_mask": nothing}, "attention_mask hides all tokens of sample 1"),
        ({"attention_mask": nothing[:, 1:]}, r"shape of input_ids, \[3, 6\], got \[3, 5\]"),
        ({"input_ids": inputs["input_ids"][0]}, r"input_ids must be \[B, T\].*got \[6\]"),
        ({"visual_mask": blind}, "mask hides all tokens of sample 2"),
        ({"visual_mask": blind[:, 1:]}, r"mask must be bool \[3, 7\]"),
        ({"labels": torch.zeros(3)}, r"labels must be a score for each answer, \[3, 5\], got \[3\]"),
        ({"labels": torch.zeros(2, dtype=torch.long)}, r"labels must be 3 class indices, \[3\], got torch.int64 \[2\]"),
    ]
    for wrong, message in refusals:
        with pytest.raises(ValueError, match=message):
            model(**inputs | wrong)


def test_bert_padded_on_the_left_is_refused():
    model = make_model("bert")
    inputs = make_inputs(model)
    inputs["attention_mask"] = inputs["attention_mask"].flip(1)
    with pytest.raises(ValueError, match=r"attention_mask hides the first token, \[CLS\], of sample 0"):
        model(**inputs)


@torch.no_grad()
def test_wrong_caches_are_refused():
    model = make_model("llama", insert_layer=1, num_labels=None)
    inputs = words_and_images(model)
    cache = DynamicCache(config=model.language_model.config)
    model(**inputs, cache=cache)
    token, mask = inputs["input_ids"][:, :1], F.pad(inputs["attention_mask"], (0, 1), value=1)
    with pytest.raises(ValueError, match="holds the prompt already, but an image is given again"):
        model(token, mask, visual_features=inputs["visual_features"], cache=cache)
    with pytest.raises(ValueError, match=r"must cover 6 tokens before and 1 now, \[3, 7\], got \[3, 6\]"):
        model(token, mask[:, 1:], cache=cache)
    for layer in (0, 2):
        model.insert_layer = layer
        with pytest.raises(ValueError, match=rf"be that of insert_layer {layer}, .*got \[6, 7, 7\] rows"):
            model(token, mask, cache=cache)
    with pytest.raises(ValueError, match="cache and past_key_values are two names of one argument"):
        model(token, mask, cache=cache, past_key_values=cache)
    with pytest.raises(ValueError, match=r"labels must be tokens \[3, 6\], got \[3, 5\]"):
        model(**inputs, labels=inputs["input_ids"][:, 1:])
    classifier = make_model("llama")
    with pytest.raises(ValueError, match="a cache is for language modelling"):
        classifier(**inputs, past_key_values=DynamicCache())


@pytest.mark.parametrize("family", CLASSES)
def test_a_batch_in_which_no_answer_is_known_has_no_loss(family):
    model = make_model(family)
    loss = model(**make_inputs(model), labels=torch.full((3,), -100)).loss
    loss.backward()
    assert loss.item() == 0 and all(p.grad is None or not p.grad.any() for p in model.parameters())


def test_a_batch_in_which_no_token_is_asked_for_has_no_loss():
    model = make_model("llama", num_labels=None)
    inputs = words_and_images(model)
    labels = torch.full_like(inputs["input_ids"], -100)
    assert model(**inputs, labels=labels, question_end=torch.full((3,), TOKENS - 1)).loss.item() == 0


def test_lora_trains_in_the_visual_prompt_and_merges():
    torch.manual_seed(0)
    model = get_peft_model(
        make_model("bert", insert_layer=1).float(), LoraConfig(target_modules=["query", "key", "value"])
    )
    inputs = make_inputs(model)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    model(**inputs).logits.square().mean().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    model.eval()
    with torch.no_grad():
        before = model(**inputs).logits
        torch.testing.assert_close(model.merge_and_unload()(**inputs).logits, before, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("part", ["classifier", "type_embeddings.0", "visual_prompts.0"])
def test_peft_trains_parts_of_the_model(part):
    config = LoraConfig(target_modules=["self.query"], modules_to_save=[part])
    model = get_peft_model(make_model("bert", insert_layer=1).float(), config)
    inputs = make_inputs(model)
    model(**inputs).logits.sum().backward()
    trained = {name: p for name, p in model.named_parameters() if ".modules_to_save." in name}
    assert trained and any(p.grad is not None and p.grad.any() for p in trained.values())


def test_weights_that_accelerate_offloads():
    model = make_model("bert", insert_layer=1).eval()
    inputs = make_inputs(model)
    with torch.no_grad():
        expected = model(**inputs).logits
        torch.testing.assert_close(cpu_offload(model, torch.device("cpu"))(**inputs).logits, expected)


def test_dynamic_quantisation_of_the_visual_prompt():
    model = make_model("bert", insert_layer=1).float().eval()
    quantised = copy.deepcopy(model.visual_prompts[0])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.ao is deprecated
        torch.ao.quantization.quantize_dynamic(quantised, {torch.nn.Linear}, inplace=True)
    visual, query = torch.randn(3, VISUAL, VISUAL_DIM), torch.randn(3, DIM)
    heads = [quantised.query(query)[:, None], quantised.key(visual), quantised.value(visual)]
    q, k, v = (t.unflatten(-1, (quantised.num_heads, -1)).transpose(1, 2) for t in heads)
    expected = quantised.output(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(1))
    torch.testing.assert_close(quantised(visual, query), expected, rtol=1e-3, atol=1e-3)
    model.visual_prompts[0] = quantised
    assert model(**make_inputs(model)).logits.isfinite().all()


@every_family
def test_exported_with_sizes_that_change(family):
    model = make_model(family, use_adapters=True, num_labels=LABELS).float()
    inputs, larger = make_inputs(model), make_inputs(model, batch=5)
    larger = {name: torch.cat([tensor, tensor[:, :1]], dim=1) for name, tensor in larger.items()}

    class Logits(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, input_ids, attention_mask, visual_features):
            return self.model(input_ids, attention_mask, visual_features=visual_features).logits

    dim = torch.export.Dim
    # Of one row more than a length with a name, transformers' LLaMA makes a bound, with or without a prompt.
    sizes = {0: dim("batch", min=2, max=64), 1: dim.AUTO if family == "llama" else dim("length", min=2, max=11)}
    shapes = {"input_ids": sizes, "attention_mask": sizes, "visual_features": {0: sizes[0], 1: dim("visual", min=2)}}
    program = torch.export.export(Logits(), (), inputs, dynamic_shapes=shapes, strict=False).module()
    torch.testing.assert_close(program(**larger), Logits()(**larger))
