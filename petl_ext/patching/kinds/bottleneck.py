"""Bottlenecks of any code: known by their parts and by what their forward computes, whatever they are called."""

import inspect
import itertools
from functools import partial

import torch
from torch import nn

from petl_ext.ops.adapter import ACTIVATIONS, adapter
from petl_ext.patching.activation import OTHERS, name_of
from petl_ext.patching.dispatch import entered_autocast, own_forward_because
from petl_ext.patching.formula import Parts, formulas_of, part_at, projections_in, scale_of, sizes_of
from petl_ext.patching.kind import (
    PLAIN,
    Kind,
    Settings,
    as_gain,
    bias_of,
    dropout_of,
    norm_arguments,
    promoted,
    refuse_bottleneck,
    refuse_scale,
    spatial_axes,
    weight_of,
)

# Whose modules hold the one that computes. What copying them would do concerns other processes too.
_WRAPPERS = ("torch.nn.parallel", "torch.distributed.fsdp.fully_sharded_data_parallel", "torch._dynamo")
_TENSOR = "<a tensor>"  # in the place of one, in what is noted of a call


class Bottleneck(Kind):
    """[x +] s * [LN](up(act(down([LN] x)))), by the op but for a LayerNorm behind."""

    petl_name = "bottleneck adapter"
    petl_op = "adapter"
    petl_published = "[x +] s * [LN](up(act(down([LN] x)))), of two projections from a width to less and back"
    petl_is_general = True
    petl_reenters_autocast = True

    def forward(self, *arguments, **named):
        settings, out = self.petl_settings, None
        call = _call(settings, arguments, named)
        if call is not None:
            if settings.autocast:
                with entered_autocast(settings, call[0].device.type):
                    out = _by_op(self, *call)
            else:
                out = _by_op(self, *call)
        return super().forward(*arguments, **named) if out is None else out

    @staticmethod
    def petl_looks_like(module):
        its_class = type(module)
        if its_class.forward is nn.Module.forward or its_class.__module__.startswith(_WRAPPERS):
            return False
        found = list(itertools.islice(projections_in(module), 3))
        if len(found) != 2:
            return False
        (width, inner), (narrow, wide) = map(sizes_of, found)
        return inner < width and narrow < wide

    @staticmethod
    def petl_refusal(module):
        parts = Parts(module)
        if len(parts.norms) > 1:
            return f"it has {len(parts.norms)} LayerNorms, {' and '.join(parts.norms)}"
        if parts.others:
            return f"it also has {', '.join(sorted(parts.others))}"
        if len(parts.scales) > 1:
            return f"it has {len(parts.scales)} scales, {' and '.join(sorted(parts.scales))}"
        norm = next(iter(parts.norms.values()), None)
        return next(filter(None, map(refuse_scale, parts.scales.values())), "") or refuse_bottleneck(
            *parts.projections.values(), norm
        )

    @classmethod
    def petl_takes(cls, forward):
        """One tensor and arguments with plain defaults."""
        _, *taken = inspect.signature(forward).parameters.values()
        named = [p for p in taken if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
        if not named or named[0].kind is inspect.Parameter.KEYWORD_ONLY:
            return False
        kinds_fit = all(p.kind is not inspect.Parameter.POSITIONAL_ONLY for p in named[1:])
        return kinds_fit and all(p.default is not p.empty and isinstance(p.default, PLAIN) for p in named[1:])

    @classmethod
    def petl_arguments(cls):
        return "one tensor and arguments that have plain defaults"

    @staticmethod
    def petl_resolved(module, settings):
        formula = settings.formula
        norm = None if formula.norm is None else id(part_at(module, formula.norm))
        scale = scale_of(module, formula.scale)
        scale = id(scale) if isinstance(scale, torch.Tensor) else scale
        parts = id(part_at(module, formula.down)), id(part_at(module, formula.up)), norm, formula.norm_is_last
        added = [index for given, index in formula.residuals if given == formula.defaults]
        return *parts, scale, formula.scale_is_last, *added, settings.activation, settings.axis, settings.autocast

    @staticmethod
    def petl_candidates(module):
        spatial = spatial_axes(next(projections_in(module)))
        return [
            Settings(activation, formula=formula, axis=axis)
            for axis in dict.fromkeys((-1, -1 - spatial))
            for formula in formulas_of(module)
            for activation in ACTIVATIONS
        ]

    @staticmethod
    def petl_examples(module, draw, *size):
        return _examples(module.petl_settings.formula.defaults, module, draw, *size)

    @staticmethod
    def petl_variants(settings):
        calls = _other_calls(settings.formula.defaults)
        return [(partial(_also_called, given), partial(_examples, given)) for given in calls]

    @staticmethod
    def petl_explanation(module, outputs, run):
        inner = weight_of(part_at(module, module.petl_settings.formula.down)).size(0)
        if isinstance(outputs, (tuple, list)):
            hidden = [out for out in outputs if isinstance(out, torch.Tensor) and inner in out.shape[-1:]]
            return (
                "its forward returns its hidden units too" if hidden else f"its forward returns {len(outputs)} values"
            )
        if not isinstance(outputs, torch.Tensor):
            return f"its forward returns {type(outputs).__name__}, no tensor"
        return _between(module, run)

    @staticmethod
    def petl_compute(module, *arguments):
        call = _call(module.petl_settings, arguments, {})
        with entered_autocast(module.petl_settings, call[0].device.type):
            return _computed(module, *call)

    @staticmethod
    def petl_change(module):
        formula = module.petl_settings.formula
        down, up = part_at(module, formula.down).weight, part_at(module, formula.up).weight
        if down.dim() < 2 or up.dim() < 2 or down.size(0) != up.size(1) or down.size(1) != up.size(0):
            return f"its projections have the shapes {list(down.shape)} and {list(up.shape)}"
        return refuse_scale(scale_of(module, formula.scale))

    @staticmethod
    def petl_composed(module):
        return "LayerNorm" if module.petl_settings.formula.norm_is_last else ""

    @staticmethod
    def petl_sizes(module):
        return weight_of(part_at(module, module.petl_settings.formula.up)).shape


def _other_calls(defaults):
    """Switches turned, and tensors in the place of None; not of more than three such arguments."""
    choices = [(x, not x) if isinstance(x, bool) else (x, _TENSOR) if x is None else (x,) for x in defaults]
    several = sum(len(choice) > 1 for choice in choices) <= 3
    return [given for given in itertools.product(*choices) if given != defaults] if several else []


def _also_called(given, settings):
    """Candidates that are called so too."""
    formula = settings.formula
    added = (0, None, *(index for index, value in enumerate(given, 1) if value == _TENSOR))
    formulas = [formula._replace(residuals=(*formula.residuals, (given, index))) for index in added]
    return [settings._replace(formula=formula) for formula in formulas]


def _examples(given, module, draw, *size):
    settings = module.petl_settings
    width = weight_of(part_at(module, settings.formula.up)).size(0)
    size = (*size, *(1,) * (-2 - settings.axis))
    before = len(size) + 1 + settings.axis
    if before < 0:
        return []
    shape = (*size[:before], width, *size[before:])
    return [(draw(*shape), *(draw(*shape) if value == _TENSOR else value for value in given))]


def _call(settings, arguments, named):
    """(x, what is added or None) of a call of the forward; None where it is none of those that are known."""
    if settings is None:
        return None
    residuals = settings.formula.residuals
    values = arguments if len(arguments) == 1 and not named else _bound(settings.formula.parameters, arguments, named)
    if not values or not isinstance(values[0], torch.Tensor) or values[0].dim() < -settings.axis:
        return None
    if len(values) == 1:  # The first way to call it, by far the most frequent one, is with nothing else.
        return values[0], values[0] if residuals[0][1] == 0 else None
    x, *others = values
    given = tuple(_TENSOR if isinstance(value, torch.Tensor) else value for value in others)
    if not all(isinstance(value, PLAIN) for value in given):
        return None
    if any(isinstance(value, torch.Tensor) and value.shape != x.shape for value in others):
        return None
    for known, added in residuals:
        if known == given:
            return x, None if added is None else values[added]
    return None


def _bound(parameters, arguments, named):
    """The values of all parameters; () where arguments and parameters do not fit."""
    names = [name for name, _ in parameters[len(arguments) :]]
    if len(arguments) > len(parameters) or any(name not in names for name in named):
        return ()
    return (*arguments, *(named.get(name, default) for name, default in parameters[len(arguments) :]))


def _by_op(module, x, residual):
    """What the op returns; None where the module's own forward is to run."""
    if own_forward_because(module, _rows(x, module.petl_settings.axis)) or not _dtypes_fit(module, x):
        return None
    return _computed(module, x, residual)


def _dtypes_fit(module, x):
    """Whether its own forward, as far as can be told, gives the dtype that the op gives: the op takes all mixtures."""
    device = x.device.type
    if torch.is_autocast_enabled(device):
        return x.dtype in (torch.float32, torch.get_autocast_dtype(device))
    return x.dtype is part_at(module, module.petl_settings.formula.down).weight.dtype


def _rows(x, axis):
    """With the channels last; of None, None."""
    return x if axis == -1 or x is None else x.movedim(axis, -1)


def _computed(module, x, residual):
    settings, formula = module.petl_settings, module.petl_settings.formula
    down, up = part_at(module, formula.down), part_at(module, formula.up)
    norm = None if formula.norm is None else part_at(module, formula.norm)
    scale = scale_of(module, formula.scale)
    rows = _rows(x, settings.axis)
    added = rows if residual is x else _rows(residual, settings.axis)
    out = adapter(
        rows,
        weight_of(down),
        bias_of(down),
        weight_of(up),
        bias_of(up),
        1.0 if formula.scale_is_last else as_gain(scale),
        settings.activation,
        **norm_arguments(None if formula.norm_is_last else norm, like=down.weight),
        residual=None if formula.norm_is_last else added,
        dropout=dropout_of(module),
    )
    if not formula.scale_is_last:
        out = promoted(out, scale)
    if formula.norm_is_last:
        out = norm(out) * scale if formula.scale_is_last else norm(out)
        out = out if added is None else added + out
    return out if settings.axis == -1 else out.movedim(-1, settings.axis).contiguous()


def _between(module, run):
    """What a forward does between its projections that the op cannot, where it calls them."""
    formula, met = module.petl_settings.formula, {}
    hooks = [
        part_at(module, formula.down).register_forward_hook(lambda part, given, out: met.update(before=out.clone())),
        part_at(module, formula.up).register_forward_pre_hook(lambda part, given: met.update(after=given[0].clone())),
    ]
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    if met.keys() != {"before", "after"} or name_of(ACTIVATIONS, *met.values()):
        return ""
    known = " or ".join(ACTIVATIONS)
    if found := name_of(OTHERS, *met.values()):
        return f"its activation computes {found}, not {known}"
    return f"what it computes between its projections is not {known}"
