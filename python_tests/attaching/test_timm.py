"""timm's vision transformers beyond those of `modern_models`, and as transformers wraps them. Without timm: skipped."""

import pytest
import torch
import transformers
from modern_image_sizes import DIM, TIMM_SIZES
from modern_models import lacking, make, make_inputs, run
from tiny_vilt import randomize

import petl_ext
from petl_ext import AdapterConfig, APTConfig, DASConfig
from petl_ext.attaching.families import family_of

CONFIGS = [
    APTConfig(num_prompts=5),
    AdapterConfig(bottleneck=4, activation="gelu"),
    AdapterConfig("parallel", bottleneck=4, activation="gelu"),
    DASConfig(bottleneck=4, bypass_bottleneck=4, skip=[1]),
]
every_method = pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.row)
FORMS = {
    "DINOv2": ("timm.VisionTransformer", {"init_values": 1e-5, "reg_tokens": 4, "no_embed_class": True}),
    "DINOv3": (
        "timm.Eva",
        {"qkv_fused": True, "rope_type": "dinov3", "num_reg_tokens": 4}
        | dict.fromkeys(("swiglu_mlp", "scale_mlp", "scale_attn_inner"), False),
    ),
    "EVA": ("timm.Eva", {"qkv_fused": True, "scale_attn_inner": False, "use_rot_pos_emb": False}),
    "ViT": ("timm.VisionTransformer", {"qk_norm": True, "global_pool": "avg"}),
    "SigLIP": ("timm.VisionTransformer", {"class_token": False, "global_pool": "map"}),
}


@every_method
@pytest.mark.parametrize("form", FORMS)
def test_other_forms(form, config):
    name, changes = FORMS[form]
    if lacking(name):
        pytest.skip(lacking(name))
    check_method(make(name, **changes), config, make_inputs(name))


@every_method
def test_as_transformers_wraps_it(config):
    if lacking("timm.VisionTransformer"):
        pytest.skip(lacking("timm.VisionTransformer"))
    sizes = {name: value for name, value in TIMM_SIZES.items() if name != "num_classes"}
    wrapped = transformers.TimmWrapperConfig(architecture="vit_tiny_patch16_224", model_args=sizes, num_labels=5)
    model = transformers.TimmWrapperForImageClassification(wrapped).eval().requires_grad_(False)
    assert model.timm_model.embed_dim == DIM and family_of(model).name == "timm_wrapper"
    check_method(model, config, {"pixel_values": torch.randn(2, 3, 16, 16)})


def check_method(model, config, inputs):
    before = run(model, inputs)
    attachment = petl_ext.attach(model, config)
    randomize(attachment)
    assert {row.tower for row in attachment.report().rows} == {"vision"} and len(attachment.sites) >= 3
    run(model, inputs).square().sum().backward()
    gradients = [parameter.grad is not None and parameter.grad.any() for _, parameter in attachment.named_parameters()]
    assert any(gradients) if isinstance(config, DASConfig) else all(gradients)
    with attachment.disable():
        assert torch.equal(run(model, inputs), before)
    assert not torch.equal(run(model, inputs), before)
