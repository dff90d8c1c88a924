"""The bottleneck adapter: a small network beside or behind a frozen module, added to its output.

    out = residual + scale * (act(norm(x) down^T + down_bias) up^T + up_bias)

where norm is LayerNorm or nothing, act is ReLU, GELU or SiLU, and the residual may be absent. Sources: the sequential
adapter, whose residual is its input, is that of "Parameter-Efficient Transfer Learning for NLP" (arXiv 1902.00751); the
scaled parallel one that of "Towards a Unified View of Parameter-Efficient Transfer Learning" (arXiv 2110.04366).
"""

import torch
import torch.nn.functional as F

from petl_ext.ops.library import as_autocast_wants, differentiable_gradients, needs_reference, raise_no_kernel

ACTIVATIONS = {"relu": F.relu, "gelu": F.gelu, "silu": F.silu}

_INPUTS = (
    "Tensor? norm_weight, Tensor? norm_bias, Tensor down, Tensor down_bias, Tensor up, Tensor up_bias, Tensor? gain,"
    " float scale, float eps, str activation"
)
# What is added is multiplied by scale, and by gain where there is one.
torch.library.define("petl_ext::adapter_forward", f"(Tensor x, Tensor? residual, {_INPUTS}) -> Tensor")
# Nothing is kept from forward. needs_* say which gradients to compute, the others come back empty.
torch.library.define(
    "petl_ext::adapter_backward",
    f"(Tensor dout, Tensor x, {_INPUTS}, bool residual_is_input, bool needs_dx, bool needs_dweights, bool needs_dgain)"
    " -> (Tensor dx, Tensor dnorm_weight, Tensor dnorm_bias, Tensor ddown, Tensor ddown_bias, Tensor dup,"
    " Tensor dup_bias, Tensor dgain)",
)


def _check(x, residual, norm_weight, norm_bias, down, down_bias, up, up_bias, gain, activation):
    """What the kernels check for themselves, for the paths that reach none."""
    if torch.jit.is_tracing():  # sizes are tensors, of which it warns
        return
    if activation not in ACTIVATIONS:
        raise RuntimeError(f"adapter: activation must be relu, gelu or silu, got {activation}")
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
    x,
    down,
    down_bias,
    up,
    up_bias,
    scale=1.0,
    activation="relu",
    norm_weight=None,
    norm_bias=None,
    eps=1e-5,
    residual=None,
    dropout=0.0,
):
    """`adapter` in plain PyTorch, in the dtype of x, on any device and in float64 too; it can drop out hidden units.

    Args:
        dropout: probability that a hidden unit is set to zero after its activation.

    Raises:
        RuntimeError: a shape or the activation is not as `adapter` says.
    """
    x, gain = as_autocast_wants(x), _split(scale)[0]
    _check(x, residual, norm_weight, norm_bias, down, down_bias, up, up_bias, gain, activation)

    def as_x(tensor):
        return tensor.to(x.dtype)

    hidden = x
    if norm_weight is not None:
        hidden = F.layer_norm(x, x.shape[-1:], as_x(norm_weight), as_x(norm_bias), eps)
    hidden = ACTIVATIONS[activation](F.linear(hidden, as_x(down), as_x(down_bias)))
    hidden = F.dropout(hidden, dropout, training=dropout > 0)
    added = F.linear(hidden, as_x(up), as_x(up_bias)) * (scale if gain is None else as_x(gain))
    added = added.to(x.dtype)
    return added if residual is None else residual + added


@torch.library.register_fake("petl_ext::adapter_forward")
def _(x, residual, norm_weight, norm_bias, down, down_bias, up, up_bias, gain, scale, eps, activation):
    weights = (norm_weight, norm_bias, down, down_bias, up, up_bias, gain)
    _check(x, residual, *weights, activation)
    if residual is not None and residual.dtype != x.dtype:
        raise RuntimeError(f"adapter: residual must have the dtype of x, {x.dtype}, got {residual.dtype}")
    devices = {str(tensor.device) for tensor in (x, residual, *weights) if tensor is not None}
    if len(devices) > 1:
        raise RuntimeError(f"adapter: all arguments must be on one device, got {', '.join(sorted(devices))}")
    return x.new_empty(x.shape)


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
):
    def gradient(tensor, needed):
        if tensor is None:
            return down_bias.new_empty(0)
        return tensor.new_empty(tensor.shape if needed else (0,))

    weights = (norm_weight, norm_bias, down, down_bias, up, up_bias)
    return gradient(x, needs_dx), *(gradient(t, needs_dweights) for t in weights), gradient(gain, needs_dgain)


