"""METER: what it and its heads compute, against restatements in plain torch, and in other precisions and modes."""

import pytest
import torch
from meter_checks import cross_entropy_by_hand, every_model
from tiny_meter import (
    DIM,
    HEADS,
    IMAGE,
    IMAGE_TOKENS,
    LABELS,
    LAYERS,
    PATCH,
    TEXT,
    make_config,
    make_inputs,
    make_model,
    run,
)
from transformers_names import enable_checkpointing

from petl_ext.models import (
    MeterForImageAndTextRetrieval,
    MeterForImagesAndTextClassification,
    MeterForQuestionAnswering,
    MeterForVisualEntailment,
    MeterFusionLayer,
    MeterModel,
)

every_head = pytest.mark.parametrize("model_class", HEADS, ids=lambda model_class: model_class.__name__)


def linear_by_hand(weights, name, x):
    return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]


def norm_by_hand(weights, name, x, eps):
    centered = x - x.mean(-1, keepdim=True)
    scaled = centered / (centered.square().mean(-1, keepdim=True) + eps).sqrt()
    return scaled * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def attention_by_hand(query, key, value, heads, hidden=None):
    """All [B, *, D]; `hidden` [B, keys] marks keys that nobody may attend to. One sample and head at a time."""
    output = torch.empty_like(query)
    width = query.size(-1) // heads
    for b in range(len(query)):
        for h in range(heads):
            part = slice(h * width, (h + 1) * width)
            scores = query[b, :, part] @ key[b, :, part].T / width**0.5
            if hidden is not None:
                scores[:, hidden[b]] = -torch.inf
            output[b, :, part] = scores.softmax(-1) @ value[b, :, part]
    return output


def gelu_by_hand(x):
    return 0.5 * x * (1 + torch.erf(x / 2**0.5))


def fusion_layer_by_hand(weights, x, other, x_hidden=None, other_hidden=None):
    for name, source, hidden in (("attention", None, x_hidden), ("crossattention", other, other_hidden)):
        source = x if source is None else source
        q, k, v = (
            linear_by_hand(weights, f"{name}.self.{part}", rows)
            for part, rows in (("query", x), ("key", source), ("value", source))
        )
        context = attention_by_hand(q, k, v, heads=4, hidden=hidden)
        output = linear_by_hand(weights, f"{name}.output.dense", context)
        x = norm_by_hand(weights, f"{name}.output.LayerNorm", output + x, eps=1e-12)
    inner = gelu_by_hand(linear_by_hand(weights, "intermediate.dense", x))
    return norm_by_hand(weights, "output.LayerNorm", linear_by_hand(weights, "output.dense", inner) + x, eps=1e-12)


def vision_by_hand(model, pixels):
    """CLIP's vision transformer up to the norm of all tokens."""
    weights = dict(model.vit_model.named_parameters())
    side = IMAGE // PATCH
    patches = pixels.unflatten(3, (side, PATCH)).unflatten(2, (side, PATCH)).permute(0, 2, 4, 1, 3, 5).flatten(3)
    x = patches.flatten(1, 2) @ weights["embeddings.patch_embedding.weight"].flatten(1).T
    x = torch.cat([weights["embeddings.class_embedding"].expand(len(x), 1, -1), x], dim=1)
    x = norm_by_hand(weights, "pre_layrnorm", x + weights["embeddings.position_embedding.weight"], eps=1e-5)
    for i in range(model.config.vision_config.num_hidden_layers):
        block = f"encoder.layers.{i}"
        h = norm_by_hand(weights, f"{block}.layer_norm1", x, eps=1e-5)
        q, k, v = (linear_by_hand(weights, f"{block}.self_attn.{part}_proj", h) for part in "qkv")
        x = x + linear_by_hand(weights, f"{block}.self_attn.out_proj", attention_by_hand(q, k, v, heads=4))
        h = linear_by_hand(weights, f"{block}.mlp.fc1", norm_by_hand(weights, f"{block}.layer_norm2", x, eps=1e-5))
        x = x + linear_by_hand(weights, f"{block}.mlp.fc2", h * torch.sigmoid(1.702 * h))
    return norm_by_hand(weights, "post_layernorm", x, eps=1e-5)


