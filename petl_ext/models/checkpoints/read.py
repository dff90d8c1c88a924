"""Reads the tensors of a checkpoint without running anything that it holds."""

import os
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch

from petl_ext.saving import read_tensors

# Older versions of Lightning use the class of a callback as the key of what the file holds of it. It is read as the
# inert `LightningClass`.
LIGHTNING_CLASSES = ("pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint",)


class LightningClass:
    """Stands for a class of the framework that wrote a file. Does nothing."""


class Checkpoint(NamedTuple):
    """What `read` returns.

    Attributes:
        name: the file, or what stands for it in messages.
        tensors: by their keys.
        ignored: the keys that the user does not want.
    """

    name: str
    tensors: dict
    ignored: frozenset = frozenset()

    def wanted(self, key):
        """The tensor of that key; None where there is none or it is ignored."""
        return None if key in self.ignored else self.tensors.get(key)


def read(source):
    """The `Checkpoint` of a file, or of a state dict in memory.

    Raises:
        TypeError: source is neither a path nor a mapping.
        FileNotFoundError: there is no such file.
        ValueError: the file is broken or holds more than data, or something in it is no tensor with a name.
    """
    if isinstance(source, Mapping):
        return _checkpoint("the state dict", source)
    if not isinstance(source, str | os.PathLike):
        raise TypeError(f"checkpoint must be a path or a state dict, got {type(source).__name__}")
    path = Path(source)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: there is no such file")
    return _checkpoint(str(path), _content(path))


def _checkpoint(name, content):
    tensors = content.get("state_dict", content) if isinstance(content, Mapping) else content
    if not isinstance(tensors, Mapping):
        raise ValueError(f"{name} must be a state dict, by itself or under 'state_dict', got {type(tensors).__name__}")
    for key, value in tensors.items():
        if not isinstance(key, str) or not isinstance(value, torch.Tensor):
            raise ValueError(
                f"{name} must be a Lightning checkpoint with 'state_dict', or tensors by name, got "
                f"{type(value).__name__} under {key!r}"
            )
    return Checkpoint(name, {key: tensor.detach() for key, tensor in tensors.items()})


def _content(path):
    """What safetensors or torch.save has written; the file's first bytes tell which of the two."""
    with path.open("rb") as file:
        start = file.read(9)
        file.seek(0)
        if not start:
            raise ValueError(f"{path} is an empty file")
        if start[8:] == b"{":  # behind the length of the header, which is JSON
            return read_tensors(path)
        if not start.startswith((b"PK", b"\x80")):  # a zip archive, or a pickle as older versions of torch wrote it
            raise ValueError(f"{path} is neither of torch.save nor of safetensors: it begins with {start!r}")
        return _unpickled(path, file)


def _unpickled(path, file):
    inert = torch.serialization.safe_globals([(LightningClass, name) for name in LIGHTNING_CLASSES])
    try:
        with inert:
            return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(_refusal(path, error)) from error
    except Exception as error:  # there is no telling what a broken file raises
        detail = f"{type(error).__name__}: {_first_line(error)}"
        raise ValueError(f"{path} is no checkpoint, or not a whole one ({detail})") from error


def _refusal(path, error):
    unsafe = re.search(r"GLOBAL (\S+)", str(error))
    if unsafe is None:
        detail = str(error).rpartition("WeightsUnpickler error: ")[2]
        return f"{path} is no checkpoint, is broken, or holds more than data: {_first_line(detail)}"
    return (
        f"{path} is refused: it holds {unsafe[1]}, and reading that could run code. If you trust the file, read it "
        "where nothing is at risk and where the code that wrote it is installed, and keep only the weights: "
        'torch.save({"state_dict": torch.load(path, weights_only=False)["state_dict"]}, new_path)'
    )


def _first_line(text):
    return str(text).strip().partition("\n")[0]
