"""The bottleneck adapter: a small network beside or behind a frozen module, added to its output.

    out = residual + scale * (act(norm(x) down^T + down_bias) up^T + up_bias)

where norm is LayerNorm or nothing, act is ReLU, GELU or SiLU, and the residual may be absent. Sources: the sequential
adapter, whose residual is its input, is that of "Parameter-Efficient Transfer Learning for NLP" (arXiv 1902.00751); the
scaled parallel one that of "Towards a Unified View of Parameter-Efficient Transfer Learning" (arXiv 2110.04366).
"""

from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor

from petl_ext.ops.arrays import takes_arrays
from petl_ext.ops.autocast import as_autocast_wants, dtype_of_products, rounds_inside
from petl_ext.ops.derivatives import differentiable_gradients
from petl_ext.ops.dropout import check_seeds, dropped_out, new_seeds
from petl_ext.ops.kernels import MIXING, raw_ops_for, register, takes_packed
from petl_ext.ops.packed import Packed, data_for

ACTIVATIONS = {"relu": F.relu, "gelu": F.gelu, "silu": F.silu}

_INPUTS = (
    "Tensor? norm_weight, Tensor? norm_bias, Tensor down, Tensor down_bias, Tensor up, Tensor up_bias, Tensor? gain,"
    " float scale, float eps, str activation"
)
_DROPOUT = "float dropout=0.0, Tensor? seeds=None"
# What is added is multiplied by scale, and by gain where there is one. out has the dtype of the residual, or without
# one that of the products. raw, if it is asked for, is what backward takes of the hidden units, [R, B]. rounds_x:
# products are in bfloat16 though x is wider. Not all kernels know of the last two (`MIXING`).
torch.library.define(
    "petl_ext::adapter_forward",
    f"(Tensor x, Tensor? residual, {_INPUTS}, Tensor? packed=None, {_DROPOUT}, bool keep_raw=False,"
    " bool rounds_x=False) -> (Tensor out, Tensor raw)",
)
# What adapter_forward takes as `packed` where x has the dtype of `like`, [1, D].
torch.library.define(
    "petl_ext::adapter_pack",
    "(Tensor like, Tensor? norm_weight, Tensor? norm_bias, Tensor down, Tensor down_bias, Tensor up, Tensor up_bias)"
    " -> Tensor",
)
# raw is what forward has kept, or None. needs_* say which gradients to compute, the others come back empty.
torch.library.define(
    "petl_ext::adapter_backward",
    f"(Tensor dout, Tensor x, {_INPUTS}, bool residual_is_input, bool needs_dx, bool needs_dweights, bool needs_dgain,"
    f" {_DROPOUT}, Tensor? raw=None, bool rounds_x=False)"
    " -> (Tensor dx, Tensor dnorm_weight, Tensor dnorm_bias, Tensor ddown, Tensor ddown_bias, Tensor dup,"
    " Tensor dup_bias, Tensor dgain)",
)


def check_arguments(x, residual, norm_weight, norm_bias, down, down_bias, up, up_bias, gain, activation):
    """The arguments' checks for float64, meta tensors and torch.compile, which never reach a kernel; the kernels repeat
    them in C++."""
    if torch.jit.is_tracing():  # sizes are tensors, of which it warns
        return
    if activation not in ACTIVATIONS:
        *others, last = ACTIVATIONS
        raise RuntimeError(f"adapter: activation must be {', '.join(others)} or {last}, got {activation}")
    if x.dim() == 0 or x.size(-1) == 0:
        raise RuntimeError(f"adapter: x must have shape [..., D] with a width D above zero, got {list(x.shape)}")
    width = x.size(-1)
    if down.dim() != 2 or down.size(0) == 0 or down.size(1) != width:
        raise RuntimeError(f"adapter: down must have shape [B, {width}], got {list(down.shape)}")
    if (norm_weight is None) != (norm_bias is None):
        raise RuntimeError("adapter: norm_weight and norm_bias must be given both or neither")
    bottleneck = down.size(0)
    expected = {
        "down_bias": (down_bias, (bottleneck,)),
        "up": (up, (width, bottleneck)),
        "up_bias": (up_bias, (width,)),
        "norm_weight": (norm_weight, (width,)),
        "norm_bias": (norm_bias, (width,)),
        "gain": (gain, (1,)),
        "residual": (residual, x.shape),
    }
    for name, (tensor, shape) in expected.items():
        if tensor is not None and tensor.shape != shape:
            raise RuntimeError(f"adapter: {name} must have shape {list(shape)}, got {list(tensor.shape)}")


