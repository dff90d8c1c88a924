"""How many layers a depth search skips: a number of them, or as many as a MAC budget asks for.

A goal's `take` makes an order of layers into the subset that is skipped, a tuple of indices in ascending order, or into
None where these layers cannot reach the goal. No subset that it makes contains another one.
"""

from dataclasses import dataclass

from petl_ext.attaching import LayerCosts


@dataclass(frozen=True)
class NumberOfLayers:
    """Skips the first `num_skip` layers of an order."""

    num_skip: int

    def take(self, order):
        return tuple(sorted(order[: self.num_skip])) if len(order) >= self.num_skip else None

    def __str__(self):
        return f"num_skip={self.num_skip}"


@dataclass(frozen=True)
class MacBudget:
    """Skips layers from the start of an order until the model costs at most `max_macs` of the bare backbone.

    Then, from the end of the order, it gives back every layer without which the budget is still met.
    """

    costs: LayerCosts
    max_macs: float

    def take(self, order):
        useful = [layer for layer in order if self.costs.savings[layer] > 0]
        taken = next((head for head in _heads(useful) if self._is_met(head)), None)
        if taken is None:
            return None
        for layer in taken[::-1]:
            fewer = [other for other in taken if other != layer]
            taken = fewer if self._is_met(fewer) else taken
        return tuple(sorted(taken))

    def __str__(self):
        return f"max_macs={self.max_macs}"

    def _is_met(self, skipped):
        return self.costs.ratio(skipped) <= self.max_macs


def new_goal(num_layers, num_skip, max_macs, costs):
    """A `NumberOfLayers` or a `MacBudget`.

    Raises:
        ValueError: not exactly one of num_skip and max_macs, one out of its range, or a budget without costs.
    """
    if (num_skip is None) == (max_macs is None):
        raise ValueError("DepthSearch: give exactly one of num_skip and max_macs")
    if max_macs is not None:
        return _new_budget(max_macs, costs)
    if type(num_skip) is not int or not 1 <= num_skip <= num_layers:
        raise ValueError(
            f"DepthSearch: num_skip must be an integer from 1 to {num_layers}, the number of layers, got {num_skip!r}"
        )
    return NumberOfLayers(num_skip)


def _new_budget(max_macs, costs):
    if costs is None:
        raise ValueError("DepthSearch: max_macs needs inputs=..., the arguments of a forward pass to count on")
    if type(max_macs) not in (int, float):
        raise ValueError(f"DepthSearch: max_macs must be a number, a share of the backbone's MACs, got {max_macs!r}")
    least = costs.ratio(layer for layer, saving in enumerate(costs.savings) if saving > 0)
    most = costs.ratio(())
    if not least <= max_macs < most:
        raise ValueError(
            f"DepthSearch: max_macs must be at least {least:.4f}, the smallest share of the backbone's MACs that "
            f"skipping can reach, and below {most:.4f}, that without skipping; got {max_macs!r}"
        )
    return MacBudget(costs, max_macs)


def _heads(order):
    return (order[:length] for length in range(len(order) + 1))
