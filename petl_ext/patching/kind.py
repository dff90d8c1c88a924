"""What a kind of module is to `patch`, and what its parts must be."""

import inspect
import types
from typing import NamedTuple

import torch
from torch import nn

from petl_ext.composing import Composable


class Settings(NamedTuple):
    """What was found out about a module when it was recognized; the module keeps it as `petl_settings`.

    Attributes:
        activation: as the op names it; "" where there is none.
        adds_residual: whether a bottleneck of the library adapters adds its residual.
        formula: the steps of a kind that is known by them alone, as it writes them down.
        dropout: the greatest probability at which its forward drops out in training.
        dropout_by: where the op drops out the same, the index in `module.modules()` of the one that drops out while it
            is in training; else None.
        autocast: ((type of device, whether it is on there or None where that could not be seen, dtype or None for
            autocast's own), ...) of the autocast that its forward enters.
        parts: the classes of the modules inside it.
        attributes: of it and of its parts, what `plain_attributes` gives: its forward may go by them.
        tensors: what `tensor_names` gives.
        axis: that of the channels in its inputs, counted from the end.
        axes: how many its inputs may have for the op to give what its forward gives.
    """

    activation: str = ""
    adds_residual: bool = True
    formula: tuple | None = None
    dropout: float = 0.0
    dropout_by: int | None = None
    autocast: tuple = ()
    parts: tuple = ()
    attributes: tuple = ()
    tensors: tuple = ()
    axis: int = -1
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
        petl_is_general: whether a module is of the kind by what it computes, whatever it is called. Kinds that go by
            names come before it, and parts of such a module may be of the kind too.
        petl_reenters_autocast: whether `petl_compute` enters the autocast of the settings.
        petl_settings: of a module, not of the class: its `Settings`. None of what is made of pieces of a patched
            module, such as a slice of an nn.Sequential, which runs its own forward.
    """

    petl_name: str
    petl_op: str
    petl_published: str
    petl_is_general = False
    petl_reenters_autocast = False
    petl_settings = None

    @staticmethod
    def petl_looks_like(module):
        """Whether it has the names, or the parts, by which the kind is known."""
        raise NotImplementedError

    @staticmethod
    def petl_refusal(module):
        """Why its parts are not the kind's, read after "left alone: "; "" if they are."""
        raise NotImplementedError

    @classmethod
    def petl_takes(cls, forward):
        """Whether `forward`, a module's own, takes what the kind's takes."""
        return _arguments(forward) == _arguments(cls.forward)

    @classmethod
    def petl_arguments(cls):
        """What it takes, for messages."""
        return inspect.signature(cls.forward)

    @staticmethod
    def petl_resolved(module, settings):
        """Equal for two modules, of which one is within the other, that compute the same of the same parts; of a
        general kind."""
        raise NotImplementedError

    @staticmethod
    def petl_candidates(module):
        """The `Settings` that it may have: its parts do not show all that its forward does."""
        raise NotImplementedError

    @staticmethod
    def petl_examples(module, draw, *size):
        """[arguments for its forward, ...] that together tell the kind's formula from any other, of `size` rows; none
        where it knows no inputs of so many axes. `draw` makes a random tensor of a shape. It has one of the candidates
        as its `petl_settings`."""
        raise NotImplementedError

    @staticmethod
    def petl_variants(settings):
        """[(what makes candidates of the settings found so far, what makes examples as `petl_examples` does), ...] of
        other ways to call a module that was found to have these settings. It runs its own forward for calls of which no
        candidate matches."""
        return ()

    @staticmethod
    def petl_explanation(module, outputs, run):
        """In what a module differs from the kind that returned `outputs`, read after "left alone: "; "" where that
        cannot be told. `run` calls its forward once more."""
        return ""

    @staticmethod
    def petl_compute(module, *arguments):
        """What its forward returns for these arguments, by the op. It has its `petl_settings`. Of a kind whose op has
        dropout, the op is given `dropout_of(module)`."""
        raise NotImplementedError

    @staticmethod
    def petl_change(module):
        """What is no longer as it was when it was recognized, beside what its settings tell; "" where nothing is."""
        return ""

    @staticmethod
    def petl_composed(module):
        """What PyTorch computes beside the op, for reports; "" where that is nothing to speak of."""
        return ""

    @staticmethod
    def petl_sizes(module):
        """(width, inner size): prompts, bottleneck or heads. The CUDA kernels bound both."""
        raise NotImplementedError


def _arguments(forward):
    return [(p.name, p.default, p.kind) for p in inspect.signature(forward).parameters.values()]


