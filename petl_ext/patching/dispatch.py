"""Whether a patched module's call goes to the kernel or to the module's own forward."""

import torch

from petl_ext.composing import has_device_hook
from petl_ext.ops.library import cpu_path

# Rows below which the own forward is faster on one thread of a CPU, by (op, dtype): without gradients, and with them,
# whose backward pass counts too. None: it is at every size. Measured with 50 and 200 prompts, bottlenecks of 48 to 192
# and a width of 768, on modules cast to the dtype, not under autocast, where they hold less well (docs/patch.md); what
# they leave is in bench/results/amd-epyc/2026-11-21-9e7af3f.json. In float16 and on CUDA nothing has been measured, and
# no row is too few.
FLOORS = {
    ("apt", torch.float32): (128, 200),
    ("apt", torch.bfloat16): (0, 512),
    ("adapter", torch.float32): (128, 4096),
    ("adapter", torch.bfloat16): (128, None),
    ("attention_pool", torch.float32): (0, 0),
    ("attention_pool", torch.bfloat16): (0, 0),
}


def adjust_floors():
    """Called before a module is patched: at import a PETL_CPU_PATH that this processor lacks is no error yet, and in a
    forward torch.compile could not look into it."""
    # Without the processor's bfloat16 products they were 1.3 to 3.4 times as fast, with 200 prompts at 16 rows 1.0 to
    # 1.1.
    if cpu_path() != "avx512_bf16":
        FLOORS.update({(op, torch.bfloat16): (0, 0) for op in ("apt", "adapter")})


# Greatest inner size of the CUDA kernels; their width is a multiple of 8 up to 8192.
_CUDA_LIMITS = {"apt": 512, "adapter": 512, "attention_pool": 64}
_DEVICES = ("cpu", "cuda")
# Asked once, since torch.compile cannot look into the dispatcher.
_KERNELS = {
    (op, device)
    for op in _CUDA_LIMITS
    for device in _DEVICES
    if torch._C._dispatch_has_kernel_for_dispatch_key(
        f"petl_ext::{op}_forward", torch._C._dispatch_key_for_device(device)
    )
}


def own_forward_because(kind, module, x):
    """Why this call, on the rows of x, runs the module's own forward; "" where the kernel does.

    Rows come first: calls with few have the least time to lose.
    """
    if _too_few_rows(kind.op, x):
        return "too few rows"
    if x.dim() not in module.petl_settings.axes:
        return f"inputs of {x.dim()} axes"
    return own_forward_for_now(kind, module, x.device.type, x.dtype)


def own_forward_for_now(kind, module, device, dtype):
    """The same of every call in the module's present state."""
    if device not in _DEVICES or (kind.op, device) not in _KERNELS:
        return f"this build holds no kernel for {device}"
    if dtype is torch.float64:
        return "float64"
    modules, settings = list(module.modules()), module.petl_settings
    if tuple(map(type, modules[1:])) != settings.parts:
        return "a part was replaced"
    for index, name, value in settings.attributes:
        now = getattr(modules[index], name, None)
        if now is not value and now != value:  # NaN is not equal to itself
            return f"{name} was changed"
    if beside := next(filter(None, map(beside_its_class, modules[1:])), ""):
        return beside
    if device == "cuda":
        width, inner = kind.sizes(module)
        if width % 8 or width > 8192 or inner > _CUDA_LIMITS[kind.op]:
            return f"the CUDA kernel does not take a width of {width} with {inner}"
    dropout = kind.dropout(module)
    return f"dropout {dropout} in training" if dropout > 0 else ""


def own_forward_below(op, device, dtype):
    """For which calls rows are too few, in words."""
    if device != "cpu" or (op, dtype) not in FLOORS:
        return ""
    floors = zip(("without", "with"), FLOORS[op, dtype], strict=True)
    sizes = [(name, "always" if floor is None else f"below {floor} rows") for name, floor in floors if floor != 0]
    return ", ".join(f"{name} gradients {size}" for name, size in sizes)


def beside_its_class(part):
    """What its call does beside its class's forward; "" where it does nothing."""
    if part._forward_hooks or part._forward_pre_hooks or part._backward_hooks or part._backward_pre_hooks:
        return "a part carries a hook"
    if "forward" in vars(part) and not _only_moves_inputs(part):
        return "a part has a forward of its own"
    return ""


def _only_moves_inputs(part):
    """Whether the forward of the instance is accelerate's, and does not bring the weights from elsewhere too."""
    return has_device_hook(part) and not getattr(part._hf_hook, "offload", True)


def _too_few_rows(op, x):
    if x.device.type != "cpu":
        return False
    dtype = x.dtype
    if dtype is torch.float32 and torch.is_autocast_enabled("cpu"):
        dtype = torch.get_autocast_dtype("cpu")
    floors = FLOORS.get((op, dtype))
    if floors is None:
        return False
    floor = floors[torch.is_grad_enabled()]
    return floor is None or x.numel() < floor * x.size(-1)
