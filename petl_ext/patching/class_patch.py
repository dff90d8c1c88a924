"""`patch_class` patches all instances of a class, those made later too."""

import functools
import logging
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import nn
from torch._guards import detect_fake_mode

from petl_ext.patching.kind import own_forward
from petl_ext.patching.kinds import KINDS
from petl_ext.patching.patch import known, release, take_in
from petl_ext.patching.recognize import Recognized, kind_of, recognize
from petl_ext.patching.report import PatchReport, left_alone_row, patched_row

logger = logging.getLogger("petl_ext")
_PATCHED = {}


class ClassPatch:
    """What `patch_class` returns.

    Attributes:
        cls: the class.
    """

    def __init__(self, cls):
        self.cls = cls
        self._inherited = "forward" not in vars(cls)
        self._original = cls.forward
        self._patched = WeakSet()
        self._probed = {}
        self._left_alone = WeakKeyDictionary()
        cls.forward = self._dispatcher()

    def report(self) -> PatchReport:
        """A `PatchReport` of the instances that have run since and are still there."""
        patched = [module for module in self._patched if kind_of(module)]
        rows = [patched_row(f"instance {i}", module, kind_of(module)) for i, module in enumerate(patched, 1)]
        rows += [
            left_alone_row(f"instance {i}", module, recognized)
            for i, (module, recognized) in enumerate(self._left_alone.items(), 1 + len(rows))
        ]
        return PatchReport(f"petl_ext.patch_class of {self.cls.__name__}", rows)

    def unpatch(self) -> None:
        """As `petl_ext.unpatch_class(cls)`."""
        unpatch_class(self.cls)

    def _dispatcher(self):
        original = self._original

        @functools.wraps(original)
        def forward(module, *arguments, **named):
            # A subclass with a forward of its own, or a patched instance, comes here on its way to the original.
            if type(module).forward is forward and not _is_transformed() and self._takes_in(module):
                return module.forward(*arguments, **named)
            return original(module, *arguments, **named)

        forward.petl_original = original
        return forward

    def _takes_in(self, module):
        # One that was patched and comes here again has been unpatched.
        if module in self._left_alone or module in self._patched:
            return False
        recognized = recognize(module, self._probed) or Recognized("unknown", None, None, f"none of: {known()}")
        if not recognized.reason:
            take_in(module, recognized)
            self._patched.add(module)
            return True
        if recognized.reason not in {other.reason for other in self._left_alone.values()}:
            logger.warning("patch_class: a %s is left alone: %s", self.cls.__name__, recognized.reason)
        self._left_alone[module] = recognized
        return False

    def _undo(self):
        if self._inherited:
            del self.cls.forward
        else:
            self.cls.forward = self._original
        for module in self._patched:
            if kind_of(module):
                release(module)


def _is_transformed():
    """Whether a probe could not compute now."""
    return (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or torch._C._are_functorch_transforms_active()
        or detect_fake_mode() is not None
    )


def patch_class(cls: type[nn.Module]) -> "ClassPatch":
    """Patches every instance of `cls`, as `petl_ext.patch` does one model: those that exist and those made later.

    An instance is looked at when it runs for the first time, since only instances have parts. One that does not match
    runs its own forward, which is reported and logged as a warning. Under torch.compile, torch.jit.trace, the
    transformations of torch.func and fake tensors nothing is looked at: let a model run once before. Subclasses that
    inherit forward are taken in too.

    Args:
        cls: a class of modules, such as `approximate_prompt` of APT's code.

    Returns:
        A `ClassPatch`, whose `report()` tells of the instances that have run.

    Raises:
        TypeError: cls is no subclass of nn.Module.
        ValueError: it is patched already, or its forward takes other arguments than those of all known kinds. The
            class has not changed.
    """
    if not isinstance(cls, type) or not issubclass(cls, nn.Module):
        raise TypeError(f"patch_class: cls must be a subclass of torch.nn.Module, got {cls!r}")
    if own_forward(cls) is not cls.forward:
        raise ValueError(f"patch_class: {cls.__name__}, or a class that it inherits forward from, is patched already")
    if not any(kind.petl_takes(cls.forward) for kind in KINDS):
        raise ValueError(f"patch_class: the forward of {cls.__name__} is that of no known kind. Known are: {known()}")
    _PATCHED[cls] = ClassPatch(cls)
    return _PATCHED[cls]


def unpatch_class(cls: type[nn.Module]) -> None:
    """Gives `cls`, and those of its instances that `patch_class` has patched, the original forward back.

    Copies and unpickled instances of patched modules are others: `petl_ext.unpatch` is for them.

    Raises:
        ValueError: cls is not patched.
    """
    if cls not in _PATCHED:
        raise ValueError(f"unpatch_class: {getattr(cls, '__name__', cls)} is not patched")
    _PATCHED.pop(cls)._undo()
