"""Which layers a task does not need: dynamic architecture skipping (DAS, arXiv 2309.01479)."""

import copy
import dataclasses
import json
import logging
import math
import os
import tempfile
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DataParallel, DistributedDataParallel

from petl_ext.attach import LayerCosts
from petl_ext.search.bandit import Bandit
from petl_ext.search.goal import NumberOfLayers, new_goal

logger = logging.getLogger("petl_ext")

FORMAT = 1


def exponential_reward(loss):
    """exp(-loss), the reward of DAS."""
    return math.exp(-loss)


@dataclass(frozen=True)
class SearchConstants:
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
        probability, temperature: of the `Bandit`.
    """

    warmup_steps: int | None = None
    search_steps: int | None = None
    interval: int = 10
    num_subsets: int = 3
    step_size: float = 1.0
    evaluation_mode: str = "eval"
    ramp_steps: int = 0
    probability: str = "sigmoid"
    temperature: float = 1.0

    def __post_init__(self):
        least = {"warmup_steps": 0, "search_steps": 1, "interval": 1, "num_subsets": 2, "ramp_steps": 0}
        for name, smallest in least.items():
            value = getattr(self, name)
            may_be_none = name in ("warmup_steps", "search_steps")
            if not (type(value) is int and value >= smallest) and not (value is None and may_be_none):
                raise ValueError(f"DepthSearch: {name} must be an integer of {smallest} or more, got {value!r}")
        if self.evaluation_mode not in ("eval", "train"):
            raise ValueError(f'DepthSearch: evaluation_mode must be "eval" or "train", got {self.evaluation_mode!r}')


class DepthSearch:
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
        inputs: what `petl_ext.cost.count_macs` takes, for max_macs and `macs`; or the `LayerCosts` counted before.
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
        ValueError: no DASConfig is attached, an argument is out of its range, the budget cannot be reached, or there
            are fewer than num_subsets different subsets.
    """

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
        self.model = model.module if isinstance(model, DataParallel | DistributedDataParallel) else model
        self.attachment = _skippable(self.model)
        self.layers = tuple(self.attachment.layers)
        self.constants = SearchConstants(**constants)
        self.num_skip = num_skip
        self.max_macs = max_macs
        self.reward = reward
        self.process_group = process_group
        known = inputs is None or isinstance(inputs, LayerCosts)
        self.costs = inputs if known else self.attachment.layer_costs(inputs)
        self.goal = new_goal(len(self.layers), num_skip, max_macs, self.costs)
        self.bandit = Bandit(
            len(self.layers), seed, self.constants.step_size, self.constants.probability, self.constants.temperature
        )
        self.step = 0
        self.finished = False
        self.history = []
        self._since_update = 0
        self._fixed = None
        if self.constants.ramp_steps and num_skip is None:
            raise ValueError("DepthSearch: ramp_steps needs num_skip: a budget has no number of layers to grow")
        found = len(self.bandit.best_distinct(self.constants.num_subsets, self.goal.take))
        if found < self.constants.num_subsets:
            raise ValueError(
                f"DepthSearch: num_subsets={self.constants.num_subsets}, but {self.goal} leaves only {found} "
                f"different subset{'s' * (found != 1)} of {len(self.layers)} layers to compare"
            )

    @property
    def is_due(self):
        """Whether it is time for `update`."""
        warm = self.step > (self.constants.warmup_steps or 0)
        return not self.finished and warm and self._since_update >= self.constants.interval

    def schedule(self, warmup_steps, search_steps):
        """Sets these constants of a search that has not begun.

        Raises:
            ValueError: it has begun, or a value is out of its range.
        """
        if self.step:
            raise ValueError(f"DepthSearch: the schedule cannot change after {self.step} steps")
        self.constants = dataclasses.replace(self.constants, warmup_steps=warmup_steps, search_steps=search_steps)

    def sample(self):
        """Begins a training step: draws layers and skips them, or the selection when that is fixed.

        Returns:
            The indices of the skipped layers, ascending.
        """
        if self.constants.search_steps is not None and self.step >= self.constants.search_steps:
            self.finish()
        if self.finished:
            return self.skip_selection()
        subset = self._training_goal().take(self.bandit.order())
        self.attachment.skip(subset)
        self.step += 1
        self._since_update += 1
        return subset

    def update(self, compute_loss):
        """Compares num_subsets drawn subsets and moves the preferences. Call it after the step's backward pass.

        Afterwards the same layers are skipped as before, and torch's generators and the modules' training flags are as
        they were, after an exception too, which leaves the whole search as it was.

        Args:
            compute_loss: returns the loss of one batch, the same each time; called once per subset, without gradients.

        Raises:
            RuntimeError: the selection is fixed, or the processes have drawn different subsets.
            ValueError: a reward is not a finite number although the loss is.
        """
        if self.finished:
            raise RuntimeError("DepthSearch: the selection is fixed, so there is nothing to update")
        draws = self.bandit.draws
        try:
            subsets = self.bandit.draw_distinct(self.constants.num_subsets, self.goal.take)
            losses = self._mean_over_processes(subsets, self._losses(subsets, compute_loss))
            rewards = [self._reward_of(loss) for loss in losses]
            self.bandit.update(subsets, rewards)
        except BaseException:
            self.bandit.draws = draws
            raise
        self._since_update = 0
        self.history.append(
            {
                "step": self.step,
                "subsets": [list(subset) for subset in subsets],
                "losses": [loss if math.isfinite(loss) else None for loss in losses],
                "rewards": rewards,
                "preferences": list(self.bandit.preferences),
                "selection": list(self.selection()),
            }
        )

    def selection(self):
        """Indices of the layers with the largest preferences, ascending: the larger, the less the layer is needed."""
        return self._fixed if self.finished else self.goal.take(self.bandit.ranking())

    def selected_layers(self):
        """The dotted names of the selection."""
        return tuple(self.layers[layer] for layer in self.selection())

    def is_stable(self, patience):
        """Whether the last `patience` updates have left the selection as it was and no tie decides it."""
        selections = [entry["selection"] for entry in self.history[-patience - 1 :]]
        unchanged = len(selections) == patience + 1 and all(s == selections[0] for s in selections)
        preferences = self.bandit.preferences
        of_equals_the_higher = sorted(range(len(preferences)), key=lambda layer: (-preferences[layer], -layer))
        return unchanged and self.goal.take(of_equals_the_higher) == self.goal.take(self.bandit.ranking())

    def macs(self, selection=None):
        """The share of the bare backbone's multiply-accumulates that remains with these layers skipped.

        Args:
            selection: indices; None: the present selection.

        Raises:
            ValueError: the search was made without inputs.
        """
        if self.costs is None:
            raise ValueError("DepthSearch: macs needs a search that was made with inputs=..., to count them on")
        return self.costs.ratio(self.selection() if selection is None else selection)

    def skip_selection(self):
        """Skips the present selection until the next `sample`: for validation between steps."""
        selection = self.selection()
        if tuple(self.attachment.skipped) != selection:
            self.attachment.skip(selection)
        return selection

    def finish(self):
        """Fixes the present selection; from now on `sample` skips it."""
        self._fixed = self.selection()
        self.finished = True

    def apply(self, permanent=False):
        """Ends the search and skips the selection.

        DAS then trains once more from the pre-trained weights, with this selection and new adapters.

        Args:
            permanent: whether the weights of the skipped layers are deleted.

        Returns:
            The selection.

        Raises:
            RuntimeError: permanent, and no update has been made, so that nothing is known of the layers.
        """
        if not self.history:
            if permanent:
                raise RuntimeError("DepthSearch: before the first update nothing says which layers to delete")
            logger.warning("DepthSearch: applied before the first update: the selection means nothing")
        self.finish()
        selection = self.skip_selection()
        if permanent:
            self.attachment.remove_skipped()
        return selection

    def state_dict(self):
        """All of the search but model, reward and process group, ready for JSON."""
        return {
            "format": FORMAT,
            **self._settings(),
            "bandit": self.bandit.state_dict(),
            "step": self.step,
            "since_update": self._since_update,
            "finished": self.finished,
            "selection": list(self.selection()),
            "selected_layers": list(self.selected_layers()),
            "history": copy.deepcopy(self.history),
        }

    def load_state_dict(self, state):
        """Goes on where the search that gave the state was. Weights and optimiser are the training's own.

        Raises:
            ValueError: the state is not of this search: other layers, goal, costs or constants. Nothing has changed.
        """
        if state.get("format") != FORMAT:
            raise ValueError(f"DepthSearch: expected a state of format {FORMAT}, found {state.get('format')!r}")
        for name, ours in self._settings().items():
            if state.get(name) != ours:
                raise ValueError(
                    f"DepthSearch: the state is of another search: expected {name} {ours!r}, found {state.get(name)!r}"
                )
        self.bandit.load_state_dict(state["bandit"])
        self.step = state["step"]
        self._since_update = state["since_update"]
        self.finished = state["finished"]
        self._fixed = tuple(state["selection"]) if self.finished else None
        self.history = copy.deepcopy(state["history"])

    def to_json(self, path):
        """Writes the state to a file, which is complete or, after an error, as it was."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".petl-", dir=path.parent) as scratch:
            complete = Path(scratch) / path.name
            complete.write_text(json.dumps(self.state_dict(), indent=2, allow_nan=False) + "\n", encoding="utf-8")
            os.replace(complete, path)

    @classmethod
    def from_json(cls, path, model, reward=exponential_reward, process_group=None):
        """The search that `to_json` wrote, on a model with the same layers.

        Raises:
            ValueError: the file is none of `to_json`, or does not fit the model.
        """
        try:
            state = json.loads(Path(path).read_text(encoding="utf-8"))
            goal = {name: state[name] for name in ("num_skip", "max_macs")}
            costs = state["costs"] and LayerCosts(**state["costs"])
            fixed = {"inputs": costs, "seed": state["bandit"]["seed"], **state["constants"]}
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path}: not what DepthSearch.to_json writes: {error!r}") from error
        search = cls(model, **goal, **fixed, reward=reward, process_group=process_group)
        search.load_state_dict(state)
        return search

    def plot(self, path):
        """Draws the layers' preferences and what was drawn and selected, over the steps, into an image file.

        Raises:
            ValueError: no update has been made.
        """
        from petl_ext.search.plot import plot_search

        plot_search(self, path)

    def __repr__(self):
        return f"DepthSearch({self.goal}, {len(self.layers)} layers, step={self.step}, finished={self.finished})"

    def _settings(self):
        return {
            "layers": list(self.layers),
            "num_skip": self.num_skip,
            "max_macs": self.max_macs,
            "costs": self.costs and dataclasses.asdict(self.costs),
            "constants": dataclasses.asdict(self.constants),
        }

    def _training_goal(self):
        if self.step >= self.constants.ramp_steps:
            return self.goal
        return NumberOfLayers(min(self.num_skip, self.num_skip * self.step // self.constants.ramp_steps + 1))

    def _losses(self, subsets, compute_loss):
        losses = []
        with self._as_it_was():
            if self.constants.evaluation_mode == "eval":
                self.model.eval()
            for subset in subsets:
                self.attachment.skip(subset)
                with torch.no_grad(), torch.random.fork_rng(self._cuda_devices(), device_type="cuda"):
                    losses.append(float(compute_loss()))
        return losses

    @contextmanager
    def _as_it_was(self):
        training = {module: module.training for module in self.model.modules()}
        skipped = self.attachment.skipped
        try:
            yield
        finally:
            self.attachment.skip(skipped)
            for module, mode in training.items():
                module.training = mode

    def _cuda_devices(self):
        return {parameter.device for parameter in self.model.parameters() if parameter.device.type == "cuda"}

    def _mean_over_processes(self, subsets, losses):
        if not dist.is_available() or not dist.is_initialized() or dist.get_world_size(self.process_group) == 1:
            return losses
        everyones = [None] * dist.get_world_size(self.process_group)
        dist.all_gather_object(everyones, (subsets, self.bandit.preferences, losses), self.process_group)
        if any(other[:2] != everyones[0][:2] for other in everyones):
            raise RuntimeError(
                "DepthSearch: the processes have drawn different subsets; give each the same seed and call sample and "
                "update equally often"
            )
        return [_mean(each) for each in zip(*(other[2] for other in everyones), strict=True)]

    def _reward_of(self, loss):
        if not math.isfinite(loss):
            logger.warning("DepthSearch: step %d: a loss is %s; its reward is 0", self.step, loss)
            return 0.0
        try:
            reward = float(self.reward(loss))
        except OverflowError:
            reward = math.inf
        if not math.isfinite(reward):
            raise ValueError(f"DepthSearch: the reward of the loss {loss} is {reward}; give another reward=...")
        return reward


def _mean(losses):
    # fsum rounds once, so that the order of the processes does not matter; it refuses inf - inf.
    return math.fsum(losses) / len(losses) if all(map(math.isfinite, losses)) else math.nan


def _skippable(model):
    attachment = getattr(model, "petl_attachment", None)
    if not getattr(attachment, "layers", ()):
        found = "nothing is attached" if attachment is None else f"attached is {attachment.config}"
        raise ValueError(
            f"DepthSearch: {type(model).__name__} has no layers that can be skipped, {found}; write "
            "petl_ext.attach(model, petl_ext.DASConfig()) first"
        )
    return attachment