# They change with modes and hooks.
_OF_EVERY_MODULE = vars(nn.Module()).keys()
PLAIN = (bool, int, float, str, type(None), types.FunctionType, types.BuiltinFunctionType)
# Their weights alone tell what they compute.
_WEIGHTS_ALONE = (nn.Linear, nn.Sequential)


def plain_attributes(module):
    """((index in `module.modules()`, name, value), ...) of all attributes that are numbers, words, switches, functions
    or tuples of such."""
    return tuple(
        (index, name, value)
        for index, part in enumerate(module.modules())
        for name, value in vars(part).items()
        if type(part) not in _WEIGHTS_ALONE and name not in _OF_EVERY_MODULE and _is_plain(value)
    )


def _is_plain(value):
    return isinstance(value, PLAIN) or (type(value) is tuple and all(isinstance(part, PLAIN) for part in value))


def tensor_names(module):
    """The names of the parameters and buffers that each of `module.modules()` itself holds: what joins them later may
    change what the forward does."""
    return tuple(
        tuple(name for table in (part._parameters, part._buffers) for name, held in table.items() if held is not None)
        for part in module.modules()
    )


def new_tensor(modules, known):
    """The name of a tensor that one of the modules holds and that is not among `known`, what `tensor_names` gave; ""
    where there is none."""
    for part, names in zip(modules, known, strict=True):
        for table in (part._parameters, part._buffers):
            for name, tensor in table.items():
                if tensor is not None and name not in names:
                    return name
    return ""


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


_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def refuse_bottleneck(down, up, norm=None):
    """Of LayerNorm, where there is one, and two projections."""
    if wrong := [part for part in (down, up) if not _is_projection(part)]:
        return f"a projection is {described(wrong[0])}, neither nn.Linear nor a 1 x 1 convolution of one group"
    bottleneck, width = weight_of(down).shape
    outer, inner = weight_of(up).shape
    if (inner, outer) != (bottleneck, width):
        return f"its projections are {width} to {bottleneck} and {inner} to {outer}"
    if norm is not None and (type(norm) is not nn.LayerNorm or norm.normalized_shape != (width,)):
        return f"its norm is {described(norm)}, not nn.LayerNorm({width})"
    return ""


def _is_projection(part):
    if type(part) in _CONVOLUTIONS:
        one, none = (1,) * len(part.kernel_size), (0,) * len(part.kernel_size)
        return (part.kernel_size, part.stride, part.padding, part.groups) == (one, one, none, 1)
    return type(part) is nn.Linear


def spatial_axes(part):
    """How many axes a projection reads behind its channels: none if it is no convolution."""
    return len(part.kernel_size) if type(part) in _CONVOLUTIONS else 0


def weight_of(projection):
    """[out, in] of nn.Linear or a 1 x 1 convolution."""
    weight = projection.weight
    return weight if weight.dim() == 2 else weight.flatten(1)


def bias_of(projection):
    bias = projection.bias
    return projection.weight.new_zeros(projection.weight.size(0)) if bias is None else bias


def norm_arguments(norm, like):
    """What `ops.adapter` takes of a LayerNorm, or of None; what it lacks is made as `like` is."""
    if norm is None:
        return {}
    weight = like.new_ones(norm.normalized_shape) if norm.weight is None else norm.weight
    bias = torch.zeros_like(weight) if norm.bias is None else norm.bias
    return {"norm_weight": weight, "norm_bias": bias, "eps": norm.eps}


def refuse_scale(scale):
    if isinstance(scale, torch.Tensor):
        return "" if scale.shape in ((), (1,)) else f"its scale has the shape {list(scale.shape)}, not [] or [1]"
    return "" if type(scale) in (int, float) else f"its scale is {described(scale)}"


def as_gain(scale):
    """A scale as `ops.adapter` takes it."""
    return scale.reshape(1) if isinstance(scale, torch.Tensor) else scale


def refuse_dropout(part):
    return "" if type(part) is nn.Dropout else f"its dropout is {described(part)}, not nn.Dropout"


def dropout_of(module):
    """The probability at which it drops out now by its `petl_settings`, or at most where these do not tell what
    decides."""
    settings = module.petl_settings
    if settings.dropout == 0.0:
        return 0.0
    parts = list(module.modules())
    if settings.dropout_by is not None:
        parts = [parts[settings.dropout_by]]
    return settings.dropout if any(part.training for part in parts) else 0.0


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


def promoted(out, scale):
    """A trained scale [1] in float32 makes the originals' output float32, under autocast too; one of the shape [] does
    not."""
    if not isinstance(scale, torch.Tensor) or scale.dim() == 0:
        return out
    return out.to(torch.promote_types(out.dtype, scale.dtype))
