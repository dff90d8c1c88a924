"""Compares what a module's forward does with what an op computes, on a copy with random parameters, in float64."""

import contextlib
import copy
import sys
import warnings

import torch
from torch import nn

from petl_ext.ops.backends import REFERENCE, backend
from petl_ext.patching.held import changed, held, same_values, snapshot
from petl_ext.patching.kind import own_forward
from petl_ext.patching.watch import Watch, autocast_everywhere, own_autocast

# (leading sizes of the inputs, what they are multiplied by). Forwards may branch on a batch or a length, and some clamp
# what is large; larger inputs would outdo DVP's mask of -1e9.
PROBES = (((2, 3), 1.0), ((2, 3), 1e3), ((1, 1), 1.0), ((8, 5), 1.0), ((640, 1), 1.0), ((1, 640), 1.0))
# By what scales are multiplied meanwhile, since a forward may take their size or less than all of their range.
_FACTORS = (1.0, -1.0, 0.05, -0.05, 5.0, -5.0)
# The same of inputs with more or fewer axes than [batch, tokens, width], which a module need not take.
OTHER_AXES = ((7,), (2, 2, 3))
# (dtype of the weights, of the inputs, of autocast where it is on); the last ones last, as the twin is cast to them.
_DTYPES = (
    (torch.float32, torch.float32, {}),
    (torch.float32, torch.float32, {"cpu": torch.bfloat16}),
    (torch.float32, torch.bfloat16, {"cpu": torch.bfloat16}),
    (torch.bfloat16, torch.bfloat16, {}),
)


class Difference(Exception):
    """The forward does something that the op does not; says what."""


class _Raised(Difference):
    """It raises."""


def probe(kind, module):
    """The one of the kind's candidates, a `Settings`, with which the op does what the module's forward does, with its
    attributes, in training and in eval mode: names and shapes do not show constants, the order of steps or side
    effects.

    Raises:
        Difference: there are none.
    """
    with _undisturbed():
        twin, draw = _random_twin(module)
        candidates = [settings for settings in kind.petl_candidates(twin) if settings.activation is not None]
        if not candidates:
            raise Difference("what its activation computes depends on its parameters or buffers")
        settings, calls = _of_some_layout(candidates, kind, twin, draw), [kind.petl_examples]
        for choose, examples in kind.petl_variants(settings):
            with contextlib.suppress(Difference):  # Calls of this form run its own forward.
                settings = _passing(choose(settings), kind, twin, draw, examples)
                calls.append(examples)
        vars(twin)["petl_settings"] = settings
        example = kind.petl_examples(twin, draw, *PROBES[0][0])[0]
        others = (_axes_taken(settings, kind, twin, draw, size) for size in OTHER_AXES)
        settings = settings._replace(axes=(example[0].dim(), *filter(None, others)))
        settings = _dropping(settings, kind, twin, draw, calls)
        return _modes(settings, kind, twin, example)


