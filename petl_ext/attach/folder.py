"""A saved attachment: a folder with `petl_config.json` and `petl_weights.safetensors`."""

import json
import os
import tempfile
from pathlib import Path
from typing import NamedTuple

import torch

from petl_ext.attach.config import Config, config_from_dict

FORMAT = 1
CONFIG_FILE = "petl_config.json"
WEIGHTS_FILE = "petl_weights.safetensors"


class Saved(NamedTuple):
    """What a folder holds.

    Attributes:
        family: the model family's name, or None.
        keep: the entries that were given to `attach`.
        tensors: by state-dict name.
    """

    config: Config
    family: str | None
    keep: tuple
    tensors: dict


def write_folder(folder, saved):
    """Writes both files to a place of their own and moves them to the folder when they are complete.

    Other files in an existing folder stay. After an error the folder is as it was.
    """
    from safetensors.torch import save_file

    folder = Path(folder)
    description = {
        "format": FORMAT,
        "family": saved.family,
        "keep": list(saved.keep),
        "config": saved.config.to_dict(),
    }
    # Tensors that share memory, as tied weights do, cannot stand in one safetensors file.
    tensors = {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, tensor in saved.tensors.items()
    }
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".petl-", dir=folder if folder.is_dir() else folder.parent) as scratch:
        complete = Path(scratch) / "complete"
        complete.mkdir()
        save_file(tensors, complete / WEIGHTS_FILE, metadata={"format": "pt"})
        (complete / CONFIG_FILE).write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")
        if not folder.exists():
            complete.rename(folder)
            return
        _replace_files(complete, folder, Path(scratch))


def _replace_files(complete, folder, scratch):
    """Moves the new files in, and the old ones back if that fails halfway."""
    names = (WEIGHTS_FILE, CONFIG_FILE)
    before = [name for name in names if (folder / name).exists()]
    for name in before:
        os.link(folder / name, scratch / name)
    try:
        for name in names:
            os.replace(complete / name, folder / name)
    except BaseException:
        for name in names:
            if name in before:
                os.replace(scratch / name, folder / name)
            else:
                (folder / name).unlink(missing_ok=True)
        raise


def read_folder(folder):
    """What `write_folder` wrote.

    Raises:
        FileNotFoundError: the folder or one of its files is missing.
        ValueError: a file is broken, or of a later format.
    """
    folder = Path(folder)
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder}: expected the files {CONFIG_FILE} and {WEIGHTS_FILE}, found no {name}")
    try:
        description = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
        config, family, keep = _parse(description)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{folder / CONFIG_FILE}: {error}") from error
    return Saved(config, family, keep, _read_tensors(folder / WEIGHTS_FILE))


def _parse(description):
    if not isinstance(description, dict) or not isinstance(description.get("format"), int):
        raise ValueError("expected an object with the key 'format'")
    if description["format"] > FORMAT:
        raise ValueError(f"format {description['format']}, but this petl_ext reads formats up to {FORMAT}")
    expected = ["config", "family", "format", "keep"]
    if sorted(description) != expected:
        raise ValueError(f"expected the keys {expected}, found {sorted(description)}")
    keep = description["keep"]
    if not isinstance(keep, list) or not all(isinstance(entry, str) for entry in keep):
        raise ValueError(f"keep must be a list of names, found {keep!r}")
    return config_from_dict(description["config"]), description["family"], tuple(keep)


def _read_tensors(path):
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path}: not a complete safetensors file: {error}") from error
