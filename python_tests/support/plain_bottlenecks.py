"""A bottleneck to vary, and what checks it when it is patched."""

import copy

import torch
import torch.nn.functional as F
from ops_called import OpsCalled
from torch import nn

import petl_ext

DIM, INNER = 32, 8


def rows(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Plain(nn.Module):
    def __init__(self, bias=True, scale=None, norm=None):
        super().__init__()
        self.narrow, self.widen = nn.Linear(DIM, INNER, bias=bias), nn.Linear(INNER, DIM, bias=bias)
        self.scale, self.norm = scale, norm

    def forward(self, x):
        out = self.widen(F.relu(self.narrow(x if self.norm is None else self.norm(x))))
        return x + (out if self.scale is None else out * self.scale)


def checked(model, *arguments, runs=("adapter",), **named):
    """What a patched model returns, which must be what it did, by these ops."""
    expected = copy.deepcopy(model)
    petl_ext.unpatch(expected)
    with OpsCalled() as called:
        out = model(*arguments, **named)
    assert called.names == list(runs)
    wanted = expected(*arguments, **named)
    assert out.dtype is wanted.dtype and out.is_contiguous() and torch.allclose(out, wanted, rtol=2e-2, atol=2e-2)
    return out
