"""Checks of arguments. `name` is the argument's with its owner: "APTLayer: dim"."""

import math


def check_positive_integer(name, value):
    """Raises a ValueError unless `value` is an int above zero; True is none."""
    if type(value) is not int or value < 1:
        raise ValueError(f"{name} must be a positive integer, got {value!r}")


def check_switch(name, value):
    """Raises a ValueError unless `value` is True or False."""
    if type(value) is not bool:
        raise ValueError(f"{name} must be True or False, got {value!r}")


def check_probability(name, value):
    """Raises a ValueError unless `value` is a number in [0, 1)."""
    if type(value) not in (int, float) or not 0 <= value < 1:
        raise ValueError(f"{name} must lie in [0, 1), got {value!r}")


def check_positive_number(name, value):
    """Raises a ValueError unless `value` is a finite number above zero."""
    if type(value) not in (int, float) or not 0 < value < math.inf:
        raise ValueError(f"{name} must be a positive number, got {value!r}")


def check_choice(name, value, choices):
    """Raises a ValueError unless `value` is one of the strings `choices`."""
    if not isinstance(value, str) or value not in choices:
        *others, last = (f'"{choice}"' for choice in choices)
        raise ValueError(f"{name} must be {', '.join(others)} or {last}, got {value!r}")
