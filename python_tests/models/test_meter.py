"""METER: what it computes, against restatements in plain torch; its sizes; files, images of other sizes, refusals."""

import subprocess
import sys

import pytest
import torch
from tiny_meter import (
    DIM,
    HEADS,
    IMAGE,
    IMAGE_TOKENS,
    LABELS,
    LAYERS,
    MODELS,
    PATCH,
    TEXT,
    make_config,
    make_inputs,
    make_model,
    run,
)
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPConfig, CLIPVisionConfig, RobertaConfig
from transformers_names import enable_checkpointing

from petl_ext.models import (
    MeterConfig,
    MeterForImageAndTextRetrieval,
    MeterForImagesAndTextClassification,
    MeterForQuestionAnswering,
    MeterForVisualEntailment,
    MeterFusionLayer,
    MeterModel,
    resize_position_embeddings,
)

every_model = pytest.mark.parametrize("model_class", MODELS, ids=lambda model_class: model_class.__name__)
every_head = pytest.mark.parametrize("model_class", HEADS, ids=lambda model_class: model_class.__name__)


def linear_by_hand(weights, name, x):
    return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]


def norm_by_hand(weights, name, x, eps):
    centred = x - x.mean(-1, keepdim=True)
    scaled = centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt()
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


def assert_same_weights(model, expected):
    """Bit for bit. Outputs may differ by a rounding: loaded tensors lie elsewhere in memory."""
    weights, expected = model.state_dict(), expected.state_dict()
    assert weights.keys() == expected.keys()
    assert [name for name in weights if not torch.equal(weights[name], expected[name])] == []


@every_model
@torch.no_grad()
def test_save_pretrained_and_from_pretrained_are_exact(model_class, tmp_path):
    model = make_model(model_class)
    model.save_pretrained(tmp_path)
    again = model_class.from_pretrained(tmp_path)
    assert_same_weights(again, model)
    torch.testing.assert_close(run(again, make_inputs(model)), run(model, make_inputs(model)))


@torch.no_grad()
def test_a_head_starts_from_a_saved_backbone(tmp_path):
    backbone = make_model(MeterModel, seed=7)
    backbone.save_pretrained(tmp_path)
    model = MeterForQuestionAnswering.from_pretrained(tmp_path, num_labels=9)
    for name, parameter in model.meter.named_parameters():
        assert torch.equal(parameter, backbone.get_parameter(name)), name
    first, norm, _, last = model.classifier
    assert last.weight.shape == (9, 2 * DIM)
    assert 0.15 < first.weight.std() < 0.25  # initializer_range of the tiny config
    assert not first.bias.any() and not last.bias.any() and not norm.bias.any()
    assert (norm.weight == 1).all()


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"text_config": {"max_position_embeddings": 512, "layer_norm_eps": 1e-12}},
        {"vision_config": {"image_size": 288}, "num_labels": 3129, "hidden_dropout_prob": 0.0},
        {"text_config": RobertaConfig(), "vision_config": CLIPVisionConfig()},
    ],
)
def test_a_config_survives_its_file(changes, tmp_path):
    config = MeterConfig(**changes)
    config.save_pretrained(tmp_path)
    again = MeterConfig.from_pretrained(tmp_path)
    for part in ("text_config", "vision_config"):
        assert type(getattr(again, part)) is type(getattr(config, part))
    assert again.to_dict() | {"_name_or_path": ""} == config.to_dict() | {"_name_or_path": ""}


def test_dicts_name_what_differs_from_the_published_size():
    config = MeterConfig(text_config={"num_hidden_layers": 3}, vision_config={"image_size": 288})
    vision, text = config.vision_config, config.text_config
    assert (vision.image_size, vision.patch_size, vision.num_hidden_layers) == (288, 16, 11)
    assert (text.num_hidden_layers, text.max_position_embeddings, text.layer_norm_eps) == (3, 514, 1e-5)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"num_fusion_layers": -1}, ValueError, "num_fusion_layers must be at least 1, got -1"),
        ({"num_fusion_layers": 0}, ValueError, "num_fusion_layers must be at least 1, got 0"),
        ({"modality_type_vocab_size": 1}, ValueError, "modality_type_vocab_size must be at least 2, got 1"),
        ({"vision_config": RobertaConfig()}, TypeError, "vision_config must be a CLIPVisionConfig .*got RobertaConfig"),
        ({"vision_config": CLIPConfig()}, TypeError, "vision_config must be a CLIPVisionConfig .*got CLIPConfig"),
        ({"text_config": CLIPVisionConfig()}, TypeError, "text_config must be a RobertaConfig .*got CLIPVisionConfig"),
    ],
)
def test_a_config_of_no_meter_is_refused(changes, error, message):
    with pytest.raises(error, match=f"^MeterConfig: {message}"):
        MeterConfig(**changes)


