"""Compares what a module's forward does with what an op computes, on a copy with random parameters, in float64."""

import contextlib
import copy
import sys

import torch
from torch import nn

from petl_ext.patching.held import changed, held, same_values, snapshot
from petl_ext.patching.kind import own_forward

# (leading sizes of the inputs, what they are multiplied by). Forwards may branch on a batch or a length, and some clamp
# what is large; larger inputs would outdo DVP's mask of -1e9.
PROBES = (((2, 3), 1.0), ((2, 3), 1e3), ((1, 1), 1.0), ((8, 5), 1.0), ((640, 1), 1.0), ((1, 640), 1.0))
# The same of inputs with more or fewer axes than [batch, tokens, width], which a module need not take.
OTHER_AXES = ((7,), (2, 2, 3))


class Difference(Exception):
    """The forward does something that the op does not; says what."""


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
        for size, scale in PROBES:
            for arguments in kind.petl_examples(twin, draw, *size):
                candidates = _matching(candidates, kind, twin, _scaled(arguments, scale))
        vars(twin)["petl_settings"] = candidates[0]
        for arguments in kind.petl_examples(twin, draw, *PROBES[0][0]):
            _check_gradients(kind, twin, arguments)
        axes = [len(size) + 1 for size in OTHER_AXES if _takes(candidates, kind, twin, draw, size)]
        return candidates[0]._replace(axes=(3, *axes))


@contextlib.contextmanager
def _undisturbed():
    """Outside of the caller's modes, without drawing from the caller's random numbers, and without compiling."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=[]))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.autocast("cpu", enabled=False))
        stack.enter_context(torch.autograd.graph.saved_tensors_hooks(_as_it_is, _as_it_is))
        if "torch._dynamo" in sys.modules:  # Before it is imported, which takes long, nothing can have been compiled.
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        yield


def _as_it_is(tensor):
    return tensor


def _random_twin(module):
    """(a copy on the CPU in float64, with random parameters and no dropout; what draws such tensors)."""
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
    for part in twin.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.0
    if "dropout" in vars(twin):
        twin.dropout = 0.0
    return twin, draw


def _each_once(function, arguments):
    """The arguments, their tensors replaced; two that are the same tensor, as keys and values may be, stay the same."""
    replaced = {id(x): function(x) for x in arguments if isinstance(x, torch.Tensor)}
    return [replaced.get(id(x), x) for x in arguments]


def _scaled(arguments, scale):
    return _each_once(lambda x: x * scale if x.is_floating_point() else x, arguments)


def _takes(candidates, kind, twin, draw, size):
    """Whether the op stands for the forward with inputs of other axes too."""
    examples = kind.petl_examples(twin, draw, *size)
    try:
        return bool(examples) and all(_matching(candidates, kind, twin, arguments) for arguments in examples)
    except Difference:
        return False


def _matching(candidates, kind, twin, arguments):
    """Those candidates with which the op gives what the twin's forward gives for these arguments."""
    for training in (False, True):
        twin.train(training)  # A train() of other people's may return nothing.
        where = _described(arguments, training)
        with torch.set_grad_enabled(training):
            theirs = _own_outputs(twin, arguments, where)
            candidates = [settings for settings in candidates if _same(theirs, kind, twin, settings, arguments)]
        if not candidates:
            raise Difference(f"its forward computes something else{where} than {kind.petl_published}")
    return candidates


def _described(arguments, training):
    """Which inputs these are, for a message: nothing is said of the first probe's."""
    shape = list(arguments[0].shape)
    size = "" if tuple(shape[:-1]) == PROBES[0][0] else f" for {shape}"
    return f"{size} in training" if training else size


def _own_outputs(twin, arguments, where):
    before, given, drawn = snapshot(twin), _each_once(torch.clone, arguments), torch.get_rng_state()
    try:
        outputs = own_forward(type(twin))(twin, *given)
    except Exception as error:  # It is other people's and may do anything.
        raise Difference(f"its forward raises {type(error).__name__}{where}: {error}") from error
    if name := changed(before, twin):
        raise Difference(f"its forward sets {name}{where}")
    if not all(same_values(x, y) for x, y in zip(arguments, given, strict=True) if isinstance(x, torch.Tensor)):
        raise Difference(f"its forward changes its input{where}")
    if not torch.equal(drawn, torch.get_rng_state()):
        raise Difference(f"its forward draws random numbers{where}")
    return _as_tuple(outputs)


def _as_tuple(outputs):
    return outputs if isinstance(outputs, tuple) else (outputs,)


def _same(theirs, kind, twin, settings, arguments):
    vars(twin)["petl_settings"] = settings
    ours = _as_tuple(kind.petl_compute(twin, *arguments))
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
            outputs = _as_tuple(own_forward(type(twin))(twin, *arguments))
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
