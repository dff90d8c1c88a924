"""What DVP computes on BERT, T5 and LLaMA, against restatements and longer inputs; its losses."""

import pytest
import torch
from dvp_checks import assert_same, differ, every_family, every_layer, logits, with_and_without_adapters
from tiny_dvp import (
    CLASSES,
    LABELS,
    LAYERS,
    SIZES,
    TOKENS,
    VISUAL,
    VISUAL_DIM,
    make_inputs,
    make_model,
    prompted,
    restated,
    with_prompt,
)
from tiny_families import FAMILIES
from transformers import BertForMaskedLM, LlamaModel, T5Model


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


@every_family
@torch.no_grad()
def test_a_language_model_in_bfloat16(family):
    model = make_model(family, insert_layer=1, use_adapters=True)
    inputs = make_inputs(model)
    expected = logits(model, inputs)
    found = logits(model.bfloat16(), inputs)
    assert found.dtype is torch.bfloat16
    assert (found - expected).abs().max() < 0.15 * expected.abs().max()
