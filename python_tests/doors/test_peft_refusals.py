"""What APT as a method of PEFT refuses, and that a refusal changes nothing."""

import importlib
import sys
import warnings
from unittest import mock

import peft
import pytest
import torch
from peft import PeftModel, get_peft_model
from peft_checks import LAYERS, SIZES, make, state
from tiny_families import make_model

from petl_ext.attaching.families import FAMILIES, Family
from petl_ext.peft import APTConfig, APTTunerLayer, load_adapter, save_adapter
from petl_ext.peft.register import register_methods


def test_loading_what_does_not_fit_changes_nothing(tmp_path):
    unet = make_model("unet", 1)
    unet.add_adapter(APTConfig(**SIZES, target_modules=["attn1"]))
    save_adapter(unet, tmp_path / "style")
    save_adapter(unet, tmp_path / "apt")
    with pytest.raises(ValueError, match=r"has no adapter 'other', it has \['default'\]"):
        save_adapter(unet, tmp_path / "other", "other")
    file = tmp_path / "apt" / "adapter_config.json"
    file.write_text(file.read_text(encoding="utf-8").replace('"rank": 2', '"rank": 3'), encoding="utf-8")
    other = make_model("unet", 1)
    before = state(other)
    with pytest.raises(
        ValueError, match=r"adapter_model.safetensors does not fit UNet2DConditionModel in .*petl_apt_down"
    ):
        load_adapter(other, tmp_path / "apt")
    assert state(other) == before and not hasattr(other, "peft_config")
    with pytest.raises(FileNotFoundError, match=r"there is no .*nothing"):
        load_adapter(other, tmp_path / "nothing")
    load_adapter(unet, tmp_path / "style", "second")
    before = state(unet)
    with pytest.raises(ValueError, match="UNet2DConditionModel already has an adapter 'second'"):
        load_adapter(unet, tmp_path / "style", "second")
    assert state(unet) == before


@pytest.mark.parametrize(
    ("family", "name", "changes", "message"),
    [
        ("vilt", "apt", {}, "an adapter cannot be named 'apt'"),
        ("vilt", "petl_apt_", {}, "an adapter cannot be named 'petl_apt_'"),
        ("vilt", "a.b", {}, "an adapter cannot be named 'a.b'"),
        ("vilt", "keys", {}, "an adapter cannot be named 'keys'"),
        ("vilt", "new", {"target_modules": ["nothing"]}, r"\{'nothing'\} (not found in|match nothing in)"),
        ("vilt", "new", {"target_modules": ["dense"]}, "dense is a Linear that is none of them"),
        ("vilt", "new", {"target_modules": ["output"]}, "layer.0.output is a ViltOutput that is none of them"),
        (
            "vilt",
            "new",
            {"exclude_modules": ["output"]},
            "No modules were targeted|match nothing in Vilt",
        ),
        ("llama", "new", {"target_modules": ["mlp"]}, "mlp is a LlamaMLP that is none of them"),
        ("meter", "new", {"layers_to_transform": [0]}, "with layers_to_transform give target_modules"),
    ],
)
def test_refusals_change_nothing(family, name, changes, message):
    for model in (make_model(family, LAYERS), make(family)):
        before = state(model)
        with pytest.raises(ValueError, match=message):
            add(model, APTConfig(**SIZES, **changes), name)
        assert state(model) == before


def add(model, config, name):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Adapter name .* should not be contained in the prefix")
        if isinstance(model, PeftModel):
            return model.add_adapter(name, config)
        return get_peft_model(model, config, adapter_name=name)


def test_a_model_of_no_family_needs_targets():
    model = torch.nn.Sequential(torch.nn.Linear(4, 4))
    with pytest.raises(ValueError, match=r"Sequential belongs to none of the families with default targets; give"):
        get_peft_model(model, APTConfig(**SIZES))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_prompts": 0}, "num_prompts must be a positive integer, got 0"),
        ({"activation": "gelu"}, "activation must be"),
        ({"dropout": 1}, "dropout must lie in"),
        ({"target_modules": ".*output", "layers_to_transform": [0]}, "layers_to_transform needs target_modules"),
        ({"layers_pattern": "layer"}, "layers_pattern has no meaning without layers_to_transform"),
    ],
)
def test_a_wrong_configuration(changes, message):
    with pytest.raises(ValueError, match=message):
        APTConfig(**changes)


def test_merging_is_refused():
    model = make()
    before = state(model)
    layer = next(module for module in model.modules() if isinstance(module, APTTunerLayer))
    for merge in (model.merge_and_unload, model.merge_adapter, model.unmerge_adapter, layer.merge, layer.unmerge):
        with pytest.raises(NotImplementedError, match=r"APT cannot be merged .* depend on the input"):
            merge()
    assert state(model) == before


def test_default_targets_of_a_family_may_be_several_patterns():
    family = Family("llama", {"apt": (r"layers\.2\.self_attn", r"layers\.0\.self_attn")})
    with mock.patch.dict(FAMILIES, {"llama": family}):
        tuned = get_peft_model(make_model("llama", 3), APTConfig(**SIZES))
    carrying = {name[-len("0.self_attn") :] for name, m in tuned.named_modules() if isinstance(m, APTTunerLayer)}
    assert carrying == {"0.self_attn", "2.self_attn"}


def test_registration_says_what_is_wrong(monkeypatch):
    with pytest.raises(
        ImportError, match=r"cannot add its methods to peft .*: .*already PEFT method called 'petl_apt'"
    ):
        register_methods()
    monkeypatch.setattr(peft, "__version__", "0.18.1")
    with pytest.raises(ImportError, match=r"needs peft 0\.19 or later, got 0\.18\.1"):
        register_methods()
    monkeypatch.setitem(sys.modules, "peft", None)
    monkeypatch.delitem(sys.modules, "petl_ext.peft")
    with pytest.raises(ImportError, match=r"petl_ext\.peft needs peft: pip install peft"):
        importlib.import_module("petl_ext.peft")
