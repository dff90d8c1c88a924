"""A place in a model that carries a new layer, and how its module takes the layer's computation in.

The module becomes an instance of a subclass of its own class, in which one class per new layer comes first
(`composed`). So its children, hooks and state-dict keys stay, `isinstance` goes on finding it, and giving it back its
own class takes the computation out again.
"""

import copyreg
import functools
import types
from typing import NamedTuple

import torch
from torch import nn

from petl_ext.ops import cpu_path


class Place(NamedTuple):
    """Where one new layer goes.

    Attributes:
        name: the dotted name of the module that carries it.
        site_class: the `Site` that the module becomes.
        lost: how many adapters inside that module fall away where it is skipped.
    """

    name: str
    site_class: type
    lost: int = 0

    @property
    def layer_name(self):
        return f"{self.name}.{self.site_class.child}".lstrip(".")


class Composable(nn.Module):
    """Comes before a module's own class in a class made by `composed`, and lets it be copied and pickled."""

    def __reduce_ex__(self, protocol):
        _, _, *state = super().__reduce_ex__(protocol)
        *added, own = type(self).__bases__
        return (_new, (own, tuple(added)), *state)


class Site(Composable):
    """What a module becomes that carries a new layer. Its methods but `forward` answer questions about the layer.

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
    def neighbour(module):
        """The linear layer or norm in `module` that is as wide as the new layer and lies where it must lie."""
        return module.dense

    @classmethod
    def check(cls, module):
        """Raises a ValueError that says why a candidate, which looked like such a site, is none."""

    @classmethod
    def new_layer(cls, config, model, place):
        neighbour = cls.neighbour(model.get_submodule(place.name))
        return config.new_layer(width_of(neighbour), **location_beside(neighbour, model))

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


@functools.cache
def composed(backbone, sites):
    """The class of a module of the class `backbone` that has become each of the classes `sites`, the first outermost.

    It keeps the backbone's name, by which other libraries know a layer (FSDP's wrapping policy, device maps).
    """
    return type(backbone.__name__, (*sites, backbone), {})


def width_of(layer):
    """How many features a linear layer, quantised or not, or a norm gives."""
    return layer.out_features if hasattr(layer, "out_features") else layer.weight.size(0)


def location_beside(neighbour, model):
    """The device and dtype of a layer that joins `neighbour` in `model`, as a dict.

    A quantised weight is a tensor of bytes or of 8-bit floats, or none at all (torch.ao). Then the dtype is that of the
    model's first floating-point parameter.
    """
    weight = neighbour.weight
    if isinstance(weight, torch.Tensor) and _can_compute(weight):
        return {"device": weight.device, "dtype": weight.dtype}
    floating = next((parameter for parameter in model.parameters() if _can_compute(parameter)), torch.empty(0))
    return {"device": getattr(weight, "device", floating.device), "dtype": floating.dtype}


def _can_compute(tensor):
    """Whether it is of a floating-point dtype that torch calculates in, which those of 8 bits and less are not."""
    return tensor.is_floating_point() and tensor.element_size() > 1


def become(module, its_class, others):
    """Makes `module`, of one of the classes `others` or derived from it, one of `its_class`.

    What other libraries have derived at run time stays on top: `fully_shard` makes of a module's class one of its own.
    """
    other = next(other for other in others if isinstance(module, other))
    module.__class__ = _replaced(type(module), other, its_class)
    # Code that torch 2.10 has compiled looks at a module again only where its attributes were touched.
    vars(module)["petl_touched"] = True
    del vars(module)["petl_touched"]
    if has_device_hook(module):
        # It calls what forward was when the hook came.
        module._old_forward = types.MethodType(type(module).forward, module)


def has_device_hook(module):
    """Whether accelerate moves the module's inputs, as it does for a model with a device_map."""
    return "_hf_hook" in vars(module)


def fused_kernel(op, layer):
    """`Site.kernel` of a layer that calls `petl_ext.ops.<op>` and has a `dropout`."""
    weight = next(layer.parameters())
    device = weight.device.type
    if layer.training and layer.dropout > 0:
        return "reference", f"dropout {layer.dropout} in training"
    if weight.dtype is torch.float64:
        return "reference", "float64"
    key = torch._C._dispatch_key_for_device(device)
    if not torch._C._dispatch_has_kernel_for_dispatch_key(f"petl_ext::{op}_forward", key):
        return "none", f"this build holds no kernel for {device}"
    return f"{op} ({device}, {cpu_path()})" if device == "cpu" else f"{op} ({device})", ""


def _replaced(its_class, old, new):
    if its_class is old:
        return new
    bases = tuple(_replaced(base, old, new) if issubclass(base, old) else base for base in its_class.__bases__)
    return _with_bases(its_class, bases)


@functools.cache
def _with_bases(its_class, bases):
    own = {name: value for name, value in vars(its_class).items() if name not in ("__dict__", "__weakref__")}
    # transformers wraps the forward that a new subclass of a layer inherits; of this one it will do so again.
    wrapped = getattr(own.get("forward"), "__wrapped__", None)
    if wrapped and any(wrapped is vars(base).get("forward") for base in its_class.__mro__[1:]):
        del own["forward"]
    return type(its_class.__name__, bases, own)


def _new(backbone, sites):
    """What unpickling and copying start from: classes made at run time have no name to be found by."""
    return copyreg.__newobj__(composed(backbone, sites))
