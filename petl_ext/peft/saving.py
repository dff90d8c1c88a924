"""Saves and loads adapters of models that are no PeftModel."""

import dataclasses
from pathlib import Path

import safetensors.torch
from peft import PeftConfig, get_peft_model_state_dict, inject_adapter_in_model, set_peft_model_state_dict
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from torch import nn

from petl_ext.composing import unchanged_on_error
from petl_ext.peft.layer import AdapterTunerLayer, APTTunerLayer

PREFIXES = (APTTunerLayer.petl_prefix, AdapterTunerLayer.petl_prefix)
PEFT_MODEL = "base_model.model."  # what a PeftModel's state-dict names begin with, and so those of its files


def save_adapter(model: nn.Module, folder: str | Path, adapter_name: str = "default") -> None:
    """Writes an adapter of a model that is no PeftModel, such as a UNet after `add_adapter`, as a PeftModel would.

    `load_adapter`, `PeftModel.from_pretrained` and transformers' `load_adapter` read the folder.

    Raises:
        ValueError: the model has no such adapter.
    """
    configs = getattr(model, "peft_config", {})
    if adapter_name not in configs:
        raise ValueError(
            f"save_adapter: {type(model).__name__} has no adapter {adapter_name!r}, it has {list(configs)}"
        )
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {PEFT_MODEL + _plain(name): t.contiguous() for name, t in _tensors(model, adapter_name).items()}
    safetensors.torch.save_file(tensors, folder / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
    dataclasses.replace(configs[adapter_name], inference_mode=True).save_pretrained(folder)


def load_adapter(
    model: nn.Module, folder: str | Path, adapter_name: str = "default", is_trainable: bool = False
) -> None:
    """Adds to a model that is no PeftModel, such as a UNet, an adapter that PEFT or `save_adapter` wrote.

    It becomes the active one of its method; adapters of other methods stay as they are.

    Args:
        is_trainable: whether the adapter's parameters train.

    Raises:
        FileNotFoundError: the folder holds no adapter.
        ValueError: the model has an adapter of this name, or the folder's does not fit it. The model has not changed.
    """
    file = Path(folder) / SAFETENSORS_WEIGHTS_NAME
    if not file.exists():
        raise FileNotFoundError(f"load_adapter: there is no {file}")
    if adapter_name in getattr(model, "peft_config", {}):
        raise ValueError(f"load_adapter: {type(model).__name__} already has an adapter {adapter_name!r}")
    config = PeftConfig.from_pretrained(folder)
    config.inference_mode = not is_trainable
    tensors = safetensors.torch.load_file(file)
    with unchanged_on_error(model):
        inject_adapter_in_model(config, model, adapter_name)
        expected = _tensors(model, adapter_name)
        different = _shapes(expected) ^ _shapes(tensors)
        if different:
            names = sorted({name for name, _ in different})
            raise ValueError(f"load_adapter: {file} does not fit {type(model).__name__} in {names}")
        tensors = {_plain(name): tensor for name, tensor in tensors.items()}
        set_peft_model_state_dict(model, {name: tensors[_plain(name)] for name in expected}, adapter_name)
        if hasattr(model, "_hf_peft_config_loaded"):  # without it the model's own methods find no adapter
            model._hf_peft_config_loaded = True


def _tensors(model, adapter_name):
    """{name: tensor} of all that is saved; the names do not hold the adapter's."""
    tensors = get_peft_model_state_dict(model, adapter_name=adapter_name)
    # PEFT 0.19 leaves other adapters' tensors in, whose names end in the adapter's.
    return {
        name: tensor
        for name, tensor in tensors.items()
        if not (any(prefix in name for prefix in PREFIXES) and name.rpartition(".")[2] in model.peft_config)
    }


def _shapes(tensors):
    return {(_plain(name), tensor.shape) for name, tensor in tensors.items()}


def _plain(name):
    """The name in a model that carries this adapter alone: a target of another method around it adds to the name."""
    return name.removeprefix(PEFT_MODEL).replace(".base_layer.", ".")
