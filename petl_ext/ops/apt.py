"""Approximated prompt tuning: what soft prompts would have told an attention, added to its output.

With x the attention's input, y its output, and one row per token,

    scores = act(x keys^T)    gate = rowmax(scores), detached    out = exp(log_scale) * (y + gate * (scores prompts))

where act is ReLU, or the softmax over the prompts. Source: "Approximated Prompt Tuning for Vision-Language Pre-trained
Models" (arXiv 2306.15706), as the authors' code for ViLT and METER computes it.
"""

from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor

from petl_ext.ops.arrays import takes_arrays
from petl_ext.ops.autocast import as_autocast_wants
from petl_ext.ops.derivatives import differentiable_gradients
from petl_ext.ops.kernels import raw_ops_for, register, takes_packed
from petl_ext.ops.packed import Begun, Packed, data_for

ACTIVATIONS = ("relu", "softmax")

torch.library.define(
    "petl_ext::apt_forward",
    "(Tensor x, Tensor y, Tensor prompts, Tensor keys, Tensor log_scale, str activation, bool keep_scores,"
    " Tensor? packed=None, Tensor? begun=None) -> (Tensor out, Tensor gate, Tensor scores)",
)
# What apt_forward takes as `packed` where x and y, or what they are computed in, have the dtype of `like`.
torch.library.define("petl_ext::apt_pack", "(Tensor like, Tensor prompts, Tensor keys, str activation) -> Tensor")
# What apt_forward takes as `begun` with the same arguments; empty where it has no part that depends on x alone.
torch.library.define(
    "petl_ext::apt_begin", "(Tensor x, Tensor prompts, Tensor keys, str activation, Tensor packed) -> Tensor"
)
# An absent y means that nobody asks for dlog_scale; needs_* say which gradients to compute, the others come back empty.
torch.library.define(
    "petl_ext::apt_backward",
    "(Tensor dout, Tensor x, Tensor? y, Tensor prompts, Tensor keys, Tensor log_scale, Tensor gate, Tensor scores,"
    " str activation, bool needs_dx, bool needs_dy, bool needs_dprompts, bool needs_dkeys)"
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
    begun: Begun | None = None,
) -> Tensor:
    """`apt` in plain PyTorch, in the dtype of x, on any device and in float64 too; it can drop out scores.

    Args:
        dropout: probability that a score is set to zero, before the gate is taken (as in the paper's code).
        packed, begun: not looked at; no kernel computes.

    Raises:
        RuntimeError: a shape or the activation is not as `apt` says.
    """
    check_arguments(x, y, prompts, keys, log_scale, activation)
    scores = x @ keys.to(x.dtype).mT
    scores = scores.relu_() if activation == "relu" else scores.softmax(-1)
    scores = F.dropout(scores, dropout, training=dropout > 0)
    gate = scores.amax(-1, keepdim=True).detach()
    out = log_scale.exp() * (y + gate * (scores @ prompts.to(scores.dtype)))
    return out.to(y.dtype)


@torch.library.register_fake("petl_ext::apt_forward")
def _(x, y, prompts, keys, log_scale, activation, keep_scores, packed=None, begun=None):
    check_arguments(x, y, prompts, keys, log_scale, activation)
    devices = {str(tensor.device) for tensor in (x, y, prompts, keys, log_scale)}
    if len(devices) > 1:
        raise RuntimeError(f"apt: all arguments must be on one device, got {', '.join(sorted(devices))}")
    rows = y.numel() // y.size(-1)
    gate = y.new_empty(rows, dtype=torch.float32)
    # Rows of kept scores are whole 16-byte words; in bfloat16 where x and y are, which have no more digits.
    width = (prompts.size(0) + 7) // 8 * 8
    kept = torch.bfloat16 if x.dtype is y.dtype is torch.bfloat16 else torch.float32
    scores = y.new_empty((rows, width) if keep_scores else (0,), dtype=kept)
    return y.new_empty(y.shape), gate, scores


@torch.library.register_fake("petl_ext::apt_backward")
def _(dout, x, y, prompts, keys, log_scale, gate, scores, activation, needs_dx, needs_dy, needs_dprompts, needs_dkeys):
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
    needs_dx, _needs_dy, needs_dprompts, needs_dkeys = rest[-4:]
    return 2 * (1 + needs_dx + needs_dprompts + needs_dkeys) * prod(x[:-1]) * prod(prompts)


def _sizes(tensors):
    x, prompts = tensors[0], tensors[2]
    return x.numel() // max(1, x.size(-1)), x.size(-1), prompts.size(0), str(prompts.dtype).removeprefix("torch.")


register("apt", _forward_flops, _backward_flops, _sizes)


class _APT(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, y, prompts, keys, log_scale, activation, raw_ops):
        out, gate, scores = getattr(torch.ops, raw_ops).apt_forward(x, y, prompts, keys, log_scale, activation, True)
        # y serves dlog_scale alone.
        ctx.save_for_backward(x, y if ctx.needs_input_grad[4] else None, prompts, keys, log_scale, gate, scores)
        ctx.activation, ctx.raw_ops = activation, raw_ops
        return out

    @staticmethod
    def backward(ctx, dout):
        saved, needs = ctx.saved_tensors, ctx.needs_input_grad[:5]
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            return *_APT.differentiable_backward(ctx, dout), None, None
        gradients = getattr(torch.ops, ctx.raw_ops).apt_backward(dout, *saved, ctx.activation, *needs[:4])
        return *(g if needed else None for g, needed in zip(gradients, needs, strict=True)), None, None

    @staticmethod
    def differentiable_backward(ctx, dout):
        x, y, prompts, keys, log_scale = ctx.saved_tensors[:5]
        if y is None:  # no gradient depends on it
            y = torch.zeros_like(dout, requires_grad=True)
        return differentiable_gradients(
            lambda *tensors: apt_reference(*tensors, ctx.activation),
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
        begun: what `begun_apt` returned for this very x and the arguments above, or None. The call does the rest; where
            it cannot, as with gradients, it does all.

    Each tensor is float32, bfloat16 or float16, in any mixture; scores, gate and sums are float32. Under autocast a
    float32 x is rounded to autocast's dtype, as for torch.matmul.

    The reference computes where a tensor is float64 or a dropout is above 0, for derivatives in forward mode and those
    of the gradients (`create_graph=True`), inside transformations of torch.func and under torch.jit.trace, and where
    `petl_ext.ops.backend` has chosen it.

    On CUDA, D is a multiple of 8 up to 8192 and P at most 512; x and y that are not contiguous in rows or not aligned
    to 16 bytes are copied, and where their dtypes differ both are computed in float32.

    Returns:
        [..., D], contiguous, in the dtype of y.

    Raises:
        RuntimeError: a shape, dtype, device or activation is not as above.
        ValueError: dropout is no number in [0, 1).
        NotImplementedError: there is no kernel for the tensors' device.
    """
    given, x = x, as_autocast_wants(x)
    tensors = (x, y, prompts, keys, log_scale)
    raw_ops = raw_ops_for("apt", tensors, dropout)
    if raw_ops is None:
        return apt_reference(*tensors, activation, dropout)
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        return _APT.apply(*tensors, activation, raw_ops)
    data = data_for(packed, raw_ops, x.dtype if x.dtype is y.dtype else torch.float32)
    rest_of = begun.data if begun is not None and begun.x is given and data is not None else None
    return getattr(torch.ops, raw_ops).apt_forward(*tensors, activation, False, data, rest_of)[0]
