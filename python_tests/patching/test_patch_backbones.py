"""Models without adapters hold no bottleneck: patching them is refused, and nothing of them is looked at for long."""

import pytest
from original_modules import Adapter
from torch import nn
from transformers import (
    BertConfig,
    BertModel,
    CLIPConfig,
    CLIPModel,
    LlamaConfig,
    LlamaModel,
    T5Config,
    T5Model,
    ViltConfig,
    ViltModel,
)

import petl_ext
from petl_ext.patching import recognize

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
TOWER = {**SIZES, "projection_dim": 16}
BACKBONES = {
    "ViLT": lambda: ViltModel(ViltConfig(**SIZES, image_size=32, patch_size=16, vocab_size=50)),
    "BERT": lambda: BertModel(BertConfig(**SIZES, vocab_size=50)),
    "CLIP": lambda: CLIPModel(
        CLIPConfig(text_config={**TOWER, "vocab_size": 50}, vision_config={**TOWER, "image_size": 32, "patch_size": 16})
    ),
    "LLaMA": lambda: LlamaModel(LlamaConfig(**SIZES, vocab_size=50)),
    "T5": lambda: T5Model(T5Config(d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, vocab_size=50)),
}


@pytest.mark.parametrize("make", BACKBONES.values(), ids=BACKBONES)
def test_a_backbone_holds_no_bottleneck(make, monkeypatch):
    monkeypatch.setattr(recognize, "probe", lambda kind, module: pytest.fail(f"{type(module)} was run"))
    with pytest.raises(ValueError, match="holds nothing that is known"):
        petl_ext.patch(make())


@pytest.mark.parametrize("make", BACKBONES.values(), ids=BACKBONES)
def test_of_a_backbone_with_an_adapter_the_adapter_alone_is_told(make):
    model = nn.ModuleDict({"backbone": make(), "adapter": Adapter(32)})
    assert [row.name for row in petl_ext.patch(model).report().rows] == ["adapter"]
