"""Loads petl_ext/_C, whose import registers the C++ kernels with torch's dispatcher."""

from pathlib import Path

import torch

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
