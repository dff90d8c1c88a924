"""What the entries of `sites` and of `keep` mean: regular expressions, and runs of parts, of dotted names."""

import re
from typing import NamedTuple


def whole_name(pattern):
    """The regular expression of the whole names that `pattern` matches from a dot or from the start to the end."""
    return rf"(.*\.)?({pattern})"


def matches(pattern, name):
    """Whether a pattern of `sites` or of a family matches a dotted name."""
    return re.fullmatch(whole_name(pattern), name) is not None


def check_patterns(owner, patterns):
    """Raises a ValueError that begins with `owner` if one of `patterns` is no regular expression."""
    for pattern in patterns:
        try:
            re.compile(whole_name(pattern))  # it is not matched alone: global flags inside would fail then
        except re.error as error:
            raise ValueError(f"{owner}: {pattern!r} is not a regular expression: {error}") from error


def is_part(entry, name):
    """Whether the dotted `entry`, of `keep`, is a run of whole components of the dotted `name`."""
    return f".{entry}." in f".{name}."


class Wanted(NamedTuple):
    """What one pattern asks for.

    Attributes:
        pattern: of `sites` or of a family.
        is_familys: whether it is of a family, which asks for no layer that the model does not use.
        tower: the family's tower to which it is confined, or None.
    """

    pattern: str
    is_familys: bool = False
    tower: str | None = None

    def takes(self, name, family):
        """Whether it asks for the module of this dotted name in a model of that family."""
        if self.is_familys and not family.uses(name):
            return False
        return matches(self.pattern, name) and self.tower in (None, family.tower_of(name))
