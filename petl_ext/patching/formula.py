"""The steps of a bottleneck: which there are, of which of a module's parts."""

import inspect
import math
from typing import NamedTuple

from torch import nn
from torch.nn.parameter import is_lazy

from petl_ext.patching.kind import own_forward, plain_attributes

_PROJECTIONS = (nn.Linear, nn.modules.conv._ConvNd)


class Formula(NamedTuple):
    """[residual +] scale * [norm](up(act(down([norm] x)))). A part is given by the names that lead to it.

    Attributes:
        down: the projection that narrows.
        up: the one that widens.
        norm: the LayerNorm; None where it has no part in it.
        norm_is_last: whether it comes behind `up` rather than before `down`.
        scale: a number, or the names that lead to a parameter or buffer of one element.
        scale_is_last: whether it comes behind a norm that is last.
        parameters: ((name, default), ...) of the forward; the default of the first one, x, is nothing.
        residuals: ((what is given beside x, the index of the argument that is added, or None), ...): the ways to call
            it that are known.
    """

    down: tuple
    up: tuple
    norm: tuple | None
    norm_is_last: bool
    scale: float | tuple
    scale_is_last: bool
    parameters: tuple
    residuals: tuple

    @property
    def defaults(self):
        return tuple(default for _, default in self.parameters[1:])


class Parts:
    """What a module holds, by dotted names.

    Attributes:
        projections, norms: modules.
        scales: parameters and buffers of one element.
        others: the names of what has other ones.
    """

    def __init__(self, module):
        self.projections, self.norms, self.scales, self.others = {}, {}, {}, set()
        for name, part in module.named_modules():
            if isinstance(part, _PROJECTIONS):
                self.projections[name] = part
            elif isinstance(part, nn.LayerNorm):
                self.norms[name] = part
            else:
                self._sort(name, part)

    def _sort(self, name, part):
        for table in (part._parameters, part._buffers):
            for own_name, tensor in table.items():
                if tensor is None:
                    continue
                if not is_lazy(tensor) and tensor.numel() == 1 and tensor.is_floating_point():
                    self.scales[f"{name}.{own_name}".lstrip(".")] = tensor
                else:
                    self.others.add(name or own_name)


def projections_in(module):
    return (part for part in module.modules() if isinstance(part, _PROJECTIONS))


def sizes_of(projection):
    if isinstance(projection, nn.Linear):
        return projection.in_features, projection.out_features
    return projection.in_channels, projection.out_channels


def part_at(module, names):
    for name in names:
        module = module._modules[name]
    return module


def scale_of(module, scale):
    """The number or the tensor that a formula's scale is."""
    return getattr(part_at(module, scale[:-1]), scale[-1]) if isinstance(scale, tuple) else scale


def formulas_of(module):
    """All that a module of these parts may compute."""
    parts = Parts(module)
    down, up = (tuple(name.split(".")) for name in parts.projections)
    _, *taken = inspect.signature(own_forward(type(module))).parameters.values()
    # What is given by name alone, or beside what is declared, is for the own forward.
    parameters = tuple((p.name, p.default) for p in taken if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD))
    parameters = ((parameters[0][0], None), *parameters[1:])
    given = tuple(default for _, default in parameters[1:])
    scales = [*_numbers(module), *(tuple(name.split(".")) for name in parts.scales)]
    norms = [None, *(tuple(name.split(".")) for name in parts.norms)]
    orders = [
        (norm, last, scale, False) for norm in norms for last in (False, True)[: 1 + bool(norm)] for scale in scales
    ]
    orders += [(norm, True, scale, True) for norm in norms[1:] for scale in scales[1:]]
    return [Formula(down, up, *order, parameters, ((given, added),)) for order in orders for added in (0, None)]


def _numbers(module):
    """1 and those among its attributes."""
    values = [value for _, _, value in plain_attributes(module) if type(value) in (int, float)]
    return dict.fromkeys([1.0, *(float(value) for value in values if value and math.isfinite(value))])
