"""A saved folder, `petl_config.json` and `petl_weights.safetensors`: written whole or not at all, read strictly."""

import json
import logging
import os
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist

logger = logging.getLogger("petl_ext")

FORMAT = 1
CONFIG_FILE = "petl_config.json"
WEIGHTS_FILE = "petl_weights.safetensors"
LISTED = 8


def write_files(folder, description, tensors):
    """Writes both files to a place of their own and moves them to the folder when they are complete.

    Other files in an existing folder stay. After an error the folder is as it was. Where tensors are spread over
    several processes, all must call this: the first writes, and the others return when it has.

    Args:
        description: what the configuration file says, without its format.
        tensors: by state-dict name.
    """
    folder, description = Path(folder), {"format": FORMAT, **description}
    spread = any(_is_spread(tensor) for tensor in tensors.values())
    # Tensors that share memory, as tied weights do, cannot stand in one safetensors file.
    tensors = {
        name: _whole(tensor.detach()).cpu().clone(memory_format=torch.contiguous_format)
        for name, tensor in tensors.items()
    }
    try:
        if not spread or dist.get_rank() == 0:
            _write(folder, description, tensors)
    finally:
        if spread:
            dist.barrier()


def _write(folder, description, tensors):
    from safetensors.torch import save_file

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


def read_files(folder, parse):
    """What `write_files` wrote, as (what `parse` makes of the description, tensors).

    Args:
        parse: gets the configuration file's object without its format; TypeErrors and ValueErrors it raises name the
            file.

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
        parsed = parse(_without_format(description))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{folder / CONFIG_FILE}: {error}") from error
    return parsed, _read_tensors(folder / WEIGHTS_FILE)


def check_keys(description, expected):
    """Raises a ValueError unless the description has exactly these keys."""
    if sorted(description) != sorted(expected):
        raise ValueError(f"expected the keys {sorted(expected)}, found {sorted(description)}")


def fill(ours, theirs, folder):
    """Copies the tensors `theirs`, read from `folder`, into those of the same names in `ours`.

    A tensor of another floating-point dtype is converted; that is logged.

    Raises:
        ValueError: names, shapes or kinds differ. Nothing has been copied.
    """
    _check_fit(ours, theirs, folder)
    converted = sorted({f"{theirs[n].dtype} to {t.dtype}" for n, t in ours.items() if theirs[n].dtype != t.dtype})
    if converted:
        logger.warning("%s: converted from %s", folder, ", ".join(converted))
    with torch.no_grad():
        for name, tensor in ours.items():
            tensor.copy_(_spread_like(tensor, theirs[name]))


def _is_spread(tensor):
    """Whether it is a DTensor, whose module takes as long to import as half of torch."""
    return hasattr(tensor, "full_tensor")


def _whole(tensor):
    return tensor.full_tensor() if _is_spread(tensor) else tensor


def _spread_like(ours, theirs):
    """`theirs`, which every process has read, distributed over the processes as `ours` is."""
    if not _is_spread(ours):
        return theirs
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(theirs.to(ours.device), ours.device_mesh, ours.placements, src_data_rank=None)


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


def _without_format(description):
    if not isinstance(description, dict) or not isinstance(description.get("format"), int):
        raise ValueError("expected an object with the key 'format'")
    if description["format"] > FORMAT:
        raise ValueError(f"format {description['format']}, but this petl_ext reads formats up to {FORMAT}")
    return {key: value for key, value in description.items() if key != "format"}


def _read_tensors(path):
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path}: not a complete safetensors file: {error}") from error


def _check_fit(expected, found, folder):
    problems = [f"{name}: missing" for name in expected if name not in found]
    problems += [f"{name}: unexpected" for name in found if name not in expected]
    for name in expected.keys() & found.keys():
        ours, theirs = expected[name], found[name]
        if ours.shape != theirs.shape:
            problems.append(f"{name}: expected the shape {tuple(ours.shape)}, found {tuple(theirs.shape)}")
        elif ours.is_floating_point() != theirs.is_floating_point():
            problems.append(f"{name}: expected {ours.dtype}, found {theirs.dtype}")
    if problems:
        shown = "; ".join(sorted(problems)[:LISTED])
        raise ValueError(f"{folder} does not fit the model, {len(problems)} differences: {shown}")