@pytest.mark.parametrize("attn_implementation", ["sdpa", "eager"])
@torch.no_grad()
def test_a_fusion_layer_is_the_formula(attn_implementation):
    config = make_config(attn_implementation=attn_implementation)
    layer = MeterFusionLayer(config).double().eval()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    x, other = torch.randn(2, 6, DIM).double(), torch.randn(2, 9, DIM).double()
    x_hidden, other_hidden = torch.rand(2, 6) > 0.6, torch.rand(2, 9) > 0.6
    x_hidden[:, 0] = other_hidden[:, 0] = False
    masks = [torch.zeros_like(h, dtype=x.dtype).masked_fill(h, -1e300)[:, None, None] for h in (x_hidden, other_hidden)]
    weights = dict(layer.named_parameters())
    torch.testing.assert_close(layer(x, other), fusion_layer_by_hand(weights, x, other))
    torch.testing.assert_close(layer(x, other, *masks), fusion_layer_by_hand(weights, x, other, x_hidden, other_hidden))


@torch.no_grad()
def test_the_model_is_the_formula():
    """All but RoBERTa, which is transformers' own: both streams of a layer read what the other was before it."""
    model = make_model(MeterModel).double()
    inputs = make_inputs(model)
    hidden = inputs["attention_mask"] == 0
    pixels = inputs["pixel_values"].double()
    weights = dict(model.named_parameters())
    text = model.text_transformer(inputs["input_ids"], inputs["attention_mask"]).last_hidden_state
    text = linear_by_hand(weights, "cross_modal_text_transform", text) + weights["token_type_embeddings.weight"][0]
    image = linear_by_hand(weights, "cross_modal_image_transform", vision_by_hand(model, pixels))
    image = image + weights["token_type_embeddings.weight"][2]
    for i in range(LAYERS):
        text_weights = dict(model.cross_modal_text_layers[i].named_parameters())
        image_weights = dict(model.cross_modal_image_layers[i].named_parameters())
        text, image = (
            fusion_layer_by_hand(text_weights, text, image, x_hidden=hidden),
            fusion_layer_by_hand(image_weights, image, text, other_hidden=hidden),
        )
    pooled_text = linear_by_hand(weights, "cross_modal_text_pooler.dense", text[:, 0]).tanh()
    pooled_image = linear_by_hand(weights, "cross_modal_image_pooler.dense", image[:, 0]).tanh()
    output = model(**inputs | {"pixel_values": pixels}, image_token_type_idx=2)
    torch.testing.assert_close(output.text_last_hidden_state, text)
    torch.testing.assert_close(output.image_last_hidden_state, image)
    torch.testing.assert_close(output.text_pooler_output, pooled_text)
    torch.testing.assert_close(output.image_pooler_output, pooled_image)
    torch.testing.assert_close(output.pooler_output, torch.cat([pooled_text, pooled_image], dim=1))
    assert output.image_last_hidden_state.shape == (2, IMAGE_TOKENS, DIM)


@every_model
@torch.no_grad()
def test_padding_changes_nothing(model_class):
    model = make_model(model_class)
    inputs = make_inputs(model)
    short = TEXT // 2
    first = {name: tensor[:1] for name, tensor in inputs.items()}
    cut = first | {name: first[name][:, :short] for name in ("input_ids", "attention_mask")}
    del cut["attention_mask"]
    torch.testing.assert_close(run(model, first), run(model, cut))
    unmasked = run(model, first | {"attention_mask": torch.ones(1, TEXT, dtype=torch.long)})
    assert not torch.allclose(run(model, first), unmasked, rtol=1e-3)


@every_model
@torch.no_grad()
def test_eager_equals_sdpa(model_class):
    models = [make_model(model_class, attn_implementation=name) for name in ("sdpa", "eager")]
    for model, name in zip(models, ("sdpa", "eager"), strict=True):
        parts = (model.config, model.config.text_config, model.config.vision_config)
        assert {part._attn_implementation for part in parts} == {name}
    models[1].load_state_dict(models[0].state_dict())
    torch.testing.assert_close(*(run(model, make_inputs(model)) for model in models))


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(reentrant):
    model = make_model().train()
    calls = []
    model.meter.cross_modal_image_layers[1].intermediate.register_forward_hook(lambda *_: calls.append(1))
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            enable_checkpointing(model, use_reentrant=reentrant)
        model.zero_grad()
        torch.manual_seed(0)
        run(model, make_inputs(model)).square().sum().backward()
        gradients.append({name: parameter.grad.clone() for name, parameter in model.named_parameters()})
    assert len(calls) == 3  # once without checkpointing, twice with it
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)


@every_model
def test_every_parameter_trains(model_class):
    model = make_model(model_class)
    run(model, make_inputs(model)).square().sum().backward()
    untrained = {name for name, parameter in model.named_parameters() if not parameter.grad.any()}
    # A key's bias adds the same to all scores of a query, which the softmax takes away: its gradient is rounding.
    assert {name for name in untrained if not name.endswith(("key.bias", "k_proj.bias"))} == set()


