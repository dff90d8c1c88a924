"""`attach` puts a method's layers into a model, `load` fills a model from a saved folder."""

import sys
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from petl_ext.attaching.families import family_of
from petl_ext.attaching.handle import Attachment
from petl_ext.attaching.methods import CONFIGS
from petl_ext.attaching.methods.config import Config
from petl_ext.attaching.methods.das import DASConfig
from petl_ext.attaching.saved import check_duration, read_folder
from petl_ext.attaching.selection import select
from petl_ext.attaching.sites.site import Site
from petl_ext.attaching.skipping import SkippingAttachment
from petl_ext.composing import HANDLE, unchanged_on_error


def attach(model: nn.Module, config: Config, keep: Iterable[str] = ()) -> Attachment:
    """Puts the method's new layers into `model` and freezes everything but them and what `keep` names.

    The layers are made on the device and in the dtype of the module that they join. A model carries one attachment at
    a time; it is also at hand as `model.petl_attachment`, in copies and unpickled models too.

    Attach after `from_pretrained`, which knows nothing of the layers, and before DistributedDataParallel, `fully_shard`
    or `torch.compile`. Reentrant gradient checkpointing needs inputs that require gradients; transformers'
    `gradient_checkpointing_enable` sees to that.

    Args:
        model: any nn.Module. One of a family of families.py, unless `config.sites` says where.
        config: an `APTConfig`, `AdapterConfig`, `DASConfig`, `DeepPromptConfig`, `ClassTokenConfig`,
            `ClassifierOnlyConfig` or `FullTuningConfig`.
        keep: names of the model's own modules or parameters that stay trainable, or parts of such names between
            dots: ["classifier", "vilt.pooler"].

    Returns:
        The `Attachment`; of a `DASConfig` a `SkippingAttachment`.

    Raises:
        TypeError: model, config or keep is of the wrong type.
        ValueError: something matches nothing, a module there cannot carry a layer, nothing would train, or layers are
            there already. The model has not changed.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"attach: model must be a torch.nn.Module, got {type(model).__name__}")
    if type(config) not in CONFIGS.values():
        known = ", ".join(known.__name__ for known in CONFIGS.values())
        raise TypeError(f"attach: config must be one of {known}, got {config!r}")
    if not isinstance(keep, list | tuple) or not all(isinstance(entry, str) for entry in keep):
        raise TypeError(f"attach: keep must be a list of names, got {keep!r}")
    _check_free(model)
    return _attached(model, config, family_of(model), tuple(keep))


def load(model: nn.Module, folder: str | Path) -> Attachment:
    """Fills `model` with what `Attachment.save` wrote, attaching first if nothing is attached yet.

    A tensor saved in another floating-point dtype is converted to the model's; that is logged.

    Returns:
        The model's `Attachment`.

    Raises:
        FileNotFoundError: the folder or one of its files is missing.
        ValueError: a file is broken or does not fit the model or what is attached to it. The model has not changed.
    """
    saved = read_folder(folder)
    attachment = getattr(model, HANDLE, None)
    family = family_of(model) if attachment is None else attachment.family
    if saved.family != family.name:
        raise ValueError(
            f"{folder}: saved from a model of the family {saved.family!r}, "
            f"but {type(model).__name__} is of {family.name!r}"
        )
    if attachment is not None:
        attachment.take_over(saved, folder)
        return attachment
    check_duration(saved.config.sites or (), [name for name, _ in model.named_modules()], folder)
    _check_free(model)
    with unchanged_on_error(model):
        attachment = _attached(model, saved.config, family, saved.keep)
        attachment.fill(saved.tensors, folder)
    return attachment


def new_layers(model, config, places):
    """{place: the layer that `config` puts there}."""
    # Parameters made in inference mode could never train.
    with torch.inference_mode(False):
        return {place: place.site_class.new_layer(config, model, place) for place in places}


def _attached(model, config, family, keep):
    selection = select(model, config, family, keep)
    layers = new_layers(model, config, selection.places)
    handle = SkippingAttachment if isinstance(config, DASConfig) else Attachment
    with unchanged_on_error(model):
        return handle(model, config, selection, layers)


def _check_free(model):
    if isinstance(model, DataParallel | DistributedDataParallel):
        raise ValueError(f"attach: got a {type(model).__name__}; attach to the model first, then wrap it")
    # Slow to import: where nobody has, nothing is compiled or sharded.
    compiler = sys.modules.get("torch._dynamo.eval_frame")
    if compiler and isinstance(model, compiler.OptimizedModule):
        raise ValueError("attach: got an OptimizedModule; attach to the model first, then compile it")
    fsdp = sys.modules.get("torch.distributed.fsdp")
    sharding = (fsdp.FSDPModule, fsdp.FullyShardedDataParallel) if fsdp else ()
    for name, module in model.named_modules():
        if isinstance(module, sharding):
            raise ValueError(f"attach: {name or 'the model'} is sharded; attach to the model first, then shard it")
        if HANDLE in vars(module):
            raise ValueError(
                f"attach: {getattr(module, HANDLE).config} is already attached to {name or 'the model'}; "
                "detach() it first"
            )
    for name, module in model.named_modules():
        if isinstance(module, Site) and module.child in module._modules:
            raise ValueError(
                f"attach: {name or 'the model'} carries {module.child!r} of what is attached to a model around "
                f"{type(model).__name__}; detach() that first"
            )