@contextlib.contextmanager
def _undisturbed():
    """Outside of the caller's modes, without drawing from the caller's random numbers, without compiling, and without
    the warnings of other people's code, which come again when it is called."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=[]))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(autocast_everywhere())
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        # Detached: an output that its own node keeps as it is would hold the node, and neither is ever freed.
        stack.enter_context(torch.autograd.graph.saved_tensors_hooks(torch.Tensor.detach, _as_it_is))
        if "torch._dynamo" in sys.modules:  # Before it is imported, which takes long, nothing can have been compiled.
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        yield


def _as_it_is(tensor):
    return tensor


def _random_twin(module):
    """(a copy on the CPU in float64, with random parameters; what draws such tensors)."""
    computed = [name for name, value in held(module).items() if isinstance(value, torch.Tensor) and value.grad_fn]
    if computed:
        raise Difference(f"it keeps {computed[0].lstrip('.')}, which has been computed: a forward seems to set it")
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu")

    try:
        twin = copy.deepcopy(module).to_empty(device="cpu").double().requires_grad_()
    except Exception as error:  # It is other people's and may hold anything.
        raise Difference(f"no copy of it can be made: {error}") from error
    for tensor in (*twin.parameters(), *twin.buffers()):
        # Of this size, what a sum over the width adds up to is about 1, as are the other tensors.
        size = tensor.size(-1) ** -0.5 if tensor.dim() == 2 else 1.0
        tensor.data = draw(*tensor.shape) * size
    return twin, draw


def _of_some_layout(candidates, kind, twin, draw):
    """The settings that match, of inputs with the channels where these settings have them."""
    differences = []
    for axis in dict.fromkeys(settings.axis for settings in candidates):
        try:
            return _passing([s for s in candidates if s.axis == axis], kind, twin, draw, kind.petl_examples)
        except Difference as difference:
            differences.append(difference)
    # Inputs of another layout than it takes make it raise.
    raise next((found for found in differences if not isinstance(found, _Raised)), differences[0])


def _passing(candidates, kind, twin, draw, examples):
    """The first of the candidates with which the op does what the forward does, for examples of all sizes."""
    held_now = (*twin.parameters(), *twin.buffers())
    before = [(tensor, tensor.data.clone()) for tensor in held_now if tensor.is_floating_point()]
    # Behind a norm large inputs are large no more.
    has_norm = any(isinstance(part, nn.LayerNorm) for part in twin.modules())
    for (size, multiple), factor in zip(PROBES, _FACTORS, strict=True):
        for tensor, value in before:
            tensor.data = value * (factor if value.numel() == 1 else multiple if has_norm else 1.0)
        vars(twin)["petl_settings"] = candidates[0]
        for arguments in examples(twin, draw, *size):
            candidates = _matching(candidates, kind, twin, _scaled(arguments, multiple), size)
    for tensor, value in before:
        tensor.data = value
    vars(twin)["petl_settings"] = candidates[0]
    for arguments in examples(twin, draw, *PROBES[0][0]):
        _check_gradients(kind, twin, arguments)
    return candidates[0]


def _each_once(function, arguments):
    """The arguments, their tensors replaced; two that are the same tensor, as keys and values may be, stay the same."""
    replaced = {id(x): function(x) for x in arguments if isinstance(x, torch.Tensor)}
    return [replaced.get(id(x), x) for x in arguments]


def _scaled(arguments, scale):
    return _each_once(lambda x: x * scale if x.is_floating_point() else x, arguments)


def _axes_taken(settings, kind, twin, draw, size):
    """The number of axes of inputs of `size` rows, if the op stands for the forward with such inputs too, or None."""
    examples = kind.petl_examples(twin, draw, *size)
    try:
        for arguments in examples:
            _matching([settings], kind, twin, arguments, size)
    except Difference:
        return None
    return examples[0][0].dim() if examples else None


def _matching(candidates, kind, twin, arguments, size):
    """Those candidates with which the op gives what the twin's forward gives for these arguments."""
    for training in (False, True):
        twin.train(training)  # A train() of other people's may return nothing.
        # Nothing is said of the first probe's size.
        where = "" if size == PROBES[0][0] else f" for {list(arguments[0].shape)}"
        where += " in training" if training else ""
        with torch.set_grad_enabled(training):
            theirs = _own_outputs(twin, arguments, where, training)
            matching = [settings for settings in candidates if _same(theirs, kind, twin, settings, arguments)]
            if not matching:
                vars(twin)["petl_settings"] = candidates[0]
                explanation = kind.petl_explanation(twin, theirs, lambda: _run(twin, arguments))
                raise Difference(
                    f"{explanation}{where}"
                    if explanation
                    else f"its forward computes something else{where} than {kind.petl_published}"
                )
        candidates = matching
    return candidates


def _run(twin, arguments, **options):
    """(what its own forward returns without dropping out, the `Watch` of these options that watched it)."""
    with Watch(**options) as watch:
        return own_forward(type(twin))(twin, *arguments), watch


def _own_outputs(twin, arguments, where, training):
    before, given, drawn = snapshot(twin), _each_once(torch.clone, arguments), torch.get_rng_state()
    try:
        outputs, watch = _run(twin, given)
    except Exception as error:  # It is other people's and may do anything.
        raise _Raised(f"its forward raises {type(error).__name__}{where}: {error}") from error
    if name := changed(before, twin):
        raise Difference(f"its forward sets {name}{where}")
    if not all(same_values(x, y) for x, y in zip(arguments, given, strict=True) if isinstance(x, torch.Tensor)):
        raise Difference(f"its forward changes its input{where}")
    if not torch.equal(drawn, torch.get_rng_state()):
        raise Difference(f"its forward draws random numbers{where}")
    if watch.dropouts and not training:
        raise Difference("its forward drops out in evaluation too")
    return outputs


def _as_tuple(outputs):
    return outputs if isinstance(outputs, tuple) else (outputs,)


def _same(theirs, kind, twin, settings, arguments):
    vars(twin)["petl_settings"] = settings
    theirs, ours = _as_tuple(theirs), _as_tuple(kind.petl_compute(twin, *arguments))
    return len(theirs) == len(ours) and all(
        # The library's hidden units, which nothing uses.
        our is None or (isinstance(their, torch.Tensor) and _close(their, our))
        for their, our in zip(theirs, ours, strict=True)
    )


def _close(their, our):
    if (their.shape, their.dtype) != (our.shape, our.dtype):
        return False
    # Compared as a whole: torch.allclose takes longer than what it compares takes to compute.
    return bool((their - our).abs().max() <= 1e-9 * their.abs().max().clamp(min=1.0))


