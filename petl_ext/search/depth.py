"""Which layers a task does not need: dynamic architecture skipping (DAS, arXiv 2309.01479)."""

import dataclasses
import logging
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import torch

from petl_ext.attaching import LayerCosts
from petl_ext.composing import HANDLE
from petl_ext.search.base import Constants, Search, check_callable, number_of, unwrapped
from petl_ext.search.goal import NumberOfLayers, new_goal

logger = logging.getLogger("petl_ext")


def exponential_reward(loss):
    """exp(-loss), the reward of DAS."""
    return math.exp(-loss)


@dataclass(frozen=True)
class SearchConstants(Constants):
    """The constants of a search. The defaults are DAS's for ViLT, but for `evaluation_mode`.

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
    step_size: float = 1.0
    evaluation_mode: str = "eval"
    ramp_steps: int = 0
    probability: str = "sigmoid"
    temperature: float = 1.0
    baseline: bool = True

    search: ClassVar[str] = "DepthSearch"
    least: ClassVar[dict] = {**Constants.least, "num_subsets": 2, "ramp_steps": 0}


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
        **constants: the fields of `SearchConstants`.

    Attributes:
        layers: dotted names of the layers that can be skipped.
        constants: the `SearchConstants`.
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

    constants_class = SearchConstants
    verb, drawn, measure, measures = "skip", "subsets", "loss", "losses"
    warmup_epochs = 1.0  # DAS's

    def __init__(
        self,
        model,
        num_skip=None,
        max_macs=None,
        inputs=None,
        seed=0,
        reward=exponential_reward,
        process_group=None,
        **constants,
    ):
        check_callable("DepthSearch", "reward", reward)
        model = unwrapped(model)
        self.attachment = _skippable(model)
        self.layers = tuple(self.attachment.layers)
        super().__init__(model, len(self.layers), seed, process_group, SearchConstants(**constants))
        self.num_skip = num_skip
        self.max_macs = max_macs
        self.reward = reward
        self.costs = None if inputs is None else self._costs_of(inputs)
        self.goal = new_goal(len(self.layers), num_skip, max_macs, self.costs)
        self._check_goal()

    @property
    def entropy(self):
        """How open the search is, in bits per layer: 0 when nothing is open.

        At the start it is 1 with sigmoid; with softmax, where every layer then has p = 1 / layers, it is less.
        """
        probabilities = torch.tensor(self.bandit.probabilities, dtype=torch.float64)
        return (torch.special.entr(probabilities) + torch.special.entr(1 - probabilities)).mean().item() / math.log(2)

    def update(self, compute_loss):
        """Compares num_subsets drawn subsets and moves the preferences. Call it after the step's backward pass.

        Afterwards the same layers are skipped as before, and torch's generators and the modules' training flags are as
        they were, after an exception too, which leaves the whole search as it was.

        The reward of a loss that is not finite is 0, or the lowest of the others where that is below 0; a warning says
        so.

        Args:
            compute_loss: returns the loss of one batch, the same each time; called once per subset, without gradients.

        Raises:
            RuntimeError: the selection is fixed, or the processes have drawn different subsets.
            TypeError: compute_loss cannot be called, or it or the reward returns no number.
            ValueError: a reward is not a finite number although the loss is.
        """
        super().update(compute_loss)

    def selection(self):
        """Indices of the layers with the largest preferences, ascending: the larger, the less the layer is needed."""
        return super().selection()

    def selected_layers(self):
        """The dotted names of the selection."""
        return tuple(self.layers[layer] for layer in self.selection())

    def summary(self):
        """What was found, in words that go on after the search's name."""
        names = ", ".join(self.selected_layers())
        return f"skips layers {list(self.selection())} after {len(self.history)} updates: {names}"

    def macs(self, selection=None):
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
        if not all(map(self._is_layer, layers)) or len(set(layers)) < len(layers):
            raise ValueError(
                f"DepthSearch: macs takes different indices from 0 to {len(self.layers) - 1}, got {selection!r}"
            )
        return self.costs.ratio(layers)

    def skip_selection(self):
        """Skips the present selection until the next `sample`: for validation between steps."""
        return self.use_selection()

    def apply(self, permanent=False):
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
        with self._or_as_before():
            selection = super().apply()
            self.attachment.skip(selection)
            if permanent:
                self.attachment.remove_skipped()
        return selection

    @classmethod
    def from_json(cls, path, model, reward=exponential_reward, process_group=None):
        """The search that `to_json` wrote, on a model with the same layers.

        Raises:
            ValueError: the file is none of `to_json`, or does not fit the model.
        """
        return cls._read(path, model, reward=reward, process_group=process_group)

    def plot(self, path):
        """Draws the layers' preferences and what was drawn and selected, over the steps, into an image file.

        Raises:
            ValueError: no update has been made.
        """
        from petl_ext.search.plot import plot_depth

        plot_depth(self, path)

    def __repr__(self):
        return f"DepthSearch({self.goal}, {len(self.layers)} layers, step={self.step}, finished={self.finished})"

    _to_json, _from_json, _layers_of = staticmethod(list), staticmethod(tuple), staticmethod(tuple)

    @classmethod
    def _stored_arguments(cls, state):
        costs = None if state["costs"] is None else LayerCosts(**state["costs"])
        return {"num_skip": state["num_skip"], "max_macs": state["max_macs"], "inputs": costs}

    def _settings(self):
        return {
            "layers": list(self.layers),
            "num_skip": self.num_skip,
            "max_macs": self.max_macs,
            "costs": self.costs and dataclasses.asdict(self.costs),
            "constants": dataclasses.asdict(self.constants),
        }

    def _found(self):
        return {**super()._found(), "selected_layers": list(self.selected_layers())}

    def _costs_of(self, inputs):
        """`LayerCosts` in the order of the search's layers: files may have their keys sorted."""
        if not isinstance(inputs, LayerCosts):
            return self.attachment.layer_costs(inputs)
        if not isinstance(inputs.layers, dict) or set(inputs.layers) != set(self.layers):
            raise ValueError(f"DepthSearch: expected costs of the layers {list(self.layers)}, got {inputs.layers!r}")
        counts = [(inputs.backbone, inputs.unskipped), *inputs.layers.values()]
        if not all(_are_two_integers(pair) for pair in counts):
            raise ValueError(f"DepthSearch: costs must be integers, two for each layer, got {inputs}")
        return dataclasses.replace(inputs, layers={name: inputs.layers[name] for name in self.layers})

    def _draw(self):
        if not self.step:
            self._warn_of_frozen_bypasses()
        return self._training_goal().take(self.bandit.order())

    def _training_goal(self):
        if self.step >= self.constants.ramp_steps:
            return self.goal
        return NumberOfLayers(self.num_skip * self.step // self.constants.ramp_steps + 1)

    def _warn_of_frozen_bypasses(self):
        """Before the first step and not earlier: what freezes the model may have come after the search."""
        bypasses = [self.model.get_submodule(name).bypass for name in self.layers]
        parameters = [parameter for bypass in bypasses for parameter in bypass.parameters()]
        if parameters and not any(parameter.requires_grad for parameter in parameters):
            logger.warning(
                "DepthSearch: no parameter of a bypass requires gradients, so they stay as they are while layers are "
                "compared; peft.get_peft_model freezes them, for example"
            )

    def _draw_to_compare(self):
        return self.bandit.draw_distinct(self.constants.num_subsets, self.goal.take)

    def _take(self, order):
        return self.goal.take(order)

    def _chosen(self):
        return tuple(self.attachment.skipped)

    def _choose(self, choice):
        self.attachment.skip(choice, decodes=False)

    def _is_choice(self, stored):
        known = isinstance(stored, list) and all(map(self._is_layer, stored))
        return known and stored == sorted(set(stored))

    def _reward_of(self, loss):
        try:
            reward = number_of(self.reward(loss), "DepthSearch: reward")
        except OverflowError:
            reward = math.inf
        if not math.isfinite(reward):
            raise ValueError(f"DepthSearch: the reward of the loss {loss} is {reward}; give another reward=...")
        return reward

    def _check_goal(self):
        if self.constants.ramp_steps and self.num_skip is None:
            raise ValueError("DepthSearch: ramp_steps needs num_skip: a budget has no number of layers to grow")
        found = len(self.bandit.best_distinct(self.constants.num_subsets, self.goal.take))
        if found < self.constants.num_subsets:
            raise ValueError(
                f"DepthSearch: num_subsets={self.constants.num_subsets}, but {self.goal} leaves only {found} "
                f"different subset{'s' * (found != 1)} of {len(self.layers)} layers to compare"
            )


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


def _are_two_integers(values):
    return isinstance(values, list | tuple) and len(values) == 2 and all(type(value) is int for value in values)
