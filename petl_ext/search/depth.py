"""Which layers a task does not need: dynamic architecture skipping (DAS, arXiv 2309.01479)."""

import dataclasses
import logging
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, ClassVar

from torch import nn
from torch.distributed import ProcessGroup

from petl_ext.attaching import LayerCosts
from petl_ext.composing import HANDLE
from petl_ext.search.choice import SeveralArms, unwrapped
from petl_ext.search.constants import Constants
from petl_ext.search.goal import NumberOfLayers, new_goal
from petl_ext.search.plot import plot_depth
from petl_ext.search.search import Search

logger = logging.getLogger("petl_ext")


def exponential_reward(loss):
    """exp(-loss), the reward of DAS."""
    return math.exp(-loss)


@dataclass(frozen=True)
class DepthConstants(Constants):
    """The constants of a `DepthSearch`. The defaults are DAS's for ViLT, but for `evaluation_mode`.

    Steps are micro-batches: the calls of `DepthSearch.sample`, whatever the accumulation of gradients.

    Attributes:
        warmup_steps: steps before the first update. None stands for 0, or for one epoch, as in DAS, under
            `petl_ext.hf.SearchCallback`.
        search_steps: steps after which the selection is fixed; None: it is fixed by `finish` or `apply`.
        interval: steps from one update to the next.
        num_subsets: different subsets that an update compares, at least 2.
        step_size: factor of every update; the authors use 1.0 (ViLT, METER), 0.05 (LLaMA) and 0.1 (LLaVA).
        evaluation_mode: "eval": subsets are compared in eval mode, as the authors do for LLaMA; "train": in the mode
            in which the model trains, as they do for ViLT and METER. Statistics of batch norms move then.
        ramp_steps: steps over which the number of layers skipped in training grows linearly from 1 to num_skip; the
            authors' LLaVA code takes half the warm-up for it, the others none. Updates compare full subsets.
        probability, temperature, baseline: of the `Bandit`.
    """

    interval: int = 10
    num_subsets: int = 3
    ramp_steps: int = 0
    probability: str = "sigmoid"
    baseline: bool = True

    search_name: ClassVar[str] = "DepthSearch"
    default_warmup_epochs: ClassVar[float] = 1.0  # DAS's
    least: ClassVar[dict] = {**Constants.least, "num_subsets": 2, "ramp_steps": 0}