@torch.library.impl("petl_ext::adapter_forward", "CompositeExplicitAutograd")
def _(x, *_):
    raise_no_kernel("adapter", x)


@torch.library.impl("petl_ext::adapter_backward", "CompositeExplicitAutograd")
def _(dout, x, *_):
    raise_no_kernel("adapter", dout, x)


class _Adapter(torch.autograd.Function):
    """Of a residual that is x itself, `residual_is_input` tells; `residual` is another tensor or None."""

    @staticmethod
    def forward(ctx, x, residual, residual_is_input, norm_weight, norm_bias, down, down_bias, up, up_bias, gain, *rest):
        weights = (norm_weight, norm_bias, down, down_bias, up, up_bias, gain)
        ctx.save_for_backward(x, *weights)
        ctx.residual_is_input = residual_is_input
        ctx.rest = rest
        return torch.ops.petl_ext.adapter_forward(x, x if residual_is_input else residual, *weights, *rest)

    @staticmethod
    def backward(ctx, dout):
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            return _Adapter.differentiable_backward(ctx, dout)
        needs_dx, needs_dresidual, _, *needs_dweights = ctx.needs_input_grad[:10]
        needs = (needs_dx, any(needs_dweights[:-1]), needs_dweights[-1])
        dx, dresidual, dweights = None, dout if needs_dresidual else None, [None] * 7
        if any(needs):
            dx, *dweights = torch.ops.petl_ext.adapter_backward(
                dout, *ctx.saved_tensors, *ctx.rest, ctx.residual_is_input, *needs
            )
        dweights = [d if needed else None for d, needed in zip(dweights, needs_dweights, strict=True)]
        return dx if needs_dx else None, dresidual, None, *dweights, *[None] * len(ctx.rest)

    @staticmethod
    def differentiable_backward(ctx, dout):
        needs_dx, needs_dresidual, _, *needs_dweights = ctx.needs_input_grad[:10]
        number, eps, activation = ctx.rest

        def reference(x, norm_weight, norm_bias, down, down_bias, up, up_bias, gain):
            scale = number if gain is None else gain
            residual = x if ctx.residual_is_input else None
            return adapter_reference(
                x, down, down_bias, up, up_bias, scale, activation, norm_weight, norm_bias, eps, residual
            )

        needed = (needs_dx, *needs_dweights)
        dx, *dweights = differentiable_gradients(reference, ctx.saved_tensors, needed, dout)
        return dx, dout if needs_dresidual else None, None, *dweights, *[None] * len(ctx.rest)


def adapter(
    x,
    down,
    down_bias,
    up,
    up_bias,
    scale=1.0,
    activation="relu",
    norm_weight=None,
    norm_bias=None,
    eps=1e-5,
    residual=None,
):
    """A bottleneck adapter in one pass over its input, keeping nothing for backward but its arguments.

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

    Each tensor is float32, bfloat16 or float16, in any mixture; hidden units and sums are float32. Under autocast a
    float32 x is rounded to autocast's dtype, as for torch.matmul; a residual is not, so that a stream in float32 stays
    one.

    The reference computes where a tensor is float64, for derivatives in forward mode and those of the gradients
    (`create_graph=True`), inside transformations of torch.func and under torch.jit.trace.

    On CUDA, D is a multiple of 8 up to 8192 and B at most 512; x and the residual are copied where they are not
    contiguous in rows or not aligned to 16 bytes.

    Returns:
        [..., D], in the dtype of x (under autocast, in autocast's), or in what that and the residual's promote to.

    Raises:
        RuntimeError: a shape, dtype, device or activation is not as above.
        NotImplementedError: there is no kernel for the tensors' device.
    """
    is_input, x = residual is x, as_autocast_wants(x)
    if residual is not None and residual.dtype != x.dtype and residual.is_floating_point():
        added = adapter(x, down, down_bias, up, up_bias, scale, activation, norm_weight, norm_bias, eps)
        if residual.shape != x.shape:
            raise RuntimeError(f"adapter: residual must have shape {list(x.shape)}, got {list(residual.shape)}")
        return residual + added
    gain, number = _split(scale)
    weights = (norm_weight, norm_bias, down, down_bias, up, up_bias, gain)
    tensors = [tensor for tensor in (x, residual, *weights) if tensor is not None]
    if needs_reference(*tensors):
        return adapter_reference(
            x, down, down_bias, up, up_bias, scale, activation, norm_weight, norm_bias, eps, residual
        )
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        return _Adapter.apply(x, None if is_input else residual, is_input, *weights, number, eps, activation)
    return torch.ops.petl_ext.adapter_forward(x, residual, *weights, number, eps, activation)
