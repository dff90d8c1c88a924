"""What a kind of module is to `patch`, and what its parts must be."""

import types
from typing import NamedTuple

import torch
from torch import nn

from petl_ext.composing import Composable


class Settings(NamedTuple):
    """What was found out about a module when it was recognized; the module keeps it as `petl_settings`.

    Attributes:
        activation: as the op names it; "" where there is none.
        adds_residual: whether a bottleneck adds its residual.
        parts: the classes of the modules inside it.
        attributes: of it and of its parts, what `plain_attributes` gives: its forward may go by them.
        axes: how many its inputs may have for the op to give what its forward gives.
    """

    activation: str = ""
    adds_residual: bool = True
    parts: tuple = ()
    attributes: tuple = ()
    axes: tuple = (3,)


class Kind(Composable):
    """A kind of module that `patch` knows: what such a module becomes, and the questions about one.

    A subclass has a `forward` that takes what the original's takes. It computes by one of our ops; the original's is
    the next in line, and runs wherever the op does not compute the same.

    The questions are asked about modules that have not become it; their attributes may be anything until `petl_refusal`
    has returned "". All names begin with petl_, since all others belong to other people's modules.

    Attributes:
        petl_name: in reports.
        petl_op: of `petl_ext.ops`, which computes it.
        petl_published: whose code it is and what it is called there, for error messages.
        petl_settings: of a module, not of the class: its `Settings`.
    """

    petl_name: str
    petl_op: str
    petl_published: str

    @staticmethod
    def petl_looks_like(module):
        """Whether it has the names by which the kind is known."""
        raise NotImplementedError

    @staticmethod
    def petl_refusal(module):
        """Why its parts are not the kind's, read after "left alone: "; "" if they are."""
        raise NotImplementedError

    @staticmethod
    def petl_candidates(module):
        """The `Settings` that it may have: its parts do not show all that its forward does."""
        raise NotImplementedError

    @staticmethod
    def petl_examples(module, draw, *size):
        """[arguments for its forward, ...] that together tell the kind's formula from any other, of `size` rows; none
        where it knows no inputs of so many axes. `draw` makes a random tensor of a shape."""
        raise NotImplementedError

    @staticmethod
    def petl_compute(module, *arguments):
        """What its forward returns for these arguments, by the op. It has its `petl_settings`."""
        raise NotImplementedError

    @staticmethod
    def petl_dropout(module):
        """The probability at which it drops out now."""
        return 0.0

    @staticmethod
    def petl_sizes(module):
        """(width, inner size): prompts, bottleneck or heads. The CUDA kernels bound both."""
        raise NotImplementedError


# They change with modes and hooks.
_OF_EVERY_MODULE = vars(nn.Module()).keys()
_PLAIN = (bool, int, float, str, type(None), types.FunctionType, types.BuiltinFunctionType)
# Their weights alone tell what they compute.
_WEIGHTS_ALONE = (nn.Linear, nn.LayerNorm, nn.Sequential)


def plain_attributes(module):
    """((index in `module.modules()`, name, value), ...) of all attributes that are numbers, words, switches or
    functions."""
    return tuple(
        (index, name, value)
        for index, part in enumerate(module.modules())
        for name, value in vars(part).items()
        if type(part) not in _WEIGHTS_ALONE and name not in _OF_EVERY_MODULE and isinstance(value, _PLAIN)
    )


def own_forward(cls):
    """A class's forward as it is without `patch_class`."""
    return getattr(cls.forward, "petl_original", cls.forward)


def names_in(module):
    """The names of what it holds: parts, parameters and buffers."""
    tables = (module._modules, module._parameters, module._buffers)
    return {name for table in tables for name, held in table.items() if held is not None}


def refuse_names(module, needed, allowed=()):
    extra, missing = names_in(module) - {*needed, *allowed}, set(needed) - names_in(module)
    if extra:
        return f"it also has {', '.join(sorted(extra))}"
    return f"it lacks {', '.join(sorted(missing))}" if missing else ""


def refuse_linear(*parts):
    wrong = [part for part in parts if type(part) is not nn.Linear or part.bias is None]
    return f"a projection is {described(wrong[0])}, not nn.Linear with a bias" if wrong else ""


def refuse_bottleneck(down, up, norm=None):
    """Of LayerNorm, where there is one, and two projections."""
    if reason := refuse_linear(down, up):
        return reason
    width, bottleneck = down.in_features, down.out_features
    if (up.in_features, up.out_features) != (bottleneck, width):
        return f"its projections are {width} to {bottleneck} and {up.in_features} to {up.out_features}"
    if norm is None:
        return ""
    if type(norm) is not nn.LayerNorm or norm.normalized_shape != (width,) or norm.bias is None:
        return f"its norm is {described(norm)}, not nn.LayerNorm({width}) with a weight and a bias"
    return ""


def refuse_scale(scale):
    if isinstance(scale, torch.Tensor):
        return "" if scale.shape == (1,) else f"its scale has the shape {list(scale.shape)}, not [1]"
    return "" if type(scale) in (int, float) else f"its scale is {described(scale)}"


def refuse_dropout(part):
    return "" if type(part) is nn.Dropout else f"its dropout is {described(part)}, not nn.Dropout"


def described(part):
    """What it is, in a few words."""
    if isinstance(part, nn.Sequential):
        return f"Sequential({', '.join(type(layer).__name__ for layer in part)})"
    if isinstance(part, torch.Tensor):
        return f"a tensor of the shape {list(part.shape)}"
    if not isinstance(part, nn.Module):
        return getattr(part, "__name__", None) or repr(part)
    its_class = type(part)
    if getattr(nn, its_class.__name__, its_class) is not its_class:
        return f"{its_class.__module__}.{its_class.__name__}"  # It has the name of one of PyTorch's.
    return its_class.__name__ if part._modules else repr(part)


def dropout_of(part):
    return part.p if part.training else 0.0


def promoted(out, scale):
    """A trained scale in float32 makes the originals' output float32, under autocast too."""
    return out.to(torch.promote_types(out.dtype, scale.dtype)) if isinstance(scale, torch.Tensor) else out