def _split(scale):
    """(gain, scale) of the raw ops: a tensor that may train, and a number."""
    return (scale, 1.0) if isinstance(scale, torch.Tensor) else (None, float(scale))


def adapter_reference(
    x: Tensor,
    down: Tensor,
    down_bias: Tensor,
    up: Tensor,
    up_bias: Tensor,
    scale: float | Tensor = 1.0,
    activation: str = "relu",
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    eps: float = 1e-5,
    residual: Tensor | None = None,
    dropout: float = 0.0,
    packed: Packed | None = None,
    seeds: Tensor | None = None,
) -> Tensor:
    """`adapter` in plain PyTorch, in the dtype of x, on any device and in float64 too.

    Args:
        packed: not looked at; no kernel computes.
        seeds: where it is None, torch's own dropout drops out.

    Raises:
        RuntimeError: a shape or the activation is not as `adapter` says.
    """
    check_seeds("adapter", seeds)
    x, gain = as_autocast_wants(x), _split(scale)[0]
    check_arguments(x, residual, norm_weight, norm_bias, down, down_bias, up, up_bias, gain, activation)

    def as_x(tensor):
        return tensor.to(x.dtype)

    hidden = x
    if norm_weight is not None:
        hidden = F.layer_norm(x, x.shape[-1:], as_x(norm_weight), as_x(norm_bias), eps)
    hidden = ACTIVATIONS[activation](F.linear(hidden, as_x(down), as_x(down_bias)))
    hidden = dropped_out(hidden, dropout, seeds)
    added = F.linear(hidden, as_x(up), as_x(up_bias)) * (scale if gain is None else as_x(gain))
    added = added.to(x.dtype)
    return added if residual is None else residual + added


