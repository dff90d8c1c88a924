"""YAML whose every key knows its line, and dataclasses filled from it: what is wrong is refused with file and line."""

import dataclasses
import difflib
import re
import types
import typing
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import yaml

KeyPath = tuple[str | int, ...]


class _Loader(yaml.SafeLoader):
    """PyYAML's, to which 5e-4 is a number too."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


class Document:
    """Plain values, and where in which file each of them stands.

    Attributes:
        values: dicts, lists, strings, numbers, switches and None.
        lines: {path of keys: the words that name it in an error}.
    """

    def __init__(self, values: dict[str, Any], lines: dict[KeyPath, str]):
        self.values, self.lines = values, lines

    def where(self, path: KeyPath) -> str:
        """The words that name a key in an error; of what stands nowhere, those of what it would stand in."""
        shown = ".".join(map(str, path))
        while path not in self.lines:
            path = path[:-1]
        return f"{self.lines[path]}: {shown}" if shown else self.lines[path]

    def over(self, base: "Document") -> "Document":
        """This document with the sections of `base` that it lacks."""
        kept = {path: words for path, words in base.lines.items() if path and path[0] not in self.values}
        return Document(base.values | self.values, kept | self.lines)

    def set(self, setting: str) -> None:
        """Changes what "key.of.keys=value" names, the value being YAML. Raises ValueError if it is no such text, or
        goes into what holds no keys."""
        key, equals, text = setting.partition("=")
        where = f"--set {key}"
        if not equals or not key:
            raise ValueError(f"--set must be key=value, got {setting!r}")
        given = _parsed(text or "null", where, lambda _: where)
        path, holder = (), self.values
        *parents, last = (int(part) if part.isdecimal() else part for part in key.split("."))
        for part in parents:
            path = (*path, part)
            if isinstance(holder, dict) and holder.get(part) is None:
                holder[part] = {}
            holder = _inside(holder, part, where)
        if not isinstance(holder, dict):
            _inside(holder, last, where)
        holder[last] = given.values
        path = (*path, last)
        self.lines = {at: words for at, words in self.lines.items() if at[: len(path)] != path}
        self.lines |= {(*path, *inner): words for inner, words in given.lines.items()}


def _inside(holder: Any, key: str | int, where: str) -> Any:
    """What a dict or a list holds under a key that is there."""
    there = isinstance(holder, dict | list) and key in (holder if isinstance(holder, dict) else range(len(holder)))
    if not there:
        raise ValueError(f"{where} must lead to a value in sections and lists that are there, got {key!r}")
    return holder[key]


def read_document(path: str | Path) -> Document:
    """Raises ValueError, with file and line, if it is not YAML with keys at the top, or a key comes twice."""
    text = Path(path).read_text(encoding="utf-8")
    if text.startswith("\ufeff"):
        raise ValueError(f"{path}: line 1 must be UTF-8 without a byte-order mark, got one at its start")
    document = _parsed(text, str(path), lambda line: f"{path}: line {line}")
    if not isinstance(document.values, dict):
        raise ValueError(f"{path} must be YAML with keys, such as task and model, got {document.values!r}")
    return document


def _parsed(text: str, name: str, words_of: typing.Callable[[int], str]) -> Document:
    """The `Document` of a text; `words_of` gives the words for a line of it."""
    try:
        node = yaml.compose(text, _Loader)
        lines = {}
        return Document(None if node is None else _value(node, (), lines, words_of), lines)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        raise ValueError(f"{words_of(mark.line + 1) if mark else name} must be YAML, got {error}") from error
    except RecursionError as error:
        raise ValueError(f"{name} must be YAML, got values that are nested too deeply") from error


def _value(node: yaml.Node, path: KeyPath, lines: dict, words_of: typing.Callable[[int], str]) -> Any:
    lines.setdefault(path, words_of(node.start_mark.line + 1))
    if isinstance(node, yaml.SequenceNode):
        return [_value(inner, (*path, index), lines, words_of) for index, inner in enumerate(node.value)]
    if not isinstance(node, yaml.MappingNode):
        return _Loader("").construct_object(node)
    found = {}
    for key_node, inner in node.value:
        key, where = key_node.value, words_of(key_node.start_mark.line + 1)
        if not isinstance(key, str) or key in found:
            raise ValueError(f"{where}: a key must be a word that comes once, got {key!r}")
        lines[(*path, key)] = where
        found[key] = _value(inner, (*path, key), lines, words_of)
    return found


def check_keys(document: Document, path: KeyPath, given: Iterable[str], known: Iterable[str]) -> None:
    """Raises ValueError, with the nearest key there is, for one that is not known."""
    known = list(known)
    for key in given:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, 1, 0.5)
            meant = f", such as {near[0]}" if near else ""
            raise ValueError(
                f"{document.where((*path, key))} must be one of the keys {sorted(known)}{meant}, got {key!r}"
            )


def filled(document: Document, cls: type, values: Any, path: KeyPath = ()) -> Any:
    """An instance of the dataclass `cls` with the values that stand at `path`, those that are missing by default.

    Raises ValueError, with file and line, for a key that the class lacks or that is missing, a value of another type,
    and what the class itself refuses.
    """
    if not isinstance(values, dict):
        raise ValueError(f"{document.where(path)} must be a section of keys, got {values!r}")
    fields = {field.name: field for field in dataclasses.fields(cls)}
    check_keys(document, path, values, fields)
    hints = typing.get_type_hints(cls)
    missing = [
        name
        for name, field in fields.items()
        if name not in values and field.default is field.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise ValueError(f"{document.where(path)} must have the key {missing[0]!r}, got {sorted(values)}")
    given = {name: _typed(document, hints[name], value, (*path, name)) for name, value in values.items()}
    try:
        return cls(**given)
    except ValueError as error:
        raise ValueError(f"{document.where(path)}: {error}") from error


def _typed(document: Document, hint: Any, value: Any, path: KeyPath) -> Any:
    """`value` as the type hint has it: a number where one with a fraction may stand, tuples for lists."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        if type(value) in arguments:
            return value
        *_, hint = (argument for argument in arguments if argument is not type(None))  # of several, what is a list
        return _typed(document, hint, value, path)
    if origin in (tuple, Sequence) and isinstance(value, list | tuple):
        return tuple(_typed(document, arguments[0], one, (*path, index)) for index, one in enumerate(value))
    if origin is dict and isinstance(value, dict):
        return {key: _typed(document, arguments[1], one, (*path, key)) for key, one in value.items()}
    if dataclasses.is_dataclass(hint):
        return filled(document, hint, value, path)
    if hint is Any or type(value) is hint or (origin is dict and value == {}):
        return value
    if hint is float and type(value) is int:
        return float(value)
    raise ValueError(f"{document.where(path)} must be {_in_words(hint)}, got {value!r}")


def _in_words(hint: Any) -> str:
    words = {int: "an integer", float: "a number", bool: "true or false", str: "a text"}
    lists = {tuple: "a list", Sequence: "a list", dict: "a section of keys"}
    return words.get(hint) or lists.get(typing.get_origin(hint), str(hint))
