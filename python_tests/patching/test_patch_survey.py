"""59 adapters of public code bases: which of them `patch` takes, and why it leaves the others alone."""

import copy

import pytest
import torch
import torch.nn.functional as F
from ops_called import OpsCalled
from original_modules import Adapter, LibraryAdapter, ParallelAdapter, SiluAdapter
from survey_modules import (
    DIM,
    INNER,
    AimAdapter,
    AimSpatialAdapter,
    AutocastAdapter,
    BiAdapter,
    ClipAdapter,
    Convpass,
    DeltaAdapter,
    Downsampled,
    Factors,
    GatedPrompts,
    GatingTransformersAdapter,
    LavinMlp,
    LinearWithBottleneck,
    OneBitLinear,
    PoolingAdapter,
    Projected,
    RepAdapter,
    RoutedAdapter,
    Short,
    SpaceTimeAdapter,
    SuperAdapter,
    TransformersAdapter,
    VisualAdapter,
    VLAdapter,
    VLAdapterLayer,
    identity,
    tanh_gelu,
)
from torch import nn

import petl_ext
from petl_ext.patching.recognize import kind_of, recognize


def library(*arguments, norm_last=False, **named):
    module = LibraryAdapter(DIM, INNER, *arguments, **named)
    if norm_last:
        module.adapter_norm_after = nn.LayerNorm(DIM)
    return module


def unified(option, scale="1.0", dropout=0.0):
    """unify-PET's and AdaptFormer's."""
    return ParallelAdapter(DIM, INNER, dropout, scale, option)