def count(module):
    return sum(parameter.numel() for parameter in module.parameters())


def test_published_parameters_and_macs():
    with torch.device("meta"):
        model = MeterForQuestionAnswering(MeterConfig(num_labels=3129)).eval()
        inputs = {"input_ids": torch.ones(1, 40, dtype=torch.long), "pixel_values": torch.zeros(1, 3, 384, 384)}
    attention = 4 * (768 * 768 + 768) + 2 * 768
    fusion = 2 * attention + (768 * 3072 + 3072) + (3072 * 768 + 768) + 2 * 768
    vision_layer = attention + (768 * 3072 + 3072) + (3072 * 768 + 768) + 2 * 768
    assert {name: count(part) for name, part in model.meter.named_children()} == {
        "text_transformer": 124_055_040,  # roberta-base, 124,645,632, without its pooler
        "vit_model": 577 * 768 + 768 + 768 * 16 * 16 * 3 + 11 * vision_layer + 4 * 768,
        "cross_modal_text_transform": 590_592,
        "cross_modal_image_transform": 590_592,
        "token_type_embeddings": 2 * 768,
        "cross_modal_text_layers": 6 * fusion,
        "cross_modal_image_layers": 6 * fusion,
        "cross_modal_text_pooler": 590_592,
        "cross_modal_image_pooler": 590_592,
    }
    assert count(model.classifier) == 7_173_177
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(**inputs)
    assert counter.get_total_flops() == 2 * published_macs(text=40, image=577)


def published_macs(text, image):
    """Products of linear layers, of the patches' projection and of attention, of one question about one image."""

    def attention(queries, keys):
        return 2 * (queries + keys) * 768**2 + 2 * queries * keys * 768

    def feed_forward(tokens):
        return 2 * tokens * 768 * 3072

    def fusion(tokens, others):
        return attention(tokens, tokens) + attention(tokens, others) + feed_forward(tokens)

    roberta = 12 * (attention(text, text) + feed_forward(text))
    vision = (image - 1) * 768 * 3 * 16 * 16 + 11 * (attention(image, image) + feed_forward(image))
    transforms = (text + image) * 768**2
    poolers_and_head = 2 * 768**2 + 1536 * 1536 + 1536 * 3129
    return roberta + vision + transforms + 6 * (fusion(text, image) + fusion(image, text)) + poolers_and_head


@pytest.mark.parametrize(
    ("model_class", "head", "changes", "parameters"),
    [
        (MeterForVisualEntailment, "classifier", {"num_labels": 3}, 1536 * 1536 + 1536 + 2 * 1536 + 1536 * 3 + 3),
        (MeterForImagesAndTextClassification, "classifier", {"modality_type_vocab_size": 3}, 4_726_274),
        (MeterForImageAndTextRetrieval, "rank_output", {}, 1_537),
    ],
)
def test_published_heads(model_class, head, changes, parameters):
    with torch.device("meta"):
        model = model_class(MeterConfig(**changes))
    assert count(model.get_submodule(head)) == parameters


def test_initial_weights():
    model = MeterModel(make_config(initializer_range=0.02))
    weights = dict(model.named_parameters())
    for name in (
        "cross_modal_text_transform",
        "cross_modal_image_pooler.dense",
        "cross_modal_text_layers.0.output.dense",
    ):
        assert 0.015 < weights[f"{name}.weight"].std() < 0.025
        assert not weights[f"{name}.bias"].any()
    assert 0.01 < weights["token_type_embeddings.weight"].std() < 0.03
    assert (weights["cross_modal_image_layers.1.crossattention.output.LayerNorm.weight"] == 1).all()


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


def cross_entropy_by_hand(logits, labels):
    return -sum(row.softmax(0)[label].log() for row, label in zip(logits, labels, strict=True)) / len(labels)


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


