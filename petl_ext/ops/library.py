"""Loads petl_ext/_C, whose import registers the C++ kernels with torch's dispatcher."""

from pathlib import Path

import torch
from torch.autograd import forward_ad

try:
    from petl_ext import _C  # noqa: F401
except ImportError as error:
    folder = Path(__file__).parent.parent
    found = "holds none" if not list(folder.glob("_C*")) else "holds one that does not load"
    raise ImportError(
        f"petl_ext needs its compiled part, petl_ext._C, but {folder} {found} ({error}). This is torch "
        f"{torch.__version__}; 2.10 or later is needed. In a checkout, `pip install -e .` builds it in place; "
        "after a plain `pip install .`, work outside the checkout, whose source folder hides the installed package."
    ) from error


def raise_no_kernel(op, *tensors):
    """Stands in for `op` on every device that `_C` has no kernel for.

    Raises:
        NotImplementedError: names the devices and the way out.
    """
    devices = sorted({str(tensor.device) for tensor in tensors})
    remedy = ""
    if any(device.startswith("cuda") for device in devices):
        remedy = " Installed anew beside a CUDA build of torch, or with PETL_CUDA=1, petl_ext holds CUDA kernels."
    raise NotImplementedError(
        f"petl_ext.ops.{op}: this build holds no kernel for {', '.join(devices)} "
        f"(`python -m petl_ext info` lists what it holds); petl_ext.ops.{op}_reference runs on every device.{remedy}"
    )


def needs_reference(*tensors):
    """Whether plain PyTorch has to compute, on tensors of which some may be None.

    The kernels know no float64, no derivatives in forward mode and no transformation of torch.func, such as vmap; and
    torch.jit.trace can save no autograd.Function.
    """
    given = [tensor for tensor in tensors if tensor is not None]
    if any(tensor.dtype is torch.float64 for tensor in given):
        return True
    if torch.compiler.is_compiling():
        return False
    if torch._C._are_functorch_transforms_active() or torch.jit.is_tracing():
        return True
    return any(forward_ad.unpack_dual(tensor).tangent is not None for tensor in given)


def differentiable_gradients(reference, tensors, needed, dout):
    """The gradients of `reference(*tensors)` as plain PyTorch gives them where they are to be differentiated again.

    Args:
        tensors: of which some may be None.
        needed: of each tensor whether its gradient is wanted; the others' are None.
        dout: the gradient of the output.
    """
    with torch.enable_grad():
        # One tensor may be given twice, and each place has a gradient of its own.
        tensors = [None if tensor is None else tensor.view_as(tensor) for tensor in tensors]
        wanted = [tensor for tensor, is_needed in zip(tensors, needed, strict=True) if is_needed]
        found = iter(torch.autograd.grad(reference(*tensors), wanted, dout, create_graph=True, materialize_grads=True))
    return [next(found) if is_needed else None for is_needed in needed]


def as_autocast_wants(tensor):
    """`tensor` in the dtype that torch.autocast gives to the operands of a matrix product; outside of it, itself."""
    device = tensor.device.type
    if tensor.dtype is torch.float32 and device != "meta" and torch.is_autocast_enabled(device):
        return tensor.to(torch.get_autocast_dtype(device))
    return tensor


def cpu_path(choice=None):
    """The instruction set that the CPU kernels use: "avx512_bf16", "avx512", "avx2" or "portable".

    Args:
        choice: selects one for the whole process; "auto" is the best that this CPU runs (the default, or what the
            environment variable PETL_CPU_PATH names). None changes nothing.

    Raises:
        RuntimeError: this CPU, or this build, does not have the path.
    """
    return torch.ops.petl_ext.cpu_path(choice or "")
