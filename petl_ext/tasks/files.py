"""Reading official files with errors that name the file and the entry, and writing files whole."""

import codecs
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from petl_ext.saving import written_whole


def read_json(path: str | Path, object_pairs_hook: Callable[[list], Any] | None = None) -> Any:
    """The content of a JSON file; `object_pairs_hook` is json's.

    Raises ValueError naming the file if it is cut off or begins with a byte-order mark.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"), object_pairs_hook=object_pairs_hook)
    except ValueError as error:
        raise ValueError(f"{path} must be a JSON file, got one that does not parse: {error}") from error


def once_each(pairs: list[tuple[str, Any]]) -> dict:
    """An `object_pairs_hook` that refuses an object with a key that comes twice, of which json would keep the last."""
    content = dict(pairs)
    if len(content) < len(pairs):
        twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"an object has the key {twice!r} twice")
    return content


def read_json_lines(path: str | Path) -> Iterator[tuple[str, Any]]:
    """The value on each line of a file, with the words that name the line in an error.

    Raises ValueError naming file and line if a line does not parse, an empty one too, or the file begins with a
    byte-order mark; FileNotFoundError if there is no such file.
    """
    with Path(path).open("rb") as file:
        for number, line in enumerate(file, start=1):
            where = f"{path}: line {number}"
            refuse_byte_order_mark(line, where)
            try:
                yield where, json.loads(line)
            except ValueError as error:
                raise ValueError(f"{where} must be a JSON object, got a line that does not parse: {error}") from error


def refuse_byte_order_mark(line: bytes, where: str) -> None:
    """Raises ValueError if a line begins with one, which would become part of its first word."""
    if line.startswith(codecs.BOM_UTF8):
        raise ValueError(f"{where} must be UTF-8 without a byte-order mark, got one at its start")


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


def write_text(path: str | Path, text: str) -> None:
    """Writes the file whole; after an error it is as it was."""
    with written_whole(path) as unfinished:
        unfinished.write_text(text, encoding="utf-8", newline="")


def write_json(path: str | Path, content: Any) -> None:
    """Writes the file whole; after an error it is as it was."""
    write_text(path, json.dumps(content))
