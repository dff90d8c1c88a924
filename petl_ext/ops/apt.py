"""Approximated prompt tuning: what soft prompts would have told an attention, added to its output.

With x the attention's input, y its output, and one row per token,

    scores = act(x keys^T)    gate = rowmax(scores), detached    out = exp(log_scale) * (y + gate * (scores prompts))

where act is ReLU, or the softmax over the prompts. Source: "Approximated Prompt Tuning for Vision-Language Pre-trained
Models" (arXiv 2306.15706), as the authors' code for ViLT and METER computes it.
"""

from math import prod

import torch
from torch import Tensor

from petl_ext.ops.arrays import takes_arrays
from petl_ext.ops.autocast import as_autocast_wants, rounds_inside
from petl_ext.ops.derivatives import differentiable_gradients
from petl_ext.ops.dropout import check_seeds, dropped_out, new_seeds
from petl_ext.ops.kernels import raw_ops_for, register, takes_packed
from petl_ext.ops.packed import Begun, Packed, data_for

ACTIVATIONS = ("relu", "softmax")

_DROPOUT = "float dropout=0.0, Tensor? seeds=None"
torch.library.define(
    "petl_ext::apt_forward",
    "(Tensor x, Tensor y, Tensor prompts, Tensor keys, Tensor log_scale, str activation, bool keep_scores,"
    f" Tensor? packed=None, {_DROPOUT}, Tensor? begun=None, bool rounds_x=False)"
    " -> (Tensor out, Tensor gate, Tensor scores)",
)
# What apt_forward takes as `packed` where x and y, or what they are computed in, have the dtype of `like`.
torch.library.define("petl_ext::apt_pack", "(Tensor like, Tensor prompts, Tensor keys, str activation) -> Tensor")
# What apt_forward takes as `begun` with the same arguments; empty where it has no part that depends on x alone.
torch.library.define(
    "petl_ext::apt_begin", "(Tensor x, Tensor prompts, Tensor keys, str activation, Tensor packed) -> Tensor"
)
# The scores are those before dropout. An absent y means that nobody asks for dlog_scale; needs_* say which gradients to
# compute, the others come back empty. rounds_x: products are in bfloat16 though x is wider; not all kernels know
# it (`MIXING`).
torch.library.define(
    "petl_ext::apt_backward",
    "(Tensor dout, Tensor x, Tensor? y, Tensor prompts, Tensor keys, Tensor log_scale, Tensor gate, Tensor scores,"
    " str activation, bool needs_dx, bool needs_dy, bool needs_dprompts, bool needs_dkeys, "
    f"{_DROPOUT}, bool rounds_x=False)"
    " -> (Tensor dx, Tensor dy, Tensor dprompts, Tensor dkeys, Tensor dlog_scale)",
)


def check_arguments(x, y, prompts, keys, log_scale, activation):
    """The arguments' checks for float64, meta tensors and torch.compile, which never reach a kernel; the kernels repeat
    them in C++."""
    if torch.jit.is_tracing():  # sizes are tensors, of which it warns
        return
    if activation not in ACTIVATIONS:
        raise RuntimeError(f"apt: activation must be {' or '.join(ACTIVATIONS)}, got {activation}")
    if prompts.dim() != 2 or 0 in prompts.shape:
        raise RuntimeError(f"apt: prompts must have shape [P, D] with no empty axis, got {list(prompts.shape)}")
    width = prompts.size(1)
    if x.dim() == 0 or x.size(-1) != width:
        raise RuntimeError(f"apt: x must have shape [..., {width}], as wide as prompts, got {list(x.shape)}")
    expected = {"y": (y, x.shape), "keys": (keys, prompts.shape), "log_scale": (log_scale, (1,))}
    for name, (tensor, shape) in expected.items():
        if tensor.shape != shape:
            raise RuntimeError(f"apt: {name} must have shape {list(shape)}, got {list(tensor.shape)}")


def apt_reference(
    x: Tensor,
    y: Tensor,
    prompts: Tensor,
    keys: Tensor,
    log_scale: Tensor,
    activation: str = "relu",
    dropout: float = 0.0,
    packed: Packed | None = None,
    seeds: Tensor | None = None,
    begun: Begun | None = None,
) -> Tensor:
    """`apt` in plain PyTorch, in the dtype of x, on any device and in float64 too.

    Args:
        packed, begun: not looked at; no kernel computes.
        seeds: where it is None, torch's own dropout drops out.

    Raises:
        RuntimeError: a shape or the activation is not as `apt` says.
    """
    check_seeds("apt", seeds)
    check_arguments(x, y, prompts, keys, log_scale, activation)
    scores = x @ keys.to(x.dtype).mT
    scores = scores.relu_() if activation == "relu" else scores.softmax(-1)
    scores = dropped_out(scores, dropout, seeds)
    gate = scores.amax(-1, keepdim=True).detach()
    out = log_scale.exp() * (y + gate * (scores @ prompts.to(scores.dtype)))
    return out.to(y.dtype)