TAKEN = {
    "unify-PET, norm first": lambda: unified("in"),
    "unify-PET, norm last": lambda: unified("out", "0.5"),
    "unify-PET, no norm": lambda: unified("none", "4.0"),
    "unify-PET, trained scale": lambda: unified("in", "learnable_scalar"),
    "AdaptFormer": lambda: unified("none", "0.1", dropout=0.1),
    "APT": lambda: Adapter(DIM, INNER),
    "DVP, BERT": lambda: Adapter(DIM, INNER // 2),
    "DVP, LLaMA": lambda: SiluAdapter(DIM, INNER),
    "DAS, LLaVA": lambda: AutocastAdapter(),
    "DAS, LaVIN": lambda: AutocastAdapter(dtype=torch.bfloat16),
    "adapters": lambda: library("relu", dropout=0.1),
    "adapters, norm first": lambda: library("gelu", scaling=2.0, ln_before=True),
    "adapters, parallel": lambda: library("swish", scaling="learned", parallel=True),
    "adapter-transformers 3": lambda: GatingTransformersAdapter(F.relu),
    "adapter-transformers 3, parallel": lambda: GatingTransformersAdapter(F.relu, parallel=True),
    "adapter-transformers 2.2": lambda: TransformersAdapter(F.silu, norm_first=True),
    "VL-adapter": lambda: VLAdapter(F.relu),
    "VL-adapter, swish": lambda: VLAdapter(F.silu),
    "Ladder-Side-Tuning": lambda: VLAdapter(nn.ReLU()),
    "compacter": lambda: VLAdapter(nn.SiLU()),
    "VL-adapter's layer": lambda: VLAdapterLayer(),
    "VL-adapter's layer, norm first": lambda: VLAdapterLayer(before=True),
    "VL-adapter's layer, norm last": lambda: VLAdapterLayer(after=True),
    "AIM": lambda: AimAdapter(),
    "AIM, no residual": lambda: AimAdapter(skip_connect=False),
    "AIM, space": lambda: AimSpatialAdapter(),
    "AIM, time": lambda: AimAdapter(),
    "PETL-ViT, Bi-AdaptFormer": lambda: BiAdapter(),
    "OpenDelta": lambda: DeltaAdapter(),
    "OpenDelta, parallel": lambda: DeltaAdapter(parallel=True),
    "down_proj, act, up_proj": lambda: Projected(),
    "adapter_downsample, adapter_act_fn": lambda: Downsampled(),
    "down, up": lambda: Short(),
    "a trained scale of the shape []": lambda: Short(nn.Parameter(torch.tensor(0.1))),
    "a Sequential, norm first": lambda: nn.Sequential(
        nn.LayerNorm(DIM), nn.Linear(DIM, INNER), nn.GELU(), nn.Dropout(0.1), nn.Linear(INNER, DIM)
    ),
}
ELSE = "its forward computes something else than [x +] s * [LN](up(act(down([LN] x))))"
LEFT_ALONE = {
    "adapters, gate": (lambda: library(gating=True), "it has a gate"),
    "adapters, norm last": (lambda: library(norm_last=True), "it ends in LayerNorm((32,)"),
    "adapters, scale per channel": (lambda: library(scaling="channel"), "its scale has the shape [32], not [] or [1]"),
    "VL-adapter, gelu_new": (lambda: VLAdapter(tanh_gelu), "its activation computes tanh GELU"),
    "compacter, gelu_new": (
        lambda: VLAdapter(nn.GELU(approximate="tanh")),
        "its activation computes tanh GELU, not relu or gelu or silu",
    ),
    "VL-adapter's layer, two norms": (
        lambda: VLAdapterLayer(before=True, after=True),
        "it has 2 LayerNorms, pre_layer_norm and post_layer_norm",
    ),
    "VL-adapter's layer, track_z": (lambda: VLAdapterLayer(track_z=True), "its forward sets z"),
    "VL-adapter, images": (lambda: VisualAdapter(), "it also has bn1, bn2"),
    "PETL-ViT, Bi-AdaptFormer of one bit": (
        lambda: BiAdapter(OneBitLinear),
        "a projection is OneBitLinear(in_features=32, out_features=8, bias=False), neither nn.Linear nor a 1 x 1",
    ),
    "PETL-ViT, Bi-LoRA": (lambda: BiAdapter(activation=identity), "its activation computes the identity"),
    "PETL-ViT, Convpass": (lambda: Convpass(), None),
    "PETL-ViT, FacT": (lambda: Factors(), None),
    "NOAH": (lambda: SuperAdapter(), ELSE),
    "CLIP-Adapter": (lambda: ClipAdapter(), ELSE),
    "LaVIN, AdapterMLP": (lambda: LavinMlp(128), "its projections are 32 to 8 and 8 to 128"),
    "DVP, AdapterMLP": (lambda: LavinMlp(64), "its projections are 32 to 8 and 8 to 64"),
    "LaVIN, RepAdapter": (lambda: RepAdapter(), "neither nn.Linear nor a 1 x 1 convolution of one group"),
    "DAS, RepAdapter": (lambda: RepAdapter(groups=4), "neither nn.Linear nor a 1 x 1 convolution of one group"),
    "LaVIN, Router": (lambda: RoutedAdapter(), None),
    "EAS, PIAdapter_FFN": (lambda: RepAdapter(groups=1), "its activation computes the identity"),
    "EAS, PIAdapter_Attn": (lambda: PoolingAdapter(), "what it computes between its projections is not relu"),
    "ST-Adapter": (lambda: SpaceTimeAdapter(), None),
    "LLM-Adapters": (lambda: LinearWithBottleneck(), None),
    "LLaMA-Adapter": (lambda: GatedPrompts(), None),
}


def inputs_of(module, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    count = 2 if "adapter_down" in module._modules and not isinstance(module, BiAdapter) else 1
    return [torch.randn(4, 9, DIM, generator=generator).to(dtype) for _ in range(count)]


def outputs(model, dtype=torch.float32):
    """Of the module, and what it passes back to its parameters."""
    model = copy.deepcopy(model).to(dtype)
    inputs = inputs_of(model[0], dtype)
    if isinstance(model[0], DeltaAdapter):
        if model[0].parallel:
            model[0].pre_forward(inputs[0])
        out = model[0].post_forward(inputs[0])
    else:
        out = model[0](*inputs)
    out = out[0] if isinstance(out, tuple) else out
    out.square().sum().backward()
    return {"out": out.detach()} | {name: p.grad for name, p in model.named_parameters()}


def prepared(make):
    torch.manual_seed(0)
    model = nn.Sequential(make()).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model


def test_the_survey_is_of_59_adapters_of_which_35_are_taken():
    assert (len(TAKEN), len(TAKEN) + len(LEFT_ALONE)) == (35, 59)


@pytest.mark.filterwarnings("ignore:.*CUDA is not available")
@pytest.mark.parametrize("make", TAKEN.values(), ids=TAKEN)
def test_what_has_the_formula_runs_the_kernel(make, no_floors):
    model = prepared(make)
    oracle, theirs = outputs(model, torch.float64), outputs(model)
    report = petl_ext.patch(model).report()
    assert (report.fused, len(report.rows)) == (1, 1)
    with OpsCalled() as called:
        ours = outputs(model)
    assert called.names == ["adapter"]
    for name, tensor in oracle.items():
        for found in (ours, theirs):
            assert (found[name] - tensor).abs().max() <= 2e-5 * tensor.abs().max(), name


@pytest.mark.parametrize(("make", "reason"), LEFT_ALONE.values(), ids=LEFT_ALONE)
def test_what_has_another_formula_is_left_alone_and_says_why(make, reason):
    model = prepared(make)
    recognized = recognize(model[0], {})
    assert recognized is None if reason is None else reason in recognized.reason
    model.append(Adapter(DIM))
    # VL-adapter's layer holds a part that has the formula.
    assert petl_ext.patch(model).report().fused == 1 + isinstance(model[0], VLAdapterLayer)
    assert not kind_of(model[0])