def head_by_hand(model, pooled):
    weights = dict(model.named_parameters())
    hidden = linear_by_hand(weights, "classifier.0", pooled)
    hidden = gelu_by_hand(norm_by_hand(weights, "classifier.1", hidden, eps=1e-5))
    return linear_by_hand(weights, "classifier.3", hidden)


@torch.no_grad()
def test_question_answering_is_the_formula():
    model = make_model(MeterForQuestionAnswering).double()
    inputs = make_inputs(model)
    scores = torch.rand(2, LABELS).double()
    output = model(**inputs, labels=scores)
    logits = head_by_hand(model, model.meter(**inputs).pooler_output)
    torch.testing.assert_close(output.logits, logits)
    right, wrong = torch.sigmoid(logits).log(), torch.sigmoid(-logits).log()
    loss = -(scores * right + (1 - scores) * wrong).sum() / 2
    torch.testing.assert_close(output.loss, loss)
    one_hot = torch.eye(LABELS, dtype=torch.long)[:2]
    torch.testing.assert_close(model(**inputs, labels=one_hot).loss, model(**inputs, labels=one_hot.double()).loss)


@torch.no_grad()
def test_visual_entailment_is_the_formula():
    model = make_model(MeterForVisualEntailment, num_labels=3).double()
    inputs = make_inputs(model)
    output = model(**inputs, labels=torch.tensor([2, 0]))
    logits = head_by_hand(model, model.meter(**inputs).pooler_output)
    assert logits.shape == (2, 3)
    torch.testing.assert_close(output.logits, logits)
    torch.testing.assert_close(output.loss, cross_entropy_by_hand(logits, [2, 0]))


@torch.no_grad()
def test_images_and_text_classification_is_the_formula():
    model = make_model(MeterForImagesAndTextClassification, num_labels=2).double()
    inputs = make_inputs(model)
    pooled = [
        model.meter(
            inputs["input_ids"], inputs["pixel_values"][:, i], inputs["attention_mask"], image_token_type_idx=i + 1
        ).pooler_output
        for i in range(2)
    ]
    output = model(**inputs, labels=torch.tensor([1, 0]))
    logits = head_by_hand(model, torch.cat(pooled, dim=1))
    torch.testing.assert_close(output.logits, logits)
    torch.testing.assert_close(output.loss, cross_entropy_by_hand(logits, [1, 0]))


@torch.no_grad()
def test_retrieval_of_many_texts_is_retrieval_of_each():
    model = make_model(MeterForImageAndTextRetrieval).double()
    inputs = [make_inputs(model, seed=seed) for seed in range(3)]
    pixels = inputs[0]["pixel_values"]
    each = [
        linear_by_hand(
            dict(model.named_parameters()),
            "rank_output",
            model.meter(entry["input_ids"], pixels, entry["attention_mask"]).pooler_output,
        )
        for entry in inputs
    ]
    singles = [model(**entry | {"pixel_values": pixels}).logits for entry in inputs]
    torch.testing.assert_close(singles, each)
    texts = {name: torch.stack([entry[name] for entry in inputs], 1) for name in ("input_ids", "attention_mask")}
    output = model(**texts, pixel_values=pixels, labels=torch.tensor([0, 2]))
    torch.testing.assert_close(output.logits, torch.cat(each, dim=1))
    torch.testing.assert_close(output.loss, cross_entropy_by_hand(torch.cat(each, dim=1), [0, 2]))


@every_head
@torch.no_grad()
def test_a_tuple_is_returned_on_request(model_class):
    model = make_model(model_class)
    inputs = make_inputs(model)
    expected = model(**inputs).logits
    (logits,) = model(**inputs, return_dict=False)
    assert torch.equal(logits, expected)
    for config in (model.config, model.config.text_config, model.config.vision_config):
        config.return_dict = False
    (logits,) = model(**inputs)
    assert torch.equal(logits, expected)


def test_autocast_trains():
    model = make_model().train()
    with torch.autocast("cpu", torch.bfloat16):
        output = model(**make_inputs(model), labels=torch.rand(2, LABELS))
    output.loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


@torch.no_grad()
def test_half_precision_weights():
    model = make_model()
    expected = run(model, make_inputs(model))
    logits = run(model.to(torch.bfloat16), make_inputs(model))
    assert logits.dtype is torch.bfloat16
    torch.testing.assert_close(logits.float(), expected, rtol=0.1, atol=0.1 * expected.abs().max().item())


def test_the_model_compiles_in_one_graph():
    model = make_model(MeterModel)
    text, image = torch.randn(2, TEXT, DIM), torch.randn(2, IMAGE_TOKENS, DIM)
    mask = make_inputs(model)["attention_mask"]
    compiled = torch.compile(model.fuse, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(text, image, mask).pooler_output, model.fuse(text, image, mask).pooler_output)
