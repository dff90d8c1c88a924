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
    tuple: Mixtral, Qwen 3, gpt-oss; Llama 4's returns all tokens in one dimension. In Gemma 4 router and experts stand
    in the layer itself, so there it is the experts."""

    looked_for = "mixtures of experts (a router, gate or router, beside experts)"

    @classmethod
    def candidates(cls, model):
        found = {}
        for name, module in model.named_modules():
            if _router_weight(module) is not None:
                found[name] = module
            elif {"experts", "router", "self_attn"} <= module._modules.keys():
                found[f"{name}.experts".lstrip(".")] = module.experts
        return found

    @classmethod
    def neighbor(cls, module):
        weight = _router_weight(module)
        return Width(module.hidden_dim, module.down_proj) if weight is None else Width(weight.size(-1), weight)

    @classmethod
    def check(cls, module):
        if _router_weight(module) is None:
            return
        others = [name for name, _ in module.named_parameters() if name.partition(".")[0] not in PARTS]
        if others:
            raise ValueError(f"its experts must be its last step, but {', '.join(others)} may come behind")


def _router_weight(module):
    """[experts, D], or None where the module does not consist of a router and experts."""
    parts = module._modules
    routers = [parts[name] for name in ROUTERS if name in parts] if "experts" in parts else []
    return next((router.weight for router in routers if getattr(router, "weight", None) is not None), None)