@pytest.mark.parametrize("grid", [1, 2, 3, 5, 8])
def test_constant_positions_stay_constant(grid):
    weight = torch.full((10, 4), 0.7)
    weight[0] = -2.0
    resized = resize_position_embeddings(weight, grid)
    assert resized.shape == (1 + grid**2, 4)
    assert torch.equal(resized[0], weight[0])
    torch.testing.assert_close(resized[1:], torch.full((grid**2, 4), 0.7))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_positions_of_the_same_grid_are_untouched(dtype):
    weight = torch.randn(17, 3).to(dtype)
    assert resize_position_embeddings(weight, 4) is weight
    assert resize_position_embeddings(weight, 5).dtype is dtype


def test_positions_grow_where_they_were():
    """A patch of row 1 and column 2 of 4 x 4: after doubling, its four quarters hold the most, and weights are those
    of Keys' cubic with a = -0.75 at a quarter of a patch from its centre."""
    weight = torch.zeros(17, 2)
    weight[1 + 1 * 4 + 2, 1] = 1.0
    resized = resize_position_embeddings(weight, 8)[1:, 1].view(8, 8)
    near, a = 0.25, -0.75
    cubic = (a + 2) * near**3 - (a + 3) * near**2 + 1
    torch.testing.assert_close(resized[2:4, 4:6], torch.full((2, 2), cubic**2))
    assert resized.abs().argmax() in (2 * 8 + 4, 2 * 8 + 5, 3 * 8 + 4, 3 * 8 + 5)
    assert not resize_position_embeddings(weight, 8)[:, 0].any()


@pytest.mark.parametrize(
    ("weight", "grid", "message"),
    [
        (torch.zeros(17, 3), 0, "grid must be a positive integer, got 0"),
        (torch.zeros(17, 3), 4.0, "grid must be a positive integer, got 4.0"),
        (torch.zeros(16, 3), 4, r"a class token and a square of patches, got \[16, 3\]"),
        (torch.zeros(1, 3), 4, r"got \[1, 3\]"),
        (torch.zeros(0, 3), 4, r"got \[0, 3\]"),
        (torch.zeros(1, 17, 3), 4, r"got \[1, 17, 3\]"),
    ],
)
def test_positions_that_are_no_square_are_refused(weight, grid, message):
    with pytest.raises(ValueError, match=message):
        resize_position_embeddings(weight, grid)


