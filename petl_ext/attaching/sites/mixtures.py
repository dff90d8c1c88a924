"""Mixtures of experts: a router and the experts that it chooses from, perhaps experts for all tokens besides.

A layer goes behind or beside the whole of it, so that it acts on every token whichever experts have it.
"""

from typing import NamedTuple

import torch

from petl_ext.attaching.sites.projections import ProjectionSite

ROUTERS = ("gate", "router")
# What such a module may hold besides, all of which acts before the sum over the experts.
PARTS = ("experts", *ROUTERS, "shared_expert", "shared_experts", "shared_expert_gate")


class Width(NamedTuple):
    """Stands for a linear layer as wide as the mixture, which has none: one tensor holds all experts' weights."""

    out_features: int
    weight: torch.Tensor


class MixtureSite(ProjectionSite):
    """A mixture of experts that takes hidden states [..., D] first and returns what its experts say, alone or in a
    tuple: Mixtral, Qwen 3, gpt-oss; Llama 4's returns all tokens in one dimension."""

    looked_for = "mixtures of experts (a router, gate or router, beside experts)"

    @classmethod
    def candidates(cls, model):
        return {name: module for name, module in model.named_modules() if _router(module) is not None}

    @classmethod
    def neighbor(cls, module):
        weight = _router(module).weight
        return Width(weight.size(-1), weight)

    @classmethod
    def check(cls, module):
        others = [name for name, _ in module.named_parameters() if name.partition(".")[0] not in PARTS]
        if others:
            raise ValueError(f"its experts must be its last step, but {', '.join(others)} may come behind")


def _router(module):
    """The part of a mixture whose weight is [experts, D], or None where the module is no mixture."""
    if "experts" not in module._modules:
        return None
    routers = (module._modules.get(name) for name in ROUTERS)
    return next((router for router in routers if getattr(getattr(router, "weight", None), "ndim", 0) == 2), None)