@torch.library.register_fake("petl_ext::apt_forward")
def _(
    x,
    y,
    prompts,
    keys,
    log_scale,
    activation,
    keep_scores,
    packed=None,
    dropout=0.0,
    seeds=None,
    begun=None,
    rounds_x=False,
):
    check_arguments(x, y, prompts, keys, log_scale, activation)
    check_seeds("apt", seeds)
    devices = {str(tensor.device) for tensor in (x, y, prompts, keys, log_scale, seeds) if tensor is not None}
    if len(devices) > 1:
        raise RuntimeError(f"apt: all arguments must be on one device, got {', '.join(sorted(devices))}")
    rows = y.numel() // y.size(-1)
    gate = y.new_empty(rows, dtype=torch.float32)
    # Rows of kept scores are whole 16-byte words; in bfloat16 where x and y are, which have no more digits.
    width = (prompts.size(0) + 7) // 8 * 8
    x_is_narrow = rounds_x or x.dtype is torch.bfloat16
    kept = torch.bfloat16 if x_is_narrow and y.dtype is torch.bfloat16 else torch.float32
    scores = y.new_empty((rows, width) if keep_scores else (0,), dtype=kept)
    return y.new_empty(y.shape), gate, scores


@torch.library.register_fake("petl_ext::apt_backward")
def _(
    dout,
    x,
    y,
    prompts,
    keys,
    log_scale,
    gate,
    scores,
    activation,
    needs_dx,
    needs_dy,
    needs_dprompts,
    needs_dkeys,
    dropout=0.0,
    seeds=None,
    rounds_x=False,
):
    def gradient(tensor, needed):
        return tensor.new_empty(tensor.shape if needed else (0,))

    return (
        gradient(x, needs_dx),
        gradient(dout, needs_dy),
        gradient(prompts, needs_dprompts),
        gradient(keys, needs_dkeys),
        gradient(log_scale, y is not None),
    )


def _forward_flops(x, y, prompts, *_, **__):
    """x keys^T and scores prompts: R P D each."""
    return 2 * 2 * prod(x[:-1]) * prod(prompts)


def _backward_flops(dout, x, y, prompts, *rest, **_):
    """dout prompts^T always; dscores keys for dx, scores^T dout for dprompts, dscores^T x for dkeys: R P D each."""
    needs_dx, _needs_dy, needs_dprompts, needs_dkeys = rest[5:9]
    return 2 * (1 + needs_dx + needs_dprompts + needs_dkeys) * prod(x[:-1]) * prod(prompts)


def _sizes(tensors):
    x, prompts = tensors[0], tensors[2]
    return x.numel() // max(1, x.size(-1)), x.size(-1), prompts.size(0), str(prompts.dtype).removeprefix("torch.")


register("apt", _forward_flops, _backward_flops, _sizes, has_dropout=True)


class _APT(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, y, prompts, keys, log_scale, activation, raw_ops, dropout, seeds, rounds_x):
        out, gate, scores = getattr(torch.ops, raw_ops).apt_forward(
            x, y, prompts, keys, log_scale, activation, True, None, dropout, seeds, None, rounds_x
        )
        # y serves dlog_scale alone.
        y = y if ctx.needs_input_grad[4] else None
        ctx.save_for_backward(seeds, x, y, prompts, keys, log_scale, gate, scores)
        ctx.activation, ctx.raw_ops, ctx.dropout, ctx.rounds_x = activation, raw_ops, dropout, rounds_x
        return out

    @staticmethod
    def backward(ctx, dout):
        needs, nothing = ctx.needs_input_grad[:5], (None,) * 5
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            return *_APT.differentiable_backward(ctx, dout), *nothing
        seeds, *saved = ctx.saved_tensors
        gradients = getattr(torch.ops, ctx.raw_ops).apt_backward(
            dout, *saved, ctx.activation, *needs[:4], ctx.dropout, seeds, ctx.rounds_x
        )
        return *(g if needed else None for g, needed in zip(gradients, needs, strict=True)), *nothing

    @staticmethod
    def differentiable_backward(ctx, dout):
        seeds, x, y, prompts, keys, log_scale = ctx.saved_tensors[:6]
        if y is None:  # no gradient depends on it
            y = torch.zeros_like(dout, requires_grad=True)
        return differentiable_gradients(
            lambda *tensors: apt_reference(*tensors, ctx.activation, ctx.dropout, seeds=seeds),
            (x, y, prompts, keys, log_scale),
            ctx.needs_input_grad[:5],
            dout,
        )


