"""What is known about the kernels: which ops there are, who computes a call, within which limits, and how fast.

Importing it loads petl_ext/_C, which registers the C++ kernels with torch's dispatcher.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from petl_ext.checks import check_choice, check_probability
from petl_ext.counting import add_flop_formula
from petl_ext.ops import hopper
from petl_ext.ops.backends import AUTO, BACKENDS, NATIVE, REFERENCE, VARIABLE, Backend, chosen
from petl_ext.ops.derivatives import are_transformed
from petl_ext.ops.preferred import PREFERENCES, backends_preferred_for, preferred_backend

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


class Limits(NamedTuple):
    """What the kernels of an op take on a GPU; for CUDA as C++ says it.

    Attributes:
        width_multiple: what the width D is a multiple of.
        max_width: the greatest D.
        max_inner: the greatest inner size: prompts P, bottleneck B or heads H.
    """

    width_multiple: int
    max_width: int
    max_inner: int

    def allow(self, width, inner):
        return width % self.width_multiple == 0 and width <= self.max_width and inner <= self.max_inner


@dataclass(frozen=True)
class Op:
    """An op of `petl_ext.ops`, which is made of two raw ops of torch.ops.

    Attributes:
        name: "apt".
        flops: {a raw op's name: its FLOPs, computed from its arguments, tensors as their shapes}.
        cuda_limits: a `Limits`, or None where C++ names none.
        sizes: from the tensors that the op is given, (rows, width, inner size, dtype of the weights); or None.
        has_dropout: whether the kernels drop out.
    """

    name: str
    flops: dict[str, Callable]
    cuda_limits: Limits | None
    sizes: Callable | None = None
    has_dropout: bool = False


class Kernel(NamedTuple):
    """Who computes a call of an op.

    Attributes:
        name: "apt (cpu, avx512)", "apt (cuda)", "apt (cuda, hopper from 1537 rows)" where PETL_HOPPER=1 asks for it,
            "apt (cuda, triton at some sizes)" where a measured file says so, "reference", or "none": the call raises.
        reason: why it is not a kernel; "" where it is.
    """

    name: str
    reason: str = ""


OPS = {}  # {name: Op}. Each op's file enters its own.
OLDEST_CUDA = (8, 0)  # the least compute capability that the CUDA kernels are compiled for
# (namespace of torch.ops, device) whose raw ops take activations each in a dtype of its own, round x to bfloat16
# themselves where their products shall be so (`rounds_x`), and keep hidden units for backward (`keep_raw`).
MIXING = {("petl_ext", "cpu")}
# (backend, op, device) of every kernel that there is. Looked up once, since torch.compile cannot look into the
# dispatcher.
_HELD = set()


def register(name, forward_flops, backward_flops, sizes=None, has_dropout=False):
    """Enters an op whose raw ops `petl_ext::<name>_forward` and `_backward` have been defined, with fake kernels.

    Where no backend holds a kernel for the tensors' device, they raise from then on.

    Args:
        name: of the function in `petl_ext.ops`, beside which there is `<name>_reference`.
        forward_flops, backward_flops: from the raw op's arguments, tensors as their shapes, the FLOPs of the matrix
            products that the kernels compute: 2 per multiply-accumulate. What only refines a product's rounding is not
            counted.
    """
    flops = {f"{name}_forward": forward_flops, f"{name}_backward": backward_flops}
    limits = getattr(torch.ops.petl_ext, f"{name}_cuda_limits", None)
    OPS[name] = Op(name, flops, Limits(*limits()) if limits else None, sizes, has_dropout)

    def refuse(*arguments):
        devices = {str(argument.device) for argument in arguments if isinstance(argument, torch.Tensor)}
        raise NotImplementedError(no_kernel_text(name, devices))

    for raw, formula in flops.items():
        torch.library.impl(f"petl_ext::{raw}", "CompositeExplicitAutograd", refuse)
        add_flop_formula(getattr(torch.ops.petl_ext, raw), formula)
    _note_kernels(BACKENDS[NATIVE], name)


def add_backend(name, devices, implementations, limits=None, missing=""):
    """Adds a backend behind those that there are. Its raw ops have the schemas and the fake kernels of petl_ext's own.

    Args:
        name: as `petl_ext.ops.backend` and PETL_BACKEND shall know it.
        devices: the types of device, such as "cuda", that it is written for.
        implementations: {"apt_forward": a function of the raw op's arguments, ...}, of an op both directions.
        limits: {"apt": a `Limits`, ...} of ops that have any.
        missing: why it cannot compute now, and what to do, where a package that it needs is not there: it is then
            known by its name, but holds no kernel.

    Raises:
        ValueError: the name is taken or cannot be one, or the implementations are not as above.
    """
    _check_backend(name, implementations)
    added = Backend(name, tuple(devices), f"petl_{name}", limits or {}, missing)
    for op in [op for op in OPS.values() if op.flops.keys() <= implementations.keys()]:
        for raw, formula in op.flops.items():
            _define_as_native(raw, added, implementations[raw])
            add_flop_formula(getattr(getattr(torch.ops, added.namespace), raw), formula)
        _note_kernels(added, op.name)
    BACKENDS[name] = added


def _check_backend(name, implementations):
    if not name.isidentifier() or name in (AUTO, REFERENCE, *BACKENDS):
        raise ValueError(f"add_backend: name must be a new one, of letters and digits, got {name!r}")
    if unknown := implementations.keys() - {raw for op in OPS.values() for raw in op.flops}:
        raise ValueError(f"add_backend: implementations must be of {', '.join(OPS)}, got {', '.join(sorted(unknown))}")
    for op in OPS.values():
        given = op.flops.keys() & implementations.keys()
        if given and given != op.flops.keys():
            raise ValueError(f"add_backend: implementations must be {' and '.join(op.flops)}, got {', '.join(given)}")


def _define_as_native(raw, backend, implementation):
    native = getattr(torch.ops.petl_ext, raw).default
    schema = str(native._schema)
    torch.library.define(f"{backend.namespace}::{raw}", schema[schema.index("(") :])
    torch.library.register_fake(f"{backend.namespace}::{raw}", native)
    torch.library.impl(f"{backend.namespace}::{raw}", backend.devices, implementation)


def _note_kernels(backend, op):
    if backend.missing:
        return
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    for device in backend.devices:
        if has_kernel(f"{backend.namespace}::{op}_forward", torch._C._dispatch_key_for_device(device)):
            _HELD.add((backend.name, op, device))


def held_kernels(op):
    """[(the backend's name, the type of device), ...] of the kernels of `op` that there are."""
    return [(b.name, device) for b in BACKENDS.values() for device in b.devices if (b.name, op, device) in _HELD]


def raw_ops_for(op, tensors, dropout=0.0):
    """The namespace of torch.ops whose raw ops compute this call of `op`; None where the reference does.

    Args:
        tensors: all that are given to the op; some but the first, whose device is the call's, may be None.
        dropout: a probability, of which the kernels of some ops do not know.

    Raises:
        ValueError: dropout is no number in [0, 1), or PETL_BACKEND names no backend.
        NotImplementedError: the chosen backend has no kernel for the device.
    """
    choice = chosen()
    if dropout != 0:
        check_probability(f"{op}: dropout", dropout)
    is_unknown = dropout != 0 and not OPS[op].has_dropout
    if choice == REFERENCE or is_unknown or _has_float64(tensors) or are_transformed(tensors):
        return None
    device = tensors[0].device
    if PREFERENCES and choice == AUTO and device.type == "cuda":
        sizes = OPS[op].sizes(tensors)
        preferred = preferred_backend(op, _name_of(device.index), *sizes)
        if (preferred, op, "cuda") in _HELD:
            return BACKENDS[preferred].namespace
    if backend := _backend_for(op, device):
        return backend.namespace
    # The raw ops give the shapes of tensors that have no contents, and refuse others.
    is_refused_there = choice in (AUTO, NATIVE) and (NATIVE, op, device.type) not in _HELD
    if device.type == "meta" or is_refused_there:
        return BACKENDS[NATIVE].namespace
    raise NotImplementedError(no_kernel_text(op, {str(device)}))


def _has_float64(tensors):
    """Whether any tensor is of the dtype that no kernel knows."""
    return torch.float64 in [tensor.dtype for tensor in tensors if tensor is not None]


def takes_packed(op, device, width, inner):
    """Whether there is a kernel of `op` on this device and for these sizes that takes weights packed beforehand."""
    if device.type == "meta":
        return False
    key = torch._C._dispatch_key_for_device(device.type)
    if not torch._C._dispatch_has_kernel_for_dispatch_key(f"petl_ext::{op}_pack", key):
        return False
    return OPS[op].cuda_limits.allow(width, inner) and (device.type != "cuda" or _runs_cuda_kernels(device.index))


def kernel_for(op, device, dtype, dropout=0.0, sizes=None):
    """Who computes such a call of an op, as the user has chosen, and why it is not a kernel where it is none.

    Args:
        op: its name.
        device: a torch.device, or the type of one.
        dtype: of the tensors.
        dropout: the probability at which the call drops out.
        sizes: (width, inner size), which the CUDA kernels bound; None: they are within the bounds.

    Returns:
        A `Kernel`.

    Raises:
        ValueError: there is no such op, or PETL_BACKEND names no backend.
    """
    check_choice("kernel_for: op", op, OPS)
    device = torch.device(device)
    if reason := _reference_because(op, dtype, dropout):
        return Kernel(REFERENCE, reason)
    if reason := _none_because(op, device, sizes) or _no_hopper_because(op, device, dtype, dropout, sizes):
        return Kernel("none", reason)
    backend = _backend_for(op, device).name
    details = [device.type]
    if backend != NATIVE:
        details.append(backend)
    elif device.type == "cpu":
        details.append(cpu_path())
    elif hopper.is_asked(op, dtype, dropout, sizes):
        details.append(hopper.in_words())
    elif PREFERENCES and chosen() == AUTO:
        details += [f"{name} at some sizes" for name in backends_preferred_for(op, _name_of(device.index))]
    return Kernel(f"{op} ({', '.join(details)})")


def no_kernel_because(op, device, dtype, dropout=0.0, sizes=None):
    """The reason of `kernel_for` alone, in compiled code too."""
    return _reference_because(op, dtype, dropout) or _none_because(op, torch.device(device), sizes)


def no_kernel_text(op, devices):
    """What a call of `op` on tensors of these devices is refused with."""
    whose, devices = _holder(), sorted(devices)
    remedies = [
        f"{reason}." for backend in BACKENDS.values() if (reason := backend.missing) and _may_use(backend, chosen())
    ]
    if chosen() in (AUTO, NATIVE) and any(device.startswith("cuda") for device in devices):
        remedies.append(
            "Installed anew beside a CUDA build of torch, or with PETL_CUDA=1, petl_ext holds CUDA kernels for GPUs of "
            f"compute capability {OLDEST_CUDA[0]}.{OLDEST_CUDA[1]} or later."
        )
    return " ".join(
        (
            f"petl_ext.ops.{op}: {whose} holds no kernel for {', '.join(devices)} (`python -m petl_ext info` lists "
            f"what it holds); petl_ext.ops.{op}_reference runs on every device, and computes where it is asked for: by "
            f'`with petl_ext.ops.backend("{REFERENCE}")` or by {VARIABLE}={REFERENCE}.',
            *remedies,
        )
    )


def _reference_because(op, dtype, dropout):
    if chosen() == REFERENCE:
        return "the backend reference was chosen"
    if dropout > 0 and not OPS[op].has_dropout:
        return f"dropout {dropout} in training"
    return "float64" if dtype is torch.float64 else ""


def _none_because(op, device, sizes):
    backend = _backend_for(op, device)
    if backend is None:
        return f"{_holder()} holds no kernel for {device.type}"
    limits = backend.limits.get(op)
    if backend.name == NATIVE and device.type == "cuda":
        limits = OPS[op].cuda_limits
    if sizes and limits and not limits.allow(*sizes):
        whose = "CUDA" if backend.name == NATIVE else backend.name
        return f"the {whose} kernel does not take a width of {sizes[0]} with {sizes[1]}"
    return ""


def _no_hopper_because(op, device, dtype, dropout, sizes):
    if device.type != "cuda" or _backend_for(op, device).name != NATIVE:
        return ""
    if not hopper.is_asked(op, dtype, dropout, sizes):
        return ""
    return hopper.obstacle(torch.cuda.get_device_capability(device) if torch.cuda.is_available() else None)


def _holder():
    """Who would have to compute, in words."""
    return "this build" if chosen() in (AUTO, NATIVE) else f"the backend {chosen()}"


def _may_use(backend, choice):
    return choice == AUTO or choice == backend.name


def _backend_for(op, device):
    """The first that may be used, holds a kernel and can run it on this device, or None."""
    choice, device_type = chosen(), device.type
    for backend in BACKENDS.values():
        if _may_use(backend, choice) and (backend.name, op, device_type) in _HELD:
            if device_type == "cuda" and backend.name == NATIVE and not _runs_cuda_kernels(device.index):
                continue
            return backend
    return None


def _runs_cuda_kernels(index):
    return not torch.cuda.is_available() or torch.cuda.get_device_capability(index) >= OLDEST_CUDA


def _name_of(index):
    return torch.cuda.get_device_name(index)


# torch.compile calls them when it compiles, instead of looking into them; its own decorator would import all of it.
_runs_cuda_kernels._dynamo_marked_constant = _name_of._dynamo_marked_constant = True


def cpu_path(choice: str | None = None) -> str:
    """The instruction set that the CPU kernels use: "amx", "avx512_bf16", "avx512" or "avx2", on
    64-bit ARM "neon_bf16", and everywhere "portable".

    Args:
        choice: selects one for the whole process; "auto" is the best that this CPU runs (the default, or what the
            environment variable PETL_CPU_PATH names). None changes nothing.

    Raises:
        RuntimeError: this CPU, or this build, does not have the path.
    """
    return torch.ops.petl_ext.cpu_path(choice or "")