class SkippedLayers(SeveralArms):
    """Which layers are skipped: an arm is a layer, in the order of the attachment's `layers`.

    Args:
        model: with a `petl_ext.DASConfig` attached.
        num_skip, max_macs, inputs: as a `DepthSearch` has them.
    """

    verb, options_key, measure_name, measures_key = "skip", "subsets", "loss", "losses"

    def __init__(self, model, num_skip, max_macs, inputs):
        self.attachment = _skippable(model)
        self.layers = tuple(self.attachment.layers)
        super().__init__(model, len(self.layers))
        self.num_skip = num_skip
        self.max_macs = max_macs
        self.costs = None if inputs is None else _costs_of(inputs, self.attachment)
        self.goal = new_goal(len(self.layers), num_skip, max_macs, self.costs)

    def check_reach(self, bandit, constants):
        """Raises ValueError where the goal leaves too few subsets to compare, or no number of layers to grow to."""
        if constants.ramp_steps and self.num_skip is None:
            raise ValueError("DepthSearch: ramp_steps needs num_skip: a budget has no number of layers to grow")
        found = len(bandit.best_distinct(constants.num_subsets, self.goal.take))
        if found < constants.num_subsets:
            raise ValueError(
                f"DepthSearch: num_subsets={constants.num_subsets}, but {self.goal} leaves only {found} "
                f"different subset{'s' * (found != 1)} of {len(self.layers)} layers to compare"
            )

    def take(self, order):
        return self.goal.take(order)

    def draw(self, bandit, constants, step):
        if not step:
            self._warn_of_frozen_bypasses()
        return self._training_goal(constants, step).take(bandit.order())

    def draw_to_compare(self, bandit, constants):
        return bandit.draw_distinct(constants.num_subsets, self.goal.take)

    def chosen(self):
        return tuple(self.attachment.skipped)

    def choose(self, option):
        self.attachment.skip(option, decodes=False)

    def settings(self):
        return {
            "layers": list(self.layers),
            "num_skip": self.num_skip,
            "max_macs": self.max_macs,
            "costs": self.costs and dataclasses.asdict(self.costs),
        }

    def names_of(self, option):
        return tuple(self.layers[layer] for layer in option)

    def described(self, option):
        return {"selected_layers": list(self.names_of(option))}

    def summary(self, option, updates):
        return f"skips layers {list(option)} after {updates} updates: {', '.join(self.names_of(option))}"

    def plot(self, search, path):
        plot_depth(search, path)

    def __str__(self):
        return f"{self.goal}, {len(self.layers)} layers"

    def _training_goal(self, constants, step):
        if step >= constants.ramp_steps:
            return self.goal
        return NumberOfLayers(self.num_skip * step // constants.ramp_steps + 1)

    def _warn_of_frozen_bypasses(self):
        """Before the first step and not earlier: what freezes the model may have come after the search."""
        bypasses = [self.model.get_submodule(name).bypass for name in self.layers]
        parameters = [parameter for bypass in bypasses for parameter in bypass.parameters()]
        if parameters and not any(parameter.requires_grad for parameter in parameters):
            logger.warning(
                "DepthSearch: no parameter of a bypass requires gradients, so they stay as they are while layers are "
                "compared; peft.get_peft_model freezes them, for example"
            )


class DepthSearch(Search):
    """Finds, while the model trains, the layers whose place bypass adapters can take at the least loss.

    Every training step skips layers drawn at random; after a warm-up, every few steps some subsets are compared on
    one validation batch and the preferences of their layers move by a bandit's rule (`Bandit.update`):

        search = petl_ext.DepthSearch(model, num_skip=4, seed=0)
        for batch in loader:
            search.sample()                       # this step's layers are skipped
            model(**batch).loss.backward(); optimizer.step(); optimizer.zero_grad()
            if search.is_due:
                search.update(lambda: model(**validation_batch).loss)
        search.apply()

    `update` takes a function that returns the loss of one batch. Call it after the step's backward pass.

    With several processes give each the same seed: the draws are the same everywhere, and losses are averaged over the
    processes before they become rewards, so the preferences are equal bit for bit. DistributedDataParallel needs
    find_unused_parameters=True.

    What differs from the authors' code: validation batches should change from update to update (there it is always the
    first one); subsets are compared in eval mode (there with dropout, but for LLaMA) and from the same state of the
    random number generators, which is restored afterwards; losses are averaged over processes (there the preferences
    are, or rank 0's count); of equal preferences the lower index is selected; and `max_macs` is new.

    Args:
        model: with a `petl_ext.DASConfig` attached; DistributedDataParallel around it may be there or not.
        num_skip: how many layers to skip.
        max_macs: in its place, the greatest share of the bare backbone's multiply-accumulates that may remain.
        inputs: what `petl_ext.counting.count_macs` takes, for max_macs and `macs`; or the `LayerCosts` counted before,
            of the same layers in any order.
        seed: an integer.
        reward: from a loss, averaged over processes, to a number that is larger for a better subset.
        process_group: the torch.distributed group to average over; None: all processes.
        **constants: the fields of `DepthConstants`.

    Attributes:
        layers: dotted names of the layers that can be skipped.
        constants: the `DepthConstants`.
        goal: how many layers are skipped.
        costs: the `LayerCosts`, or None without inputs.
        bandit: the `Bandit`, whose preferences are the layers'.
        step: how often `sample` has drawn.
        finished: whether the selection is fixed.
        history: one dict per update, ready for JSON: step, subsets, losses (None where not finite), rewards,
            preferences and selection after it.

    Raises:
        ValueError: no DASConfig is attached or its layers were removed for good, an argument is out of its range, the
            costs are of other layers, the budget cannot be reached, or there are fewer than num_subsets different
            subsets.
        TypeError: reward cannot be called.
    """

    constants_class = DepthConstants

    layers = property(attrgetter("choice.layers"))
    attachment = property(attrgetter("choice.attachment"))
    num_skip = property(attrgetter("choice.num_skip"))
    max_macs = property(attrgetter("choice.max_macs"))
    costs = property(attrgetter("choice.costs"))
    goal = property(attrgetter("choice.goal"))

    def __init__(
        self,
        model: nn.Module,
        num_skip: int | None = None,
        max_macs: float | None = None,
        inputs: Any = None,
        seed: int = 0,
        reward: Callable[[float], float] = exponential_reward,
        process_group: ProcessGroup | None = None,
        **constants: Any,
    ):
        constants = DepthConstants(**constants)
        choice = SkippedLayers(unwrapped(model), num_skip, max_macs, inputs)
        super().__init__(choice, constants, seed, process_group, reward)
        choice.check_reach(self.bandit, constants)

    def selected_layers(self) -> tuple[str, ...]:
        """The dotted names of the selection."""
        return self.choice.names_of(self.selection())

    def macs(self, selection: Iterable[int] | None = None) -> float:
        """The share of the bare backbone's multiply-accumulates that remains with these layers skipped.

        Args:
            selection: indices; None: the present selection.

        Raises:
            ValueError: the search was made without inputs, or these are not different indices of layers.
        """
        if self.costs is None:
            raise ValueError("DepthSearch: macs needs a search that was made with inputs=..., to count them on")
        if selection is None:
            return self.costs.ratio(self.selection())
        layers = list(selection) if isinstance(selection, Iterable) else [None]
        if not all(map(self.choice.is_arm, layers)) or len(set(layers)) < len(layers):
            raise ValueError(
                f"DepthSearch: selection must be different indices from 0 to {len(self.layers) - 1}, got {selection!r}"
            )
        return self.costs.ratio(layers)

    def apply(self, permanent: bool = False) -> tuple[int, ...]:
        """Ends the search and skips the selection.

        DAS then trains once more from the pre-trained weights, with this selection and new adapters.

        Args:
            permanent: whether the weights of the skipped layers are deleted.

        Returns:
            The selection.

        Raises:
            RuntimeError: permanent, and no update has been made, so that nothing is known of the layers.
            ValueError: the model could not decode without these layers, see `SkippingAttachment.skip`.
        """
        if permanent and not self.history:
            raise RuntimeError("DepthSearch: before the first update nothing says which layers to delete")
        with self.unchanged_on_error():
            selection = super().apply()
            self.attachment.skip(selection)
            if permanent:
                self.attachment.remove_skipped()
        return selection

    @classmethod
    def arguments_of(cls, state: dict[str, Any]) -> dict[str, Any]:
        costs = None if state["costs"] is None else LayerCosts(**state["costs"])
        return {"num_skip": state["num_skip"], "max_macs": state["max_macs"], "inputs": costs}


def _skippable(model):
    attachment = getattr(model, HANDLE, None)
    if not getattr(attachment, "layers", ()):
        found = "nothing is attached" if attachment is None else f"attached is {attachment.config}"
        raise ValueError(
            f"DepthSearch: {type(model).__name__} has no layers that can be skipped, {found}; write "
            "petl_ext.attach(model, petl_ext.DASConfig()) first"
        )
    if attachment.config.permanent:
        raise ValueError(
            f"DepthSearch: the skipped layers of {type(model).__name__} have been removed for good, so there is no "
            "choice left; search on a model whose DASConfig is not permanent"
        )
    return attachment


def _costs_of(inputs, attachment):
    """`LayerCosts` in the order of the attachment's layers: files may have their keys sorted."""
    if not isinstance(inputs, LayerCosts):
        return attachment.layer_costs(inputs)
    if not isinstance(inputs.layers, dict) or set(inputs.layers) != set(attachment.layers):
        raise ValueError(
            f"DepthSearch: inputs must be costs of the layers {list(attachment.layers)}, got {inputs.layers!r}"
        )
    counts = [(inputs.backbone, inputs.unskipped), *inputs.layers.values()]
    if not all(_are_two_integers(pair) for pair in counts):
        raise ValueError(f"DepthSearch: costs must be integers, two for each layer, got {inputs}")
    return dataclasses.replace(inputs, layers={name: inputs.layers[name] for name in attachment.layers})


def _are_two_integers(values):
    return isinstance(values, list | tuple) and len(values) == 2 and all(type(value) is int for value in values)
