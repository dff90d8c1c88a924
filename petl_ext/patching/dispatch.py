"""Whether a patched module's call goes to the kernel or to the module's own forward."""

import contextlib

import torch

from petl_ext.composing import has_device_hook
from petl_ext.ops.floors import floors_of
from petl_ext.ops.kernels import no_kernel_because
from petl_ext.patching.kind import dropout_of, new_tensor


def own_forward_because(module, x):
    """Why this call, on the rows of x, runs the module's own forward; "" where the kernel does.

    Rows come first: calls with few have the least time to lose.
    """
    if _too_few_rows(module, x):
        return "too few rows"
    if x.dim() not in module.petl_settings.axes:
        return f"inputs of {x.dim()} axes"
    return own_forward_for_now(module, x.device.type, x.dtype)


def own_forward_for_now(module, device, dtype):
    """The same of every call in the module's present state."""
    modules, settings = list(module.modules()), module.petl_settings
    if settings is None:
        return "it is made of pieces of a patched module"
    if tuple(map(type, modules[1:])) != settings.parts:
        return "a part was replaced"
    for index, name, value in settings.attributes:
        now = getattr(modules[index], name, None)
        # NaN is not equal to itself, and a tensor in the place of a number is equal in parts.
        if now is not value and (type(now) is not type(value) or now != value):
            return f"{name} was changed"
    if name := new_tensor(modules, settings.tensors):
        return f"it has got {name}"
    if change := module.petl_change(module):
        return change
    if any(name == device and is_on is None for name, is_on, _ in settings.autocast):
        return f"an autocast of its own on {device}, which could not be seen where it was patched"
    if beside := next(filter(None, map(beside_its_class, modules[1:])), ""):
        return beside
    dropout = dropout_of(module)
    if dropout > 0 and settings.dropout_by is None:
        return f"dropout {dropout} in training, where the kernel has none"
    # To look at them takes longer than all else, and only CUDA bounds them.
    sizes = module.petl_sizes(module) if device == "cuda" else None
    return no_kernel_because(module.petl_op, device, dtype, dropout, sizes)


def entered_autocast(settings, device):
    """The autocast that the module's own forward enters on such a device, as a context."""
    for name, is_on, dtype in settings.autocast:
        if name == device and is_on is not None:
            return torch.autocast(device, dtype, is_on)
    return contextlib.nullcontext()


def own_forward_below(module, device, dtype):
    """For which calls in the module's present state rows are too few, in words."""
    said = _below(module, floors_of(module.petl_op, device, dtype, dtype))
    if said and dtype is torch.float32:
        within = _below(module, floors_of(module.petl_op, device, dtype, torch.bfloat16))
        said += f"; under autocast in bfloat16 {within}" if within else ""
    return said


def _below(module, floors):
    if floors is None:
        return ""
    named = (("without", floors.forward), ("with", floors.with_gradients(dropout_of(module))))
    sizes = [(name, "always" if floor is None else f"below {floor} rows") for name, floor in named if floor != 0]
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


def _too_few_rows(module, x):
    if x.device.type != "cpu":
        return False
    dtype = weight_dtype = x.dtype
    if torch.is_autocast_enabled("cpu"):
        weight_dtype = next((weight.dtype for weight in module.parameters()), dtype)
        dtype = torch.get_autocast_dtype("cpu") if dtype is torch.float32 else dtype
    floors = floors_of(module.petl_op, "cpu", weight_dtype, dtype)
    if floors is None:
        return False
    floor = floors.with_gradients(dropout_of(module)) if torch.is_grad_enabled() else floors.forward
    return floor is None or x.numel() < floor * x.size(-1)
