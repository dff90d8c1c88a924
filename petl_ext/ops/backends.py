"""Who may compute the ops, and the user's choice among them.

A backend holds kernels of some ops for some devices: torch ops of the same schemas as petl_ext's own, in a namespace of
torch.ops that is the backend's. "native", the C++ and CUDA of petl_ext._C, is there always;
`petl_ext.ops.kernels.add_backend` adds others. The references in plain PyTorch are no backend, but can be chosen too.
"""

import os
import warnings
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import overload

from petl_ext.checks import check_choice

NATIVE, REFERENCE, AUTO = "native", "reference", "auto"
VARIABLE = "PETL_BACKEND"


@dataclass(frozen=True)
class Backend:
    """Kernels of one make.

    Attributes:
        name: as `backend` and PETL_BACKEND know it.
        devices: the types of device, such as "cuda", that it is written for.
        namespace: of torch.ops, where its raw ops are.
        limits: {an op's name: a `petl_ext.ops.kernels.Limits`}, of ops that have any.
        missing: why it holds no kernel here, and what to do; "" where it does.
    """

    name: str
    devices: tuple
    namespace: str
    limits: dict = field(default_factory=dict)
    missing: str = ""


# In the order in which "auto" looks for a kernel.
BACKENDS = {NATIVE: Backend(NATIVE, ("cpu", "cuda"), "petl_ext")}
_default = os.environ.get(VARIABLE, AUTO)
# The contexts that have been entered and not left; the last one decides. They need not be left in order.
_open = []


def choices():
    """What can be chosen."""
    return (AUTO, *BACKENDS, REFERENCE)


def chosen():
    """What is chosen now. In compiled code torch guards what is read here, and compiles anew when it changes.

    Raises:
        ValueError: PETL_BACKEND names nothing that can be chosen.
    """
    last = _open[-1:]  # in one step, since another thread may leave its context
    choice = last[0].choice if last else _default
    if choice not in (AUTO, REFERENCE) and choice not in BACKENDS:
        raise ValueError(
            f"petl_ext: the environment variable {VARIABLE} must be one of: {', '.join(choices())}; got {choice!r}"
        )
    return choice


class _Choice:
    """The context of one choice, to be entered once."""

    # Of an instance that torch.compile makes, without a call of __init__.
    _entered = True

    def __init__(self, choice):
        self.choice = choice
        self._entered = False

    def __enter__(self):
        if self._entered:
            raise RuntimeError(f'petl_ext.ops.backend("{self.choice}"): this context has been entered; make another')
        self._entered = True
        _open.append(self)

    def __exit__(self, *error):
        _open.remove(self)

    def __del__(self):
        if not self._entered:
            warnings.warn(
                f'petl_ext.ops.backend("{self.choice}") chooses nothing by itself: write `with` before it, or set '
                f"{VARIABLE}",
                RuntimeWarning,
                stacklevel=2,
            )


@overload
def backend(choice: None = None) -> str: ...
@overload
def backend(choice: str) -> AbstractContextManager[None]: ...
def backend(choice=None):
    """Chooses who computes the ops: `with petl_ext.ops.backend("reference"): ...`.

    The choice is the whole process's, as torch.backends' are: threads that were there before, those of
    nn.DataParallel and of the backward pass see it too. A backward pass is computed by the backend of its forward pass,
    even if another has been chosen since; what gradient checkpointing computes again is a forward pass of its own. Code
    that torch.compile has compiled follows the choice, by compiling anew; an exported program, a traced one and a CUDA
    graph keep what was chosen when they were made. The environment variable PETL_BACKEND chooses for all that is
    outside of such a `with`.

    Args:
        choice: "auto" (the default: the first backend that holds a kernel for the tensors' device), "native" (the
            kernels in C++ and CUDA), "triton" (GPUs), another backend that has been added, or "reference" (plain
            PyTorch, on every device). None chooses nothing.

    Returns:
        A context; where choice is None, the name of what is chosen now.

    Raises:
        ValueError: choice, or what PETL_BACKEND says, is none of these.
    """
    if choice is None:
        return chosen()
    check_choice("ops.backend: choice", choice, choices())
    return _Choice(choice)
