"""Reads the tensors of a checkpoint without running anything that it holds."""

import pickle
import re

import torch

# Older versions of Lightning use the class of a callback as the key of what the file holds of it. It is read as the
# inert `LightningClass`.
LIGHTNING_CLASSES = ("pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint",)


class LightningClass:
    """Stands for a class of the framework that wrote a file. Does nothing."""


def read(path):
    """{key: tensor} of the file."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: there is no such file")
    inert = torch.serialization.safe_globals([(LightningClass, name) for name in LIGHTNING_CLASSES])
    with path.open("rb") as file, inert:
        content = _unpickled(path, file)
    tensors = content.get("state_dict", content) if isinstance(content, dict) else content
    if not isinstance(tensors, dict):
        raise ValueError(
            f"{path}: expected a state dict, by itself or under 'state_dict', got {type(tensors).__name__}"
        )
    for key, value in tensors.items():
        if not isinstance(key, str) or not isinstance(value, torch.Tensor):
            raise ValueError(
                f"{path}: expected a Lightning checkpoint with 'state_dict', or tensors by name; {key!r} holds "
                f"{type(value).__name__}"
            )
    return tensors


def _unpickled(path, file):
    _check_format(path, file)
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(_refusal(path, error)) from error
    except Exception as error:  # there is no telling what a broken file raises
        detail = f"{type(error).__name__}: {_first_line(error)}"
        raise ValueError(f"{path} is no checkpoint, or not a whole one ({detail})") from error


def _check_format(path, file):
    """By the file's first bytes; afterwards it stands at its start again."""
    start = file.read(9)
    file.seek(0)
    if not start:
        raise ValueError(f"{path} is an empty file")
    # The length of the header, which is JSON.
    if start[8:] == b"{" and int.from_bytes(start[:8], "little") < path.stat().st_size:
        raise ValueError(
            f"{path} is a safetensors file, not one of torch.save: use from_pretrained for a Hugging Face model; if "
            "its tensors have the original names, torch.save(safetensors.torch.load_file(path), new_path) converts it"
        )
    if not start.startswith((b"PK", b"\x80")):  # a zip archive, or a pickle as older versions of torch wrote it
        raise ValueError(f"{path} is no file of torch.save: it begins with {start!r}")


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
