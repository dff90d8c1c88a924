"""Reading official files with errors that name the file and the entry, and writing files whole."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from petl_ext.saving import written_whole


def read_json(path: str | Path, object_pairs_hook: Callable[[list], Any] | None = None) -> Any:
    """The content of a JSON file; `object_pairs_hook` is json's. Raises ValueError naming the file if it is cut off."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"), object_pairs_hook=object_pairs_hook)
    except ValueError as error:
        raise ValueError(f"{path} must be a JSON file, got one that does not parse: {error}") from error


def pick(entry: Any, fields: Mapping[str, type], where: str) -> dict:
    """The `fields` of `entry`. Raises ValueError, beginning with `where`, if one is missing or of another type."""
    if not isinstance(entry, dict):
        raise ValueError(f"{where} must be a JSON object, got {entry!r}")
    for name, wanted in fields.items():
        if name not in entry:
            raise ValueError(f"{where} must have the field '{name}', got only {sorted(entry)}")
        if not isinstance(entry[name], wanted) or isinstance(entry[name], bool):
            raise ValueError(f"{where}: '{name}' must be {wanted.__name__}, got {entry[name]!r}")
    return {name: entry[name] for name in fields}


def write_json(path: str | Path, content: Any) -> None:
    """Writes the file whole; after an error it is as it was."""
    text = json.dumps(content)
    with written_whole(path) as unfinished:
        unfinished.write_text(text, encoding="utf-8")
