"""A place in a model that carries a new layer, and the class that its module becomes there."""

from dataclasses import dataclass

import torch

from petl_ext.composing import Composable
from petl_ext.ops.kernels import kernel_for


@dataclass(frozen=True)
class Place:
    """Where one new layer goes.

    Attributes:
        name: the dotted name of the module that carries it, "" for the model itself.
        site_class: what the module becomes: a `Site`, or another `Composable` with a `child`.
    """

    name: str
    site_class: type

    @property
    def layer_name(self):
        return f"{self.name}.{self.site_class.child}".lstrip(".")


class Site(Composable):
    """What a module becomes that carries a new layer. All methods but `forward` and `begin` answer questions about it.

    Attributes:
        child: the new layer's name in the module.
        looked_for: what `candidates` finds, for error messages.
    """

    child: str
    looked_for: str

    @staticmethod
    def candidates(model):
        """{dotted name: module} of all in `model` that can become such a site."""
        raise NotImplementedError

    @staticmethod
    def neighbor(module):
        """The linear layer or norm in `module` that is as wide as the new layer and lies where it must lie."""
        return module.dense

    @classmethod
    def check(cls, module):
        """Raises a ValueError that says why a candidate, which looked like such a site, is none."""

    @classmethod
    def new_layer(cls, config, model, place):
        neighbor = cls.neighbor(model.get_submodule(place.name))
        return config.new_layer(width_of(neighbor), **location_beside(neighbor, model))

    def begin(self, x):
        """What the layer queues for the module's input x [..., D] before the module's own work; None: nothing."""

    @staticmethod
    def macs(layer, tokens):
        """Multiply-accumulates of the layer for one sequence of `tokens` rows."""
        raise NotImplementedError

    @staticmethod
    def counted_macs(place, attached, backbone):
        """The same from two `MacCount`s: of the model and of the bare backbone, which may be None."""
        return attached.of(place.layer_name)

    @staticmethod
    def kernel(layer):
        """(what computes the layer, why it is not a kernel)."""
        raise NotImplementedError


def candidates_of(model, site_classes):
    """{dotted name: which of `site_classes` it can become}; the last, where it can become several."""
    return {name: site_class for site_class in site_classes for name in site_class.candidates(model)}


def width_of(layer):
    """How many features a linear layer, quantized or not, or a norm gives."""
    return layer.out_features if hasattr(layer, "out_features") else layer.weight.size(0)


def location_beside(neighbor, model):
    """The device and dtype of a layer that joins `neighbor` in `model`, as a dict.

    A quantized weight is a tensor of bytes or of 8-bit floats, or none at all (torch.ao). Then the dtype is that of the
    model's first floating-point parameter.
    """
    weight = neighbor.weight
    if isinstance(weight, torch.Tensor) and _can_compute(weight):
        return {"device": weight.device, "dtype": weight.dtype}
    floating = next((parameter for parameter in model.parameters() if _can_compute(parameter)), torch.empty(0))
    return {"device": getattr(weight, "device", floating.device), "dtype": floating.dtype}


def _can_compute(tensor):
    """Whether it is of a floating-point dtype that torch calculates in, which those of 8 bits and less are not."""
    return tensor.is_floating_point() and tensor.element_size() > 1


def fused_kernel(op, layer):
    """`Site.kernel` of a layer that calls `petl_ext.ops.<op>` and has a `dropout`."""
    weight = next(layer.parameters())
    return kernel_for(op, weight.device, weight.dtype, layer.dropout if layer.training else 0.0)