def packed_apt(prompts, keys, activation, dtype):
    """Weights of `apt` packed for calls without gradients, as a `Packed`; None where no kernel takes them.

    Args:
        prompts, keys, activation: as for `apt`.
        dtype: of x and y; torch.float32 where they differ.

    Raises:
        RuntimeError: the dtype is none that the kernels know.
    """
    if torch.float64 in (dtype, prompts.dtype, keys.dtype):
        return None
    if not takes_packed("apt", prompts.device, prompts.size(1), prompts.size(0)):
        return None
    return Packed(torch.ops.petl_ext.apt_pack(prompts.new_empty(0, dtype=dtype), prompts, keys, activation), dtype)


def begun_apt(x, prompts, keys, activation, packed):
    """Queues what a call of `apt` without gradients can do before y is known, into the current stream, so that it runs
    beside what makes y. Few rows in 16 bits on CUDA alone have such a part.

    Args:
        x, prompts, keys, activation: as for `apt`.
        packed: what `packed_apt` returned for these prompts, keys and activation, or None.

    Returns:
        A `Begun`, which one call takes once it has waited for this stream; None where there is nothing to do before.

    Raises:
        RuntimeError: as `apt` does.
    """
    given, x = x, as_autocast_wants(x)
    data = data_for(packed, raw_ops_for("apt", (x, prompts, keys)), x.dtype)
    if data is None:
        return None
    begun = torch.ops.petl_ext.apt_begin(x, prompts, keys, activation, data)
    return Begun(begun, given) if begun.numel() else None


@takes_arrays
def apt(
    x: Tensor,
    y: Tensor,
    prompts: Tensor,
    keys: Tensor,
    log_scale: Tensor,
    activation: str = "relu",
    dropout: float = 0.0,
    packed: Packed | None = None,
    seeds: Tensor | None = None,
    begun: Begun | None = None,
) -> Tensor:
    """Adds the approximated prompts' contribution to an attention's output.

    Args:
        x: [..., D], the attention's input. Any strides; rows that are not contiguous are copied.
        y: [..., D], its output after the output projection, shaped as x. Its dtype may differ from that of x.
        prompts: [P, D].
        keys: [P, D], what x is scored against: prompts + (prompts W0^T) W1^T, see `APTLayer`.
        log_scale: [1]; its exponential scales the whole sum, y included.
        activation: "relu" or "softmax".
        dropout: probability that a score is set to zero, before the gate is taken (as in the paper's code).
        packed: what `packed_apt` returned for these very prompts, keys and activation, or None. On CUDA a call without
            gradients is then one launch fewer; it serves those whose x and y have the dtype it was made for.
        seeds: int64 [2], on the device of x, from which `dropout_mask` tells what is dropped; None: drawn from torch's
            generator of the device.
        begun: what `begun_apt` returned for this very x, the weights and packed, or None. The call does the rest; where
            it cannot, as with gradients, it does all.

    Each tensor is float32, bfloat16 or float16, in any mixture; scores, gate and sums are float32. Under autocast a
    float32 x is rounded to autocast's dtype, as for torch.matmul.

    The reference computes where a tensor is float64, for derivatives in forward mode and those of the gradients
    (`create_graph=True`), inside transformations of torch.func and under torch.jit.trace, and where
    `petl_ext.ops.backend` has chosen it. It drops out by `torch.dropout` where no seeds are given.

    On CUDA, D is a multiple of 8 up to 8192 and P at most 512; x and y that are not contiguous in rows or not aligned
    to 16 bytes are copied, and where their dtypes differ both are computed in float32.

    Returns:
        [..., D], contiguous, in the dtype of y.

    Raises:
        RuntimeError: a shape, dtype, device or activation is not as above.
        ValueError: dropout is no number in [0, 1).
        NotImplementedError: there is no kernel for the tensors' device.
    """
    given, raw_ops = x, raw_ops_for("apt", (x, y, prompts, keys, log_scale), dropout)
    rounds_x = rounds_inside(raw_ops, x)
    x = x if rounds_x else as_autocast_wants(x)
    tensors = (x, y, prompts, keys, log_scale)
    if raw_ops is None:
        return apt_reference(*tensors, activation, dropout, seeds=seeds)
    if dropout == 0:
        seeds = None
    elif seeds is None:
        seeds = new_seeds(x.device)
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        return _APT.apply(*tensors, activation, raw_ops, dropout, seeds, rounds_x)
    data = data_for(packed, raw_ops, x.dtype if x.dtype is y.dtype else torch.float32)
    rest_of = begun.data if begun is not None and begun.x is given and data is not None else None
    return getattr(torch.ops, raw_ops).apt_forward(
        *tensors, activation, False, data, dropout, seeds, rest_of, rounds_x
    )[0]
