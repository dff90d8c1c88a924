"""Finds out what a module is: by its names and shapes, and by what its forward computes."""

import inspect
from typing import NamedTuple

from torch import nn

from petl_ext.composing import has_device_hook
from petl_ext.patching.dispatch import beside_its_class
from petl_ext.patching.held import structure
from petl_ext.patching.kind import Settings, names_in, own_forward, plain_attributes, refuse_bottleneck
from petl_ext.patching.kinds import KINDS
from petl_ext.patching.probe import Difference, probe

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


class Recognized(NamedTuple):
    """Attributes:
    kind: what it is, in words.
    found: its `Kind`, None for a pair that no kind is.
    settings: its `Settings`; None where it is left alone.
    reason: why it is left alone, or "".
    """

    kind: str
    found: type | None
    settings: Settings | None
    reason: str = ""


def recognize(module, probed):
    """What `module` is to `patch`, a `Recognized`; None where it has no names that are known.

    Args:
        probed: a dictionary that keeps what was found out about a module for others of the same structure.
    """
    for kind in KINDS:
        if kind.petl_looks_like(module):
            if reason := _refusal(kind, module):
                return Recognized(kind.petl_name, kind, None, reason)
            return _probed_as(kind, module, probed)
    return _pair(module)


def _probed_as(kind, module, probed):
    same = structure(module)
    found = probed.get(same) if same else None
    if found is None:
        try:
            found = Recognized(kind.petl_name, kind, probe(kind, module))
        except Difference as difference:
            found = Recognized(kind.petl_name, kind, None, str(difference))
        if same:
            probed[same] = found
    if found.reason:
        return found
    parts = tuple(map(type, list(module.modules())[1:]))
    return found._replace(settings=found.settings._replace(parts=parts, attributes=plain_attributes(module)))


def _pair(module):
    """LaVIN's pairs, and those of code that follows it: conv_A and conv_B are convolutions or, in spite of their names,
    nn.Linear. None of them is patched."""
    if not {"conv_A", "conv_B"} <= names_in(module):
        return None
    pair = module.conv_A, module.conv_B
    if all(isinstance(part, _CONVOLUTIONS) for part in pair):
        grouped = "grouped " if any(part.groups > 1 for part in pair) else ""
        return Recognized("pair of convolutions", None, None, f"no op computes {grouped}convolutions")
    if all(isinstance(part, nn.Linear) for part in pair):
        unknown = "projections of the names conv_A and conv_B are no known kind's"
        return Recognized("pair of projections", None, None, refuse_bottleneck(*pair) or _autocast(module) or unknown)
    return None


def takes_as(forward, kind):
    """Whether `forward` takes what the forward of `kind` takes."""
    return _arguments(forward) == _arguments(kind.forward)


def _refusal(kind, module):
    if "forward" in vars(module) and not has_device_hook(module):
        return "the instance has a forward of its own"
    if reason := _autocast(module):
        return reason
    if beside := next(filter(None, map(beside_its_class, list(module.modules())[1:])), ""):
        return beside
    if reason := kind.petl_refusal(module):
        return reason
    forward = own_forward(type(module))
    if not takes_as(forward, kind):
        taken, expected = (inspect.signature(f) for f in (forward, kind.forward))
        return f"its forward takes {taken}, not {expected}"
    return ""


def _arguments(forward):
    return [(p.name, p.default, p.kind) for p in inspect.signature(forward).parameters.values()]


def _autocast(module):
    """Why autocast, which its methods use in their bodies or in decorators, is an obstacle."""
    its_class = type(module)
    ancestors = its_class.__mro__[: its_class.__mro__.index(nn.Module)]
    used = [name for ancestor in ancestors for function in vars(ancestor).values() for name in _names_used(function)]
    of_autocast = [name for name in used if "autocast" in name]
    asked = [name for name in of_autocast if name.startswith(("is_", "get_"))]
    if len(of_autocast) > len(asked):
        return "it computes in an autocast of its own"
    return f"it may go by autocast: it uses {asked[0]}" if asked else ""


def _names_used(function):
    names = []
    while function is not None:
        code = getattr(function, "__code__", None)
        names += (*code.co_names, *code.co_freevars) if code is not None else ()
        function = getattr(function, "__wrapped__", None)
    return names