@torch.library.register_fake("petl_ext::adapter_forward")
def _(
    x,
    residual,
    norm_weight,
    norm_bias,
    down,
    down_bias,
    up,
    up_bias,
    gain,
    scale,
    eps,
    activation,
    packed=None,
    dropout=0.0,
    seeds=None,
    keep_raw=False,
    rounds_x=False,
):
    weights = (norm_weight, norm_bias, down, down_bias, up, up_bias, gain)
    check_arguments(x, residual, *weights, activation)
    check_seeds("adapter", seeds)
    devices = {str(tensor.device) for tensor in (x, residual, *weights, seeds) if tensor is not None}
    if len(devices) > 1:
        raise RuntimeError(f"adapter: all arguments must be on one device, got {', '.join(sorted(devices))}")
    narrow = torch.bfloat16 if rounds_x else x.dtype
    out = x.new_empty(x.shape, dtype=narrow if residual is None else residual.dtype)
    kept = (x.numel() // x.size(-1), down.size(0)) if keep_raw else (0,)
    return out, x.new_empty(kept, dtype=torch.bfloat16 if narrow is torch.bfloat16 else torch.float32)


@torch.library.register_fake("petl_ext::adapter_backward")
def _(
    dout,
    x,
    norm_weight,
    norm_bias,
    down,
    down_bias,
    up,
    up_bias,
    gain,
    scale,
    eps,
    activation,
    residual_is_input,
    needs_dx,
    needs_dweights,
    needs_dgain,
    dropout=0.0,
    seeds=None,
    raw=None,
    rounds_x=False,
):
    def gradient(tensor, needed):
        if tensor is None:
            return down_bias.new_empty(0)
        return tensor.new_empty(tensor.shape if needed else (0,))

    weights = (norm_weight, norm_bias, down, down_bias, up, up_bias)
    return gradient(x, needs_dx), *(gradient(t, needs_dweights) for t in weights), gradient(gain, needs_dgain)


def _forward_flops(x, residual, norm_weight, norm_bias, down, *_, **__):
    """norm(x) down^T and hidden up^T: R D B each."""
    return 2 * 2 * prod(x[:-1]) * prod(down)


def _backward_flops(dout, x, norm_weight, norm_bias, down, *rest, **_):
    """dout up always; norm(x) down^T where forward has not kept it; dhidden down for dx; two for the weights'
    gradients, dhidden^T norm(x) and dout^T hidden: R D B each."""
    needs_dx, needs_dweights = rest[8:10]
    is_kept = len(rest) > 13 and rest[13] is not None
    return 2 * (2 - is_kept + needs_dx + 2 * needs_dweights) * prod(x[:-1]) * prod(down)


def _sizes(tensors):
    x, down = tensors[0], tensors[4]
    return x.numel() // max(1, x.size(-1)), x.size(-1), down.size(0), str(down.dtype).removeprefix("torch.")


register("adapter", _forward_flops, _backward_flops, _sizes, has_dropout=True)


class _Adapter(torch.autograd.Function):
    """Of a residual that is x itself, `residual_is_input` tells; `residual` is another tensor or None. weights are
    those of the raw op; rest is scale, eps and activation; keep_raw and rounds_x are the raw op's."""

    @staticmethod
    def forward(ctx, raw_ops, residual_is_input, rest, dropout, seeds, keep_raw, rounds_x, x, residual, *weights):
        residual = x if residual_is_input else residual
        out, raw = getattr(torch.ops, raw_ops).adapter_forward(
            x, residual, *weights, *rest, None, dropout, seeds, keep_raw, rounds_x
        )
        ctx.save_for_backward(seeds, raw if keep_raw else None, x, *weights)
        ctx.raw_ops, ctx.residual_is_input, ctx.rest = raw_ops, residual_is_input, rest
        ctx.dropout, ctx.rounds_x = dropout, rounds_x
        return out

    @staticmethod
    def backward(ctx, dout):
        nothing = (None,) * 7
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            return *nothing, *_Adapter.differentiable_backward(ctx, dout)
        needs_dx, needs_dresidual, *needs_dweights = ctx.needs_input_grad[7:]
        needs = (needs_dx, any(needs_dweights[:-1]), needs_dweights[-1])
        dx, dresidual, dweights = None, dout if needs_dresidual else None, [None] * 7
        if any(needs):
            seeds, raw, *saved = ctx.saved_tensors
            dx, *dweights = getattr(torch.ops, ctx.raw_ops).adapter_backward(
                dout, *saved, *ctx.rest, ctx.residual_is_input, *needs, ctx.dropout, seeds, raw, ctx.rounds_x
            )
        dweights = [d if needed else None for d, needed in zip(dweights, needs_dweights, strict=True)]
        return *nothing, dx if needs_dx else None, dresidual, *dweights

    @staticmethod
    def differentiable_backward(ctx, dout):
        needs_dx, needs_dresidual, *needs_dweights = ctx.needs_input_grad[7:]
        number, eps, activation = ctx.rest
        seeds, _, *saved = ctx.saved_tensors

        def reference(x, norm_weight, norm_bias, down, down_bias, up, up_bias, gain):
            scale = number if gain is None else gain
            residual = x if ctx.residual_is_input else None
            weights = (down, down_bias, up, up_bias, scale, activation, norm_weight, norm_bias)
            return adapter_reference(x, *weights, eps, residual, ctx.dropout, seeds=seeds)

        needed = (needs_dx, *needs_dweights)
        dx, *dweights = differentiable_gradients(reference, saved, needed, dout)
        return dx, dout if needs_dresidual else None, *dweights


def packed_adapter(down, down_bias, up, up_bias, norm_weight, norm_bias, dtype):
    """Weights of `adapter` packed for calls without gradients, as a `Packed`; None where no kernel takes them.

    Args:
        down, down_bias, up, up_bias, norm_weight, norm_bias: as for `adapter`.
        dtype: of x.

    Raises:
        RuntimeError: the dtype is none that the kernels know.
    """
    weights = (norm_weight, norm_bias, down, down_bias, up, up_bias)
    bottleneck, width = down.shape
    if torch.float64 in (dtype, *(weight.dtype for weight in weights if weight is not None)):
        return None
    if not takes_packed("adapter", down.device, width, bottleneck):
        return None
    return Packed(torch.ops.petl_ext.adapter_pack(down.new_empty(1, width, dtype=dtype), *weights), dtype)


@takes_arrays
def adapter(
    x: Tensor,
    down: Tensor,
    down_bias: Tensor,
    up: Tensor,
    up_bias: Tensor,
    scale: float | Tensor = 1.0,
    activation: str = "relu",
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    eps: float = 1e-5,
    residual: Tensor | None = None,
    dropout: float = 0.0,
    packed: Packed | None = None,
    seeds: Tensor | None = None,
) -> Tensor:
    """A bottleneck adapter in one pass over its input.

    It keeps nothing for backward but its arguments and, on a CPU, its hidden units: computing them again would take
    longer.

    Args:
        x: [..., D]. Any strides; rows that are not contiguous are copied.
        down: [B, D].
        down_bias: [B].
        up: [D, B].
        up_bias: [D].
        scale: a number, or a tensor [1] that may train.
        activation: "relu", "gelu" (the exact one, torch's default) or "silu".
        norm_weight: [D]; where it is given, LayerNorm over the last axis comes first.
        norm_bias: [D], given with norm_weight.
        eps: LayerNorm's.
        residual: shaped as x, or None. `residual=x` makes the sequential adapter: its gradient joins that of x without
            another pass. In another dtype than x it is added outside of the kernel.
        dropout: probability that a hidden unit is set to zero after its activation.
        packed: what `packed_adapter` returned for these very weights, or None. On CUDA a call without gradients is then
            one launch fewer; it serves those whose x has the dtype it was made for.
        seeds: int64 [2], on the device of x, from which `dropout_mask` tells what is dropped; None: drawn from torch's
            generator of the device.

    Each tensor is float32, bfloat16 or float16, in any mixture; hidden units and sums are float32. Under autocast a
    float32 x is rounded to autocast's dtype, as for torch.matmul; a residual is not, so that a stream in float32 stays
    one.

    The reference computes where a tensor is float64, for derivatives in forward mode and those of the gradients
    (`create_graph=True`), inside transformations of torch.func and under torch.jit.trace, and where
    `petl_ext.ops.backend` has chosen it. It drops out by `torch.dropout` where no seeds are given.

    On CUDA, D is a multiple of 8 up to 8192 and B at most 512; x and the residual are copied where they are not
    contiguous in rows or not aligned to 16 bytes.

    Returns:
        [..., D], in the dtype of x (under autocast, in autocast's), or in what that and the residual's promote to.

    Raises:
        RuntimeError: a shape, dtype, device or activation is not as above.
        ValueError: dropout is no number in [0, 1).
        NotImplementedError: there is no kernel for the tensors' device.
    """
    (gain, number), is_input = _split(scale), residual is x
    weights, rest = (norm_weight, norm_bias, down, down_bias, up, up_bias, gain), (number, eps, activation)
    raw_ops = raw_ops_for("adapter", (x, residual, *weights), dropout)
    narrow, rounds_x = dtype_of_products(x), rounds_inside(raw_ops, x)
    x = x if rounds_x else as_autocast_wants(x)
    if _is_added_outside(residual, x, narrow, raw_ops):
        reference_weights = (down, down_bias, up, up_bias, scale, activation, norm_weight, norm_bias)
        added = adapter(x, *reference_weights, eps, None, dropout, packed, seeds)
        if residual.shape != x.shape:
            raise RuntimeError(f"adapter: residual must have shape {list(x.shape)}, got {list(residual.shape)}")
        return residual + added
    if raw_ops is None:
        rest = (scale, activation, norm_weight, norm_bias, eps, residual, dropout)
        return adapter_reference(x, down, down_bias, up, up_bias, *rest, seeds=seeds)
    if dropout == 0:
        seeds = None
    elif seeds is None:
        seeds = new_seeds(x.device)
    tensors = (x, residual, *weights)
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors):
        # They cost less to keep than to compute again: a training step is 1.1 to 1.2 times as fast.
        keep_raw = (raw_ops, x.device.type) in MIXING
        options = (raw_ops, is_input, rest, dropout, seeds, keep_raw, rounds_x)
        return _Adapter.apply(*options, x, None if is_input else residual, *weights)
    data = data_for(packed, raw_ops, x.dtype)
    options = (data, dropout, seeds, False, rounds_x)
    return getattr(torch.ops, raw_ops).adapter_forward(*tensors, *rest, *options)[0]


def _is_added_outside(residual, x, narrow, raw_ops):
    """Whether the residual is in a dtype that the kernels do not add: some take none but that of x, and none takes one
    that is not the sum's.

    Args:
        narrow: the dtype of the products.
    """
    if residual is None or not residual.is_floating_point():
        return False
    if (raw_ops, x.device.type) in MIXING:
        return torch.promote_types(narrow, residual.dtype) is not residual.dtype
    return residual.dtype is not x.dtype
