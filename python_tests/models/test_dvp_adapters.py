"""Where DVP's adapters stand, how they and the head start, the adapters' widths, the published sizes."""

import pytest
import torch
from dvp_checks import ADAPTER_PLACES, assert_same, every_family, filled, logits
from tiny_dvp import CLASSES, DIM, LABELS, SIZES, make_inputs, make_language_model, make_model, restated
from tiny_vilt import randomize
from transformers import BertConfig, BertModel, LlamaConfig, LlamaModel, T5Config, T5Model

import petl_ext
from petl_ext import AdapterLayer
from petl_ext.counting import count_macs
from petl_ext.models import DVPT5, DVPBert, DVPLlama


@every_family
def test_adapters_stand_where_the_authors_put_them(family):
    """Behind BERT's dropout, before T5's; what the formula test cannot tell."""
    model = make_model(family, insert_layer=1, use_adapters=True).train()
    seen = {}
    for name, module in model.language_model.named_modules():
        if name.endswith(".adapter"):
            module.register_forward_hook(lambda _, x, out, name=name: seen.update({name: (x[0] == 0).any().item()}))
    model(**make_inputs(model))
    assert seen.keys() == {f"{place}.adapter" for place in filled(ADAPTER_PLACES[family])}
    assert all(dropped == (family == "bert") for dropped in seen.values())


@pytest.mark.parametrize(
    ("family", "bottleneck", "spread"), [("bert", DIM // 8, 0.01), ("t5", DIM // 8, 0.01), ("llama", 1, None)]
)
def test_adapters_start_as_the_authors_do(family, bottleneck, spread):
    layers = make_language_model(family)
    model = CLASSES[family](layers, **SIZES, num_labels=LABELS, use_adapters=True)
    adapters = [module for name, module in model.named_modules() if name.endswith(".adapter")]
    assert len(adapters) == len(filled(ADAPTER_PLACES[family]))
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


@every_family
@torch.no_grad()
def test_adapters_of_any_width(family, tmp_path):
    model = make_model(family, use_adapters=True, adapter_bottleneck=5)
    inputs = make_inputs(model)
    adapters = [module for module in model.modules() if isinstance(module, AdapterLayer)]
    assert {layer.down.shape for layer in adapters} == {(5, DIM)}
    assert_same(logits(model, inputs), restated(model, **inputs))
    model.save(tmp_path / "saved")
    again = type(model).load(tmp_path / "saved", make_language_model(family).double())
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


def test_adapters_leave_room_for_what_is_attached():
    model = make_model("bert", use_adapters=True)
    inputs = make_inputs(model)
    own = {name: type(module) for name, module in model.named_modules()}
    before = logits(model, inputs)
    attachment = petl_ext.attach(model, petl_ext.APTConfig(num_prompts=3, sites=[r"attention\.output"]))
    randomize(attachment)
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
    assert len(adapted) == len(filled(ADAPTER_PLACES[family]))
    for name, module in adapted.items():
        own = type(bare.get_submodule(name))
        assert isinstance(module, own) and type(module).__name__ == own.__name__ and not module._forward_hooks
