"""What a saved attachment says in its folder."""

from typing import NamedTuple

from petl_ext.attach.config import Config, config_from_dict
from petl_ext.folder import check_keys, read_files, write_files


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
    """Writes a `Saved`; after an error the folder is as it was."""
    description = {"family": saved.family, "keep": list(saved.keep), "config": saved.config.to_dict()}
    write_files(folder, description, saved.tensors)


def read_folder(folder):
    """What `write_folder` wrote.

    Raises:
        FileNotFoundError: the folder or one of its files is missing.
        ValueError: a file is broken, or of a later format.
    """
    (config, family, keep), tensors = read_files(folder, _parse)
    return Saved(config, family, keep, tensors)


def _parse(description):
    check_keys(description, ["config", "family", "keep"])
    keep = description["keep"]
    if not isinstance(keep, list) or not all(isinstance(entry, str) for entry in keep):
        raise ValueError(f"keep must be a list of names, found {keep!r}")
    return config_from_dict(description["config"]), description["family"], tuple(keep)