@pytest.mark.parametrize("image_size", [PATCH, IMAGE + PATCH])
@every_model
@torch.no_grad()
def test_images_of_another_size(model_class, image_size, tmp_path):
    model = make_model(model_class)
    before = model.base_model.vit_model.embeddings.position_embedding.weight.clone()
    model.base_model.vit_model.requires_grad_(False)
    model.resize_images(image_size)
    assert model.config.vision_config.image_size == image_size
    table = model.base_model.vit_model.embeddings.position_embedding
    assert torch.equal(table.weight, resize_position_embeddings(before, image_size // PATCH))
    assert isinstance(table.weight, torch.nn.Parameter) and not table.weight.requires_grad
    assert table.num_embeddings == 1 + (image_size // PATCH) ** 2
    output = run(model, make_inputs(model))
    model.save_pretrained(tmp_path)
    again = model_class.from_pretrained(tmp_path)
    assert_same_weights(again, model)
    torch.testing.assert_close(run(again, make_inputs(again)), output)


@torch.no_grad()
def test_the_same_image_size_changes_nothing():
    model = make_model()
    inputs = make_inputs(model)
    output = run(model, inputs)
    model.resize_images(IMAGE)
    assert torch.equal(run(model, inputs), output)


@pytest.mark.parametrize("image_size", [IMAGE + 1, 0, -PATCH, float(IMAGE), None])
def test_images_that_are_no_multiple_of_the_patch_are_refused(image_size):
    model = make_model()
    inputs = make_inputs(model)
    output = run(model, inputs)
    with pytest.raises(ValueError, match=f"a positive multiple of the patch size {PATCH}, got {image_size}"):
        model.resize_images(image_size)
    assert torch.equal(run(model, inputs), output)


@torch.no_grad()
def test_new_token_types_are_copies_of_the_last(tmp_path):
    model = make_model(MeterModel, modality_type_vocab_size=2)
    inputs = make_inputs(model)
    old = model.token_type_embeddings.weight.clone()
    model.resize_token_types(3)
    assert torch.equal(model.token_type_embeddings.weight, old[[0, 1, 1]])
    assert torch.equal(run(model, inputs | {"image_token_type_idx": 2}), run(model, inputs))
    model.save_pretrained(tmp_path)
    nlvr2 = MeterForImagesAndTextClassification.from_pretrained(tmp_path)
    assert torch.equal(nlvr2.meter.token_type_embeddings.weight, old[[0, 1, 1]])
    for wrong in (2, 3.0):
        with pytest.raises(ValueError, match=f"an integer of at least 3, got {wrong}"):
            model.resize_token_types(wrong)


def embedded(model, inputs):
    """The same text and image as what the two encoders make of them first."""
    meter = model.base_model
    images = inputs["pixel_values"]
    seen = meter.vit_model(images.flatten(0, -4)).last_hidden_state
    return {
        "inputs_embeds": meter.text_transformer.embeddings.word_embeddings(inputs["input_ids"]),
        "image_embeds": seen.unflatten(0, images.shape[:-3]),
        "attention_mask": inputs["attention_mask"],
    }


@every_model
@torch.no_grad()
def test_embeddings_of_text_and_image_can_be_given(model_class):
    model = make_model(model_class).double()
    inputs = make_inputs(model)
    inputs["pixel_values"] = inputs["pixel_values"].double()
    expected, given = run(model, inputs), embedded(model, inputs)
    torch.testing.assert_close(run(model, given), expected)
    mixed = {"input_ids": inputs["input_ids"], "image_embeds": given["image_embeds"]}
    torch.testing.assert_close(run(model, mixed | {"attention_mask": inputs["attention_mask"]}), expected)
    mixed = {"inputs_embeds": given["inputs_embeds"], "pixel_values": inputs["pixel_values"]}
    torch.testing.assert_close(run(model, mixed | {"attention_mask": inputs["attention_mask"]}), expected)
    fewer = given | {"image_embeds": given["image_embeds"][..., :4, :]}
    assert not torch.allclose(run(model, fewer), expected, rtol=1e-3)
    for name in ("inputs_embeds", "image_embeds"):
        changed = given | {name: given[name] + torch.randn(given[name].shape[-1])}
        assert not torch.allclose(run(model, changed), expected, rtol=1e-3)


@torch.no_grad()
def test_embeddings_of_many_texts():
    model = make_model(MeterForImageAndTextRetrieval).double()
    inputs = [make_inputs(model, seed=seed) for seed in range(3)]
    pixels = inputs[0]["pixel_values"].double()
    given = [embedded(model, entry | {"pixel_values": pixels}) for entry in inputs]
    texts = {name: torch.stack([entry[name] for entry in given], 1) for name in ("inputs_embeds", "attention_mask")}
    output = model(**texts, image_embeds=given[0]["image_embeds"], labels=torch.tensor([0, 2]))
    each = [model(**entry | {"pixel_values": pixels}).logits for entry in inputs]
    torch.testing.assert_close(output.logits, torch.cat(each, dim=1))
    torch.testing.assert_close(output.loss, cross_entropy_by_hand(torch.cat(each, dim=1), [0, 2]))


def test_gradients_reach_given_embeddings():
    model = make_model()
    given = {
        name: t.detach().requires_grad_(name != "attention_mask")
        for name, t in embedded(model, make_inputs(model)).items()
    }
    run(model, given).square().sum().backward()
    assert given["inputs_embeds"].grad.any() and given["image_embeds"].grad.any()


@every_model
def test_text_and_image_are_given_once(model_class):
    model = make_model(model_class)
    inputs = make_inputs(model)
    given = embedded(model, inputs)
    for name, pair in (
        ("inputs_embeds", "input_ids or inputs_embeds"),
        ("image_embeds", "pixel_values or image_embeds"),
    ):
        refused(model, f"give either {pair}, got both", **{name: given[name]})
        other = pair.partition(" ")[0]
        refused(model, f"give either {pair}, got neither", **{other: None})


def test_embeddings_of_a_wrong_shape_are_refused():
    model = make_model(MeterModel)
    given = embedded(model, make_inputs(model)) | {"input_ids": None, "pixel_values": None}
    words, seen = given["inputs_embeds"], given["image_embeds"]
    size = r"inputs_embeds must be \[B, T, 24\] with at most 10 tokens"
    refused(model, rf"{size}, got \[2, 6, 23\]", **given | {"inputs_embeds": words[..., :-1]})
    refused(model, rf"{size}, got \[2, 6\]", **given | {"inputs_embeds": words[..., 0]})
    refused(model, rf"{size}, got \[2, 12, 24\]", **given | {"inputs_embeds": words.repeat(1, 2, 1)})
    refused(model, r"image_embeds must be \[B, N, 40\], got \[2, 10, 39\]", **given | {"image_embeds": seen[..., :-1]})
    refused(model, r"image_embeds must be \[B, N, 40\], got \[2, 40\]", **given | {"image_embeds": seen[:, 0]})
    refused(
        model,
        r"inputs_embeds and image_embeds must hold the same number of samples, got \[2, 6, 24\] and \[1, 10, 40\]",
        **given | {"image_embeds": seen[:1]},
    )
    refused(model, r"shape of inputs_embeds, \[2, 6\], got \[2, 7\]", **given | {"attention_mask": torch.ones(2, 7)})
    pairs = make_model(MeterForImagesAndTextClassification)
    given = embedded(pairs, make_inputs(pairs)) | {"input_ids": None, "pixel_values": None}
    given["image_embeds"] = given["image_embeds"][:, :1]
    refused(pairs, r"image_embeds must be \[B, 2, N, D\], 2 images to a text, got \[2, 1, 10, 40\]", **given)


def refused(model, message, **changes):
    with pytest.raises(ValueError, match=message):
        model(**make_inputs(model) | changes)


def test_inputs_of_a_wrong_shape_are_refused():
    model = make_model(MeterModel)
    size = rf"\[B, 3, {IMAGE}, {IMAGE}\]"
    refused(
        model, rf"pixel_values must be {size}.*\[2, 3, 32, 32\].*resize_images", pixel_values=torch.zeros(2, 3, 32, 32)
    )
    refused(model, rf"must be {size}, got \[2, 1, 24, 24\]", pixel_values=torch.zeros(2, 1, IMAGE, IMAGE))
    refused(model, rf"must be {size}, got \[2, 24, 24\]", pixel_values=torch.zeros(2, IMAGE, IMAGE))
    refused(model, r"same number of samples, got \[2, 6\] and \[1, 3", pixel_values=torch.zeros(1, 3, IMAGE, IMAGE))
    refused(model, r"shape of input_ids, \[2, 6\], got \[2, 7\]", attention_mask=torch.ones(2, 7))
    long = {name: torch.ones(2, 11, dtype=torch.long) for name in ("input_ids", "attention_mask")}
    refused(model, r"\[B, T\] with at most 10 tokens, got \[2, 11\]", **long)
    refused(model, r"must be \[B, T\].*got \[2\]", input_ids=torch.ones(2, dtype=torch.long))
    for wrong in (0, 3, -1):
        refused(model, rf"image_token_type_idx must lie in \[1, 2\], got {wrong}", image_token_type_idx=wrong)


def test_a_wrong_number_of_images_is_refused():
    model = make_model(MeterForImagesAndTextClassification)
    for images in ((3,), (1,), ()):
        pixels = torch.zeros(2, *images, 3, IMAGE, IMAGE)
        refused(model, rf"2 images to a text, got \[{', '.join(map(str, pixels.shape))}\]", pixel_values=pixels)
    with pytest.raises(ValueError, match=r"modality_type_vocab_size must be at least 3, got 2; resize_token_types"):
        make_model(MeterForImagesAndTextClassification, modality_type_vocab_size=2)


def test_labels_of_a_wrong_shape_are_refused():
    vqa, snli = make_model(MeterForQuestionAnswering), make_model(MeterForVisualEntailment)
    refused(vqa, r"MeterForQuestionAnswering: labels .*\[2, 5\], got \[2\]", labels=torch.zeros(2))
    refused(vqa, r"\[2, 5\], got \[2, 4\]", labels=torch.zeros(2, 4))
    refused(snli, r"labels must be 2 class indices, \[2\], got torch.int64 \[2, 1\]", labels=torch.ones(2, 1).long())
    refused(snli, r"got torch.float32 \[2\]", labels=torch.ones(2))
    retrieval = make_model(MeterForImageAndTextRetrieval)
    refused(retrieval, r"labels need several texts.*got \[2, 6\]", labels=torch.zeros(2, dtype=torch.long))
    texts = {name: torch.ones(3, 4, TEXT, dtype=torch.long) for name in ("input_ids", "attention_mask")}
    refused(retrieval, r"same number of samples, got \[3, 4, 6\] and \[2, 3", **texts)


def test_without_transformers_the_message_names_the_package():
    script = "import sys; sys.modules['transformers'] = None; import petl_ext; import petl_ext.models"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == "ImportError: petl_ext.models needs transformers: pip install transformers"
