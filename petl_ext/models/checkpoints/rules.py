"""The tables' language: what becomes of keys of a file, which stand with placeholders in braces."""

import functools
import re
from typing import NamedTuple

PLACEHOLDERS = {
    "i": r"\d+",
    "t": "weight|bias",
    "stream": "text|image",
    "attention": "attention|crossattention",
    "head": r"\w+_classifier|\w+_score|rank_output",
    "clip_text": "transformer|token_embedding|positional_embedding|ln_final|text_projection|logit_scale",
    "rest": ".+",
}


class Rule(NamedTuple):
    """What becomes of keys of the file.

    Attributes:
        key: the key, with placeholders.
        names: of the model's tensors; into several of them the tensor is cut along its first axis.
        adapt: (tensor, wanted shape) -> (tensor, what was done or ""), or None.
        absent: why the key is left out if the model has no such tensor; "" makes that an error.
        needs: what the error says if the model has no such tensor; "" is that the key is unknown.
        layer: the `LayerNames` of a key of an attached layer, or None.
        twin: the key under which the file holds the same tensor too, or "".
    """

    key: str
    names: tuple
    adapt: object = None
    absent: str = ""
    needs: str = ""
    layer: object = None
    twin: str = ""


class LayerNames(NamedTuple):
    """A layer that the code bases add.

    Attributes:
        config: what attaches it here, with sizes in braces.
        row: of that config. Several methods give their tensors the same names here, but compute something else.
        sizes: {size: the tensor in the file whose first axis it is}.
        parts: {tensor in the file: tensor here}.
    """

    config: str
    row: str
    sizes: dict
    parts: dict


def rule(key, *names, **options):
    return Rule(key, names, **options)


def rule_of(key, rules):
    """The first rule that fits the key, with what the placeholders stand for filled in; None where none does."""
    for candidate in rules:
        if match := pattern(candidate.key).fullmatch(key):
            found = match.groupdict()
            names = tuple(name.format(**found) for name in candidate.names)
            return candidate._replace(key=key, names=names, twin=candidate.twin.format(**found))
    return None


def lookup(table, key):
    return next((value for line, value in table.items() if pattern(line).fullmatch(key)), None)


@functools.cache
def pattern(line):
    """The regular expression that a line of the tables stands for."""
    return re.compile(re.sub(r"\\{(\w+)\\}", lambda match: _group(match[1]), re.escape(line)))


def _group(placeholder):
    return f"(?P<{placeholder}>{PLACEHOLDERS[placeholder]})"
