"""`patch` gives a model's modules our kernels, `unpatch` gives them back their own classes."""

from torch import nn

from petl_ext.composing import become, composed
from petl_ext.ops.floors import adjust_floors
from petl_ext.patching.kinds import KINDS
from petl_ext.patching.recognize import find, kind_of
from petl_ext.patching.report import PatchReport, left_alone_row, patched_row


class Patch:
    """What `patch` returns: a view of a model whose modules may have been patched.

    Attributes:
        model: the model.
    """

    def __init__(self, model: nn.Module):
        self.model = model

    def report(self) -> PatchReport:
        """A `PatchReport` of the model as it is now: which modules run a kernel, and why the others do not."""
        return PatchReport(f"petl_ext.patch of {type(self.model).__name__}", _rows(self.model))

    def unpatch(self) -> None:
        """As `petl_ext.unpatch(model)`."""
        unpatch(self.model)


def patch(model: nn.Module) -> "Patch":
    """Runs those modules of `model` by our kernels that compute what they compute, under the same parameters.

    Known are bottlenecks, [x +] s * [LN](up(act(down([LN] x)))), whatever their parts are called; and by their names
    the prompt diffusion of APT's code, the cross-attention of DVP, and the bottlenecks of the library `adapters`,
    wherever their classes come from. What a module is tells what its own forward returns, passes back and leaves
    behind: that of a copy runs on random parameters and inputs in float64, and whatever it does outside of the module
    happens then. The module becomes an instance of a subclass of its class; parameters, state-dict keys, hooks and
    attributes stay, and so do copies and pickles of it.

    Its own forward still runs where there is no kernel for a call (dropout in training, float64, attention of several
    queries, inputs of unusual axes, another device) and where it is faster, as for few rows: `report()` tells. What is
    left alone, and why, is there too. A model that is patched already stays so; what is new in it is patched.

    Patch after loading weights and moving to a device or before, as you like, but before torch.compile.

    Args:
        model: any nn.Module.

    Returns:
        A `Patch`.

    Raises:
        TypeError: model is no nn.Module.
        ValueError: no module is recognized, or all that are must be left alone. The model has not changed.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"patch: model must be a torch.nn.Module, got {type(model).__name__}")
    all_found = find(model, {})
    if not any(kind_of(module) for module in model.modules()):
        _check_some(model, all_found)
    for found in all_found:
        if found.recognized:
            take_in(found.module, found.recognized)
    return Patch(model)


def unpatch(model: nn.Module) -> None:
    """Gives every patched module of `model` back its own class: from then on it computes as before, bit for bit.

    Raises:
        TypeError: model is no nn.Module.
        ValueError: nothing in it is patched.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"unpatch: model must be a torch.nn.Module, got {type(model).__name__}")
    patched = [module for module in model.modules() if kind_of(module)]
    if not patched:
        raise ValueError(f"unpatch: nothing in {type(model).__name__} is patched")
    for module in patched:
        release(module)


def take_in(module, recognized):
    """Patches one module, unless it must be left alone."""
    if not recognized.reason:
        adjust_floors()
        become(module, composed(type(module), (recognized.found,)), (type(module),))
        vars(module)["petl_settings"] = recognized.settings


def release(module):
    """Takes one module's patch out again."""
    kind = kind_of(module)
    patched = next(base for base in type(module).__mro__ if kind in base.__bases__)
    *added, own = patched.__bases__
    added.remove(kind)
    become(module, composed(own, tuple(added)) if added else own, (patched,))
    vars(module).pop("petl_settings", None)


def known():
    """What is recognized, for error messages."""
    return "; ".join(kind.petl_published for kind in KINDS)


def _check_some(model, all_found):
    if not all_found:
        raise ValueError(f"patch: {type(model).__name__} holds nothing that is known. Looked for: {known()}")
    if all(found.recognized.reason for found in all_found):
        rows = [f"  {f.name or '(the model)'}, {f.recognized.kind}: {f.recognized.reason}" for f in all_found]
        raise ValueError("\n".join([f"patch: all known modules of {type(model).__name__} must be left alone:", *rows]))


def _rows(model):
    return [
        left_alone_row(name, module, recognized) if recognized else patched_row(name, module, kind_of(module))
        for name, module, recognized in find(model, {})
    ]
