"""What an activation computes, whatever wraps it."""

import copy
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from petl_ext.ops.adapter import ACTIVATIONS
from petl_ext.patching.kind import described

# That no kernel has, for reports: {name: function}.
OTHERS = {
    "tanh GELU": partial(F.gelu, approximate="tanh"),
    "QuickGELU": lambda x: x * torch.sigmoid(1.702 * x),
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "ReLU6": F.relu6,
    "squared ReLU": lambda x: F.relu(x).square(),
    "leaky ReLU of slope 0.01": F.leaky_relu,
    "ELU": F.elu,
    "SELU": F.selu,
    "Mish": F.mish,
    "softplus": F.softplus,
    "softsign": F.softsign,
    "hardswish": F.hardswish,
    "hardtanh": F.hardtanh,
    "the identity": lambda x: x,
}
# A kernel's function must be met exactly; some code rounds the constants of others.
_EXACT, _NEARLY = 1e-12, 1e-6


def activation_of(function):
    """The ops' name for what `function` computes, "softmax" over the last axis included; None where they have none."""
    if type(function) is nn.Softmax:
        return "softmax" if function.dim == -1 else None
    return _name_in(ACTIVATIONS, function, _EXACT)


def refuse_activation(function, known=tuple(ACTIVATIONS)):
    found = activation_of(function)
    if found in known:
        return ""
    computed = found or _name_in(OTHERS, function, _NEARLY)
    what = f"computes {computed}" if computed else f"is {described(function)}"
    return f"its activation {what}, not {' or '.join(known)}"


def name_of(functions, x, y, tolerance=_NEARLY):
    """The name of the one of `functions` that makes y of x, or None."""
    same = (name for name, known in functions.items() if torch.allclose(y, known(x), tolerance, tolerance))
    return next(same, None) if x.shape == y.shape else None


def _name_in(functions, function, tolerance):
    x = torch.linspace(-8, 8, 65, dtype=torch.float64, device="cpu")
    x = torch.cat([x, 40 * x])  # Some saturate late.
    try:
        # Of a copy, since calls may leave something behind.
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            return name_of(functions, x, copy.deepcopy(function)(x.clone()), tolerance)
    except Exception:  # It is other people's and may do anything; then it is none of these.
        return None
