"""Finds out what a module is: by its names and shapes, and by what its forward computes."""

import copy
import inspect
from typing import NamedTuple

import torch
from torch import nn

from petl_ext.attach.site import has_device_hook
from petl_ext.patch.dispatch import is_hooked
from petl_ext.patch.kind import Settings, names_in, plain_attributes
from petl_ext.patch.library import LibraryAdapter
from petl_ext.patch.originals import Bottleneck, CrossAttention, ParallelAdapter, PromptDiffusion

KINDS = (PromptDiffusion, Bottleneck, ParallelAdapter, CrossAttention, LibraryAdapter)
SIZES = (1.0, 1e3)  # of the random inputs: some forwards clamp what is large. Larger ones outdo DVP's mask of -1e9
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


def recognise(module):
    """What `module` is to `patch`, a `Recognised`; None where it has no names that are known."""
    for kind in KINDS:
        if kind.looks_like(module):
            reason = _refusal(kind, module)
            settings = None if reason else _settings(kind, module)
            if not reason and settings is None:
                reason = f"its forward computes something else than {kind.published}"
            return Recognised(kind.name, kind, settings, reason)
    for marks, (name, reason) in OTHERS.items():
        if marks <= names_in(module):
            return Recognised(name, None, None, reason)
    return None


def own_forward(cls):
    """A class's forward as it is without `patch_class`."""
    return getattr(cls.forward, "petl_original", cls.forward)


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


def _settings(kind, module):
    """Of the candidates the one with which the op computes what the module's forward does, on random parameters and
    inputs in float64: names and shapes tell neither of a constant nor of the order of things."""
    parts = tuple(map(type, list(module.modules())[1:]))
    forward = own_forward(type(module))
    with torch.random.fork_rng(devices=[]), torch.no_grad(), torch.autocast("cpu", enabled=False):
        twin, draw = _random_twin(module)
        examples = kind.examples(twin, draw)
        for settings in kind.candidates(twin):
            vars(twin)["petl_settings"] = settings
            if all(
                _same(forward, kind.compute, twin.train(mode), _scaled(arguments, size))
                for mode in (False, True)
                for size in SIZES
                for arguments in examples
            ):
                return settings._replace(parts=parts, attributes=plain_attributes(module))
    return None


def _random_twin(module):
    """(a copy on the CPU in float64, with random parameters and no dropout; what draws such tensors)."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu")

    twin = copy.deepcopy(module).to_empty(device="cpu").double()
    for tensor in (*twin.parameters(), *twin.buffers()):
        # Of this size, what a sum over the width adds up to is about 1, as are the other tensors.
        size = tensor.size(-1) ** -0.5 if tensor.dim() == 2 else 1.0
        tensor.data = draw(*tensor.shape) * size
    for part in twin.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.0
    if "dropout" in vars(twin):
        twin.dropout = 0.0
    return twin, draw


def _scaled(arguments, size):
    return tuple(x * size if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in arguments)


def _same(forward, compute, twin, arguments):
    try:
        theirs = forward(twin, *arguments)
    except Exception:  # It is other people's and may do anything; then it is not the kind's.
        return False
    ours = compute(twin, *arguments)
    if not isinstance(theirs, tuple):
        theirs, ours = (theirs,), (ours,)
    return len(theirs) == len(ours) and all(
        # The library's hidden units, of which nothing is made.
        our is None
        or (
            isinstance(their, torch.Tensor)
            and (their.shape, their.dtype) == (our.shape, our.dtype)
            and torch.allclose(their, our, rtol=1e-9, atol=1e-9 * max(1.0, their.abs().max().item()))
        )
        for their, our in zip(theirs, ours, strict=True)
    )
