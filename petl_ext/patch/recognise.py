"""Finds out what a module is: by its names and shapes, and by what its forward computes."""

import inspect
from typing import NamedTuple

from torch import nn

from petl_ext.attach.site import has_device_hook
from petl_ext.patch.dispatch import is_hooked
from petl_ext.patch.held import structure
from petl_ext.patch.kind import Settings, names_in, own_forward, plain_attributes
from petl_ext.patch.library import LibraryAdapter
from petl_ext.patch.originals import Bottleneck, CrossAttention, ParallelAdapter, PromptDiffusion
from petl_ext.patch.probe import Difference, probe

KINDS = (PromptDiffusion, Bottleneck, ParallelAdapter, CrossAttention, LibraryAdapter)
# Modules of the same code bases that no op computes: {their marks: (what they are, why not)}.
OTHERS = {frozenset({"conv_A", "conv_B"}): ("LaVIN's RepAdapter", "no op computes grouped convolutions")}


class Recognised(NamedTuple):
    """Attributes:
    kind: what it is, in words.
    found: its `Kind`, None for one of `OTHERS`.
    settings: its `Settings`; None where it is left alone.
    reason: why it is left alone, or "".
    """

    kind: str
    found: type | None
    settings: Settings | None
    reason: str = ""


def recognise(module, probed):
    """What `module` is to `patch`, a `Recognised`; None where it has no names that are known.

    Args:
        probed: a dictionary in which is kept what was found out about modules, for others of the same structure: a
            model holds many.
    """
    for kind in KINDS:
        if kind.looks_like(module):
            if reason := _refusal(kind, module):
                return Recognised(kind.name, kind, None, reason)
            return _probed_as(kind, module, probed)
    for marks, (name, reason) in OTHERS.items():
        if marks <= names_in(module):
            return Recognised(name, None, None, reason)
    return None


def _probed_as(kind, module, probed):
    same = structure(module)
    found = probed.get(same) if same else None
    if found is None:
        try:
            found = Recognised(kind.name, kind, probe(kind, module))
        except Difference as difference:
            found = Recognised(kind.name, kind, None, str(difference))
        if same:
            probed[same] = found
    if found.reason:
        return found
    parts = tuple(map(type, list(module.modules())[1:]))
    return found._replace(settings=found.settings._replace(parts=parts, attributes=plain_attributes(module)))


def takes_as(forward, kind):
    """Whether `forward` takes what the forward of `kind` takes."""
    return _arguments(forward) == _arguments(kind.patched.forward)


def _refusal(kind, module):
    if "forward" in vars(module) and not has_device_hook(module):
        return "the instance has a forward of its own"
    if _enters_autocast(type(module)):
        return "it computes in an autocast of its own"
    if reason := kind.refusal(module):
        return reason
    forward = own_forward(type(module))
    if not takes_as(forward, kind):
        taken, expected = (inspect.signature(f) for f in (forward, kind.patched.forward))
        return f"its forward takes {taken}, not {expected}"
    return "a part carries a hook" if any(map(is_hooked, list(module.modules())[1:])) else ""


def _arguments(forward):
    return [(p.name, p.default, p.kind) for p in inspect.signature(forward).parameters.values()]


def _enters_autocast(cls):
    """Whether a method of it names autocast: in its body, or as a decorator around it."""
    for ancestor in cls.__mro__[: cls.__mro__.index(nn.Module)]:
        for function in vars(ancestor).values():
            while function is not None:
                code = getattr(function, "__code__", None)
                names = (*code.co_names, *code.co_freevars) if code is not None else ()
                if any("autocast" in name for name in names):
                    return True
                function = getattr(function, "__wrapped__", None)
    return False
