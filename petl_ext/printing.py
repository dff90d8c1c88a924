"""What several reports and error messages print alike: tables, and lists that end before they are too long."""

from collections.abc import Iterable

LISTED = 12


def table(rows):
    """The lines of a table whose columns stand under each other; `rows` are tuples of strings."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]


def listed(entries: Iterable[object], separator: str = ", ", none: str = "none") -> str:
    """The first `LISTED` entries, how many more there are, or `none`."""
    entries = list(entries)
    more = f" and {len(entries) - LISTED} more" if len(entries) > LISTED else ""
    return (separator.join(entries[:LISTED]) or none) + more
