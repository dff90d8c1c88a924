"""Finds out what a module is: by its names or its parts, and by what its forward computes."""

import inspect
from typing import NamedTuple

from torch import nn

from petl_ext.composing import has_device_hook
from petl_ext.patching.dispatch import beside_its_class
from petl_ext.patching.held import structure
from petl_ext.patching.kind import Settings, own_forward, plain_attributes, tensor_names
from petl_ext.patching.kinds import KINDS
from petl_ext.patching.probe import Difference, probe


class Recognized(NamedTuple):
    """Attributes:
    kind: what it is, in words.
    found: its `Kind`; None where it is none.
    settings: its `Settings`; None where it is left alone.
    reason: why it is left alone, or "".
    """

    kind: str
    found: type | None
    settings: Settings | None
    reason: str = ""


class Found(NamedTuple):
    """A module of a model that is patched or that `patch` knows.

    Attributes:
        name: its dotted name.
        module: it.
        recognized: a `Recognized`; None where it is patched.
    """

    name: str
    module: nn.Module
    recognized: Recognized | None


def kind_of(module):
    """The `Kind` as which a module has been patched, or None."""
    return next((base for base in type(module).__mro__ if base in KINDS), None)


def recognize(module, probed):
    """What `module` is to `patch`, a `Recognized`; None where it is nothing that is known.

    Args:
        probed: a dictionary that keeps what was found out about a module for others of the same structure.
    """
    kind = _kind_like(module)
    if kind is None:
        return None
    if reason := _refusal(kind, module):
        return Recognized(kind.petl_name, kind, None, reason)
    return _probed_as(kind, module, probed)


def find(model, probed):
    """[`Found`, ...] in the order of `model.named_modules()`, none of them within another.

    Of modules of a general kind the outermost is taken, unless one within it computes the same. Where it must be left
    alone, those within are looked at, and only if there are none is it told.
    """
    return _found("", model, set(), probed)


def _found(name, module, met, probed):
    if id(module) in met:
        return []
    met.add(id(module))
    if kind_of(module):
        return [Found(name, module, None)]
    kind = _kind_like(module)
    within = []
    if kind is None or kind.petl_is_general:
        for child_name, child in module._modules.items():
            if child is not None:
                within += _found(f"{name}.{child_name}".lstrip("."), child, met, probed)
    if kind is None or any(found.recognized is None for found in within):
        return within
    found = Found(name, module, recognize(module, probed))
    if found.recognized.reason:
        return within or [found]
    return within if any(_compute_the_same(found, other) for other in within) else [found]


def _compute_the_same(outer, inner):
    if inner.recognized.reason or inner.recognized.found is not outer.recognized.found:
        return False
    resolve = outer.recognized.found.petl_resolved
    return resolve(outer.module, outer.recognized.settings) == resolve(inner.module, inner.recognized.settings)


def _kind_like(module):
    """The kind of whose modules it has the names, or else the parts."""
    return next((kind for kind in sorted(KINDS, key=_is_general) if kind.petl_looks_like(module)), None)


def _is_general(kind):
    return kind.petl_is_general


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
    settings = found.settings._replace(
        parts=tuple(map(type, list(module.modules())[1:])),
        attributes=plain_attributes(module),
        tensors=tensor_names(module),
    )
    return found._replace(settings=settings)


def _refusal(kind, module):
    if "forward" in vars(module) and not has_device_hook(module):
        return "the instance has a forward of its own"
    if beside := next(filter(None, map(beside_its_class, list(module.modules())[1:])), ""):
        return beside
    if reason := kind.petl_refusal(module):
        return reason
    forward = own_forward(type(module))
    if not kind.petl_takes(forward):
        return f"its forward takes {inspect.signature(forward)}, not {kind.petl_arguments()}"
    return ""
