"""What a saved attachment says in its folder."""

import json
import subprocess
import sys
from typing import NamedTuple

from petl_ext.attaching.methods import config_from_dict
from petl_ext.attaching.methods.config import Config
from petl_ext.attaching.patterns import whole_name
from petl_ext.saving import check_keys, check_sizes, read_files, write_files


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
    check_sizes(vars(config), tensors, folder)
    return Saved(config, family, keep, tensors)


def check_same(saved, config, keep, folder):
    """Raises a ValueError if a `Saved` of that folder is not of this configuration and these entries of `keep`."""
    for what, ours, theirs in (("config", config, saved.config), ("keep", keep, saved.keep)):
        if ours != theirs:
            raise ValueError(f"{folder} must hold the {what} that is attached, {ours}, got {theirs}")


def _parse(description):
    if "model" in description:
        raise ValueError(f"saved by {description['model']}.save, which {description['model']}.load reads")
    check_keys(description, ["config", "family", "keep"])
    keep = description["keep"]
    if not isinstance(keep, list) or not all(isinstance(entry, str) for entry in keep):
        raise ValueError(f"keep must be a list of names, got {keep!r}")
    return config_from_dict(description["config"]), description["family"], tuple(keep)


# Seconds for regular expressions of a file on all names of a model.
PATIENCE = 5
MATCH_ALL = """
import json, re, sys
patterns, names = json.load(sys.stdin)
for pattern in patterns:
    compiled = re.compile(pattern)
    for name in names:
        compiled.fullmatch(name)
"""


def check_duration(patterns, names, folder):
    """Matches regular expressions of a file in another process: one can run for ages, and nothing can stop it in this.

    Raises:
        ValueError: they take too long on these names.
    """
    # A single repetition beside that in front of every pattern is no danger.
    suspicious = [pattern for pattern in patterns if sum(map(pattern.count, "*+{")) > 1]
    if not suspicious:
        return
    command = [sys.executable, "-I", "-S", "-c", MATCH_ALL]
    given = json.dumps([[whole_name(pattern) for pattern in suspicious], names])
    try:
        subprocess.run(command, input=given, text=True, timeout=PATIENCE, check=True, stderr=subprocess.PIPE)
    except subprocess.TimeoutExpired as error:
        raise ValueError(
            f"{folder}: matching the regular expressions {suspicious} takes more than {PATIENCE} seconds"
        ) from error