def _check_gradients(kind, twin, arguments):
    """A forward may detach what the op does not."""
    arguments = _each_once(torch.Tensor.detach, arguments)
    inputs = {id(x): x.requires_grad_() for x in arguments if isinstance(x, torch.Tensor) and x.is_floating_point()}
    leaves = [*inputs.values(), *twin.parameters()]
    with torch.enable_grad():
        ours = _as_tuple(kind.petl_compute(twin, *arguments))
        used = [index for index, our in enumerate(ours) if our is not None]
        try:
            outputs = _as_tuple(_run(twin, arguments)[0])
            theirs = _gradients([outputs[index] for index in used], leaves)
        except Exception as error:  # It is other people's and may do anything.
            raise Difference(f"its backward pass raises {type(error).__name__}: {error}") from error
    if not all(map(_close, theirs, _gradients([ours[index] for index in used], leaves))):
        raise Difference(f"its forward passes other gradients back than {kind.petl_published}")


def _gradients(outputs, leaves):
    weights = [torch.linspace(-1, 1, out.numel(), dtype=out.dtype, device="cpu").view_as(out) for out in outputs]
    weighted = [(out * weight).sum() for out, weight in zip(outputs, weights, strict=True) if out.requires_grad]
    if not weighted:
        return [torch.zeros_like(leaf) for leaf in leaves]
    return torch.autograd.grad(sum(weighted), leaves, allow_unused=True, materialize_grads=True)


def _bent(values):
    """In the place of a dropout: what tells every place in a forward from every other."""
    return values * (1 + 0.5 * torch.sin(values))


def _dropping(settings, kind, twin, draw, calls):
    """The settings with what the forward drops out in training, of calls that are known."""
    vars(twin)["petl_settings"] = settings
    sizes = (*(size for size, _ in PROBES), *OTHER_AXES)
    given = [arguments for examples in calls for size in sizes for arguments in examples(twin, draw, *size)]
    given = [arguments for arguments in given if arguments[0].dim() in settings.axes]
    twin.train(True)
    found = {tuple(_run(twin, arguments)[1].dropouts) for arguments in given}
    settings = settings._replace(dropout=max((p for dropouts in found for p in dropouts), default=0.0))
    if settings.dropout == 0.0 or found != {(settings.dropout,)}:
        return settings
    parts = list(twin.modules())
    deciding = [index for index, part in enumerate(parts) if _drops_for(part, parts, twin, given[0])]
    if len(deciding) != 1:
        return settings
    same = settings._replace(dropout_by=deciding[0])
    twin.train(True)
    return same if all(_drops_as_the_op(same, kind, twin, arguments) for arguments in given) else settings


def _drops_for(chosen, parts, twin, arguments):
    """Whether it drops out where one part alone is in training."""
    for part in parts:
        part.training = part is chosen
    try:
        return bool(_run(twin, arguments)[1].dropouts)
    except Exception:  # It is other people's, and may not know the like.
        return False


def _drops_as_the_op(settings, kind, twin, arguments):
    theirs, watch = _run(twin, arguments, passed=_bent)
    with Watch(passed=_bent) as of_op:
        is_same = _same(theirs, kind, twin, settings, arguments)
    return is_same and watch.dropouts == of_op.dropouts == [settings.dropout]


def _modes(settings, kind, twin, arguments):
    """The settings with what the forward does under autocast."""
    twin.train(False)
    with torch.no_grad():
        _, outside = _run(twin, arguments)
        with autocast_everywhere(cpu=torch.float16, cuda=torch.bfloat16):  # what they are not by default
            try:
                theirs, within = _run(twin, arguments)
            except Exception as error:  # It is other people's and may do anything.
                raise Difference(f"its forward raises {type(error).__name__} under autocast: {error}") from error
            if not _same(theirs, kind, twin, settings, arguments):
                raise Difference("its forward computes something else under autocast")
    try:
        autocast = own_autocast(outside.autocasts, within.autocasts)
    except ValueError as error:
        raise Difference(str(error)) from error
    if autocast and not kind.petl_reenters_autocast:
        raise Difference("it computes in an autocast of its own")
    if outside.casts and any(device != "cpu" for device, _, _ in autocast):
        raise Difference("it computes in an autocast of its own and casts tensors, which only a GPU shows")
    settings = settings._replace(autocast=autocast)
    vars(twin)["petl_settings"] = settings
    _check_dtypes(kind, twin, arguments)
    return settings


def _check_dtypes(kind, twin, arguments):
    """A forward may cast what it returns, which float64 does not show."""
    for weights, given, autocast in _DTYPES:
        nn.Module.to(twin, weights)  # accelerate's `to` of an instance is that of the module it was copied from
        inputs = _each_once(lambda x, dtype=given: x.to(dtype) if x.is_floating_point() else x, arguments)
        with autocast_everywhere(**autocast), torch.no_grad(), backend(REFERENCE):
            try:
                theirs = _as_tuple(_run(twin, inputs)[0])
            except Exception:  # As it is other people's, it may not know the dtype.
                continue
            ours = _as_tuple(kind.petl_compute(twin, *inputs))
        for their, our in zip(theirs, ours, strict=True):
            if our is not None and their.dtype is not our.dtype:
                where = f"{given} with weights of {weights}{' under autocast' if autocast else ''}"
                raise Difference(f"its forward returns {their.dtype} of {where}, not {our.dtype}")
