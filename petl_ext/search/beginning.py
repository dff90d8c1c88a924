"""What can be measured of a search's arms before it: a search may begin with it (`Search.warm_start`)."""

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F

from petl_ext.search.choice import OneArm
from petl_ext.search.comparing import check_callable, measured, rewards_of
from petl_ext.search.depth import DepthSearch
from petl_ext.search.search import Search


def one_by_one(search: Search, compute: Callable[[], Any], /) -> list[float]:
    """The reward of each arm alone: of a `DepthSearch`, with one layer skipped; of a `PlacementSearch`, at one layer.

    Costs one call of `compute` for each arm, without gradients. The search, the model's option, torch's generators and
    the modules' training flags stay as they were.

    Args:
        search: any.
        compute: as `Search.update` takes it.

    Returns:
        One number per arm, larger for a better one.

    Raises:
        TypeError: `compute` cannot be called, or returns no number.
    """
    check_callable("one_by_one", "compute", compute)
    arms = range(search.choice.num_arms)
    options = list(arms) if isinstance(search.choice, OneArm) else [(arm,) for arm in arms]
    return rewards_of(search, measured(search, options, compute))


def block_influence(search: DepthSearch, compute: Callable[[], Any], /) -> list[float]:
    """How little each layer of a `DepthSearch` changes its input: the mean cosine of the angle between the states that
    go in and come out (block influence of ShortGPT, arXiv 2403.03853, is 1 less it).

    Costs one call of `compute`, with nothing skipped. Else as `one_by_one`.

    Args:
        search: whose layers take and return hidden states [..., D] first.
        compute: runs the model on some batch; what it returns is not looked at.

    Returns:
        One number per layer, larger where less is lost without it.

    Raises:
        TypeError: `compute` cannot be called.
        RuntimeError: a layer has not run.
    """
    check_callable("block_influence", "compute", compute)
    cosines, hooks = {}, []

    def record(arm):
        def hook(module, arguments, named, output):
            before = arguments[0] if arguments else named["hidden_states"]
            after = output[0] if isinstance(output, tuple) else output
            cosines[arm] = F.cosine_similarity(before.float(), after.float(), dim=-1).mean().item()

        return hook

    def run():
        compute()
        return 0.0

    try:
        for arm, name in enumerate(search.layers):
            layer = search.choice.model.get_submodule(name)
            hooks.append(layer.register_forward_hook(record(arm), with_kwargs=True))
        measured(search, [()], run)
    finally:
        for hook in hooks:
            hook.remove()
    if len(cosines) < len(search.layers):
        raise RuntimeError(f"block_influence: compute must run all {len(search.layers)} layers, got {len(cosines)}")
    return [cosines[arm] for arm in range(len(search.layers))]
