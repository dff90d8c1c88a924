"""Files that appear whole or not at all, and a saved folder, `petl_config.json` and `petl_weights.safetensors`.

Both files hold one number, drawn for each save, so that a folder in which a killed process has replaced one of the two
is refused.
"""

import json
import logging
import os
import platform
import reprlib
import secrets
import shutil
import tempfile
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist

from petl_ext.printing import listed

logger = logging.getLogger("petl_ext")

FORMAT = 1
CONFIG_FILE = "petl_config.json"
WEIGHTS_FILE = "petl_weights.safetensors"
SAVE = "save"
HARMLESS_SIZE = 1024


@contextmanager
def written_whole(path):
    """A path to write a file or a new folder to, which takes the place of `path` when the block ends, and is gone if it
    raises."""
    path = Path(path)
    _clear_leftovers(path.parent, ".unfinished-", f"-{path.name}")
    unfinished = path.with_name(f".unfinished-{_writer()}-{path.name}")  # the end stays: it may name the format
    try:
        yield unfinished
        os.replace(unfinished, path)
    finally:
        _remove(unfinished)


def _remove(path):
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _writer():
    return f"{platform.node()}-{os.getpid()}"


def _clear_leftovers(parent, prefix, end=""):
    """Removes what processes of this machine that no longer run have left unfinished; another may be at work."""
    of_this_machine = f"{prefix}{platform.node()}-"
    for path in parent.iterdir() if parent.is_dir() else ():
        process = path.name.removeprefix(of_this_machine).partition("-")[0]
        if path.name.startswith(of_this_machine) and path.name.endswith(end) and not _runs(process):
            _remove(path)


def _runs(process):
    if os.name == "nt" or not process.isdecimal():  # on Windows the question would end it
        return True
    try:
        os.kill(int(process), 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass
    return True


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
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    folder.parent.mkdir(parents=True, exist_ok=True)
    parent = folder if folder.is_dir() else folder.parent
    prefix = f".petl-{folder.name}-"
    _clear_leftovers(parent, prefix)
    with tempfile.TemporaryDirectory(prefix=f"{prefix}{_writer()}-", dir=parent) as scratch:
        complete = Path(scratch) / "complete"
        complete.mkdir()
        weights = complete / WEIGHTS_FILE
        weights.touch()  # so that the mode is what the umask says, not what safetensors would choose
        mode, save = weights.stat().st_mode, secrets.token_hex(16)
        try:
            save_file(tensors, weights, metadata={"format": "pt", SAVE: save})
        except SafetensorError as error:
            raise OSError(f"{folder / WEIGHTS_FILE}: {error}") from error
        weights.chmod(mode)
        description = {**description, SAVE: save}
        (complete / CONFIG_FILE).write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")
        if not folder.exists():
            complete.rename(folder)
            return
        _replace_files(complete, folder, Path(scratch))


def _save_of(weights):
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(weights, "pt") as file:
            return (file.metadata() or {}).get(SAVE)
    except SafetensorError as error:
        raise ValueError(f"{weights}: not a complete safetensors file: {error}") from error


def read_files(folder, parse):
    """What `write_files` wrote, as (what `parse` makes of the description, tensors).

    Args:
        parse: gets the configuration file's object without its format; TypeErrors and ValueErrors it raises name the
            file.

    Raises:
        FileNotFoundError: the folder or one of its files is missing.
        ValueError: a file is broken or of a later format, or the two are not of one save.
    """
    folder = Path(folder)
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder} must hold the files {CONFIG_FILE} and {WEIGHTS_FILE}, got no {name}")
    try:
        description = _without_format(json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8")))
        save = description.pop(SAVE, None)
        parsed = parse(description)
    except RecursionError as error:
        raise ValueError(f"{folder / CONFIG_FILE}: nested too deeply") from error
    except (OverflowError, TypeError, ValueError) as error:
        raise ValueError(f"{folder / CONFIG_FILE}: {error}") from error
    of_weights = _save_of(folder / WEIGHTS_FILE)
    if save != of_weights and None not in (save, of_weights):  # files of others, and older ones, have none
        raise ValueError(
            f"{folder}: {WEIGHTS_FILE} is not the file that {CONFIG_FILE} was written with; a save was interrupted"
            + "".join(f", and its configuration is {path}" for path in folder.glob(f".petl-*/complete/{CONFIG_FILE}"))
        )
    return parsed, read_tensors(folder / WEIGHTS_FILE)


def check_keys(description, expected, optional=()):
    """Raises a ValueError unless the description has these keys, perhaps without optional ones, and no others."""
    if not set(expected) - set(optional) <= set(description) <= set(expected):
        raise ValueError(f"the keys must be {sorted(expected)}, got {sorted(description)}")


def check_sizes(options, tensors, folder):
    """Raises a ValueError for a size that is far from every saved tensor's, before anything of that size is made."""
    largest = max((side for tensor in tensors.values() for side in tensor.shape), default=0)
    for name, value in options.items():
        if type(value) is int and value > max(largest, HARMLESS_SIZE):
            raise ValueError(
                f"{Path(folder) / CONFIG_FILE}: {name} is {_shortened(value)}, but no saved tensor has a side longer "
                f"than {largest}"
            )


def _shortened(number):
    return str(number) if number < 10**20 else "a number of more than 20 digits"


def fill(ours, theirs, folder):
    """Copies the tensors `theirs`, read from `folder`, into those of the same names in `ours`.

    A tensor of another floating-point dtype is converted; that is logged, and which hold NaN or infinity.

    Raises:
        ValueError: names or shapes differ, or one of two tensors is floating-point and the other is not. Nothing has
            been copied.
    """
    _check_fit(ours, theirs, folder)
    converted = sorted({f"{theirs[n].dtype} to {t.dtype}" for n, t in ours.items() if theirs[n].dtype != t.dtype})
    if converted:
        logger.warning("%s: converted from %s", folder, ", ".join(converted))
    broken = [name for name, tensor in theirs.items() if tensor.is_floating_point() and not tensor.isfinite().all()]
    if broken:
        logger.warning("%s: %d tensors hold NaN or infinity, such as %s", folder, len(broken), broken[0])
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
    before = [name for name in names if (folder / name).exists()]  # copied: not every file system has hard links
    for name in before:
        shutil.copy2(folder / name, scratch / name)
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
        raise ValueError(f"it must be an object with the key 'format', got {reprlib.repr(description)}")
    if description["format"] > FORMAT:
        raise ValueError(f"format {description['format']}, but this petl_ext reads formats up to {FORMAT}")
    return {key: value for key, value in description.items() if key != "format"}


def read_tensors(path):
    """{name: tensor} of a safetensors file.

    Raises:
        ValueError: it is broken.
    """
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
            problems.append(f"{name} must have the shape {tuple(ours.shape)}, got {tuple(theirs.shape)}")
        elif ours.is_floating_point() != theirs.is_floating_point():
            problems.append(f"{name} must be {ours.dtype}, got {theirs.dtype}")
    if problems:
        raise ValueError(
            f"{folder} does not fit the model, {len(problems)} differences: {listed(sorted(problems), '; ')}"
        )
