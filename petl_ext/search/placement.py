"""At which layer a visual prompt enters: the search of DVP (KAB-APP, arXiv 2306.00409)."""

from dataclasses import dataclass
from operator import attrgetter
from typing import Any, ClassVar

from torch import nn
from torch.distributed import ProcessGroup

from petl_ext.search.choice import OneArm, unwrapped
from petl_ext.search.constants import Constants
from petl_ext.search.plot import plot_placement
from petl_ext.search.search import Search


@dataclass(frozen=True)
class PlacementConstants(Constants):
    """The constants of a `PlacementSearch`. The defaults are the authors' for BERT and T5, but for `evaluation_mode`.

    Steps are micro-batches: the calls of `PlacementSearch.sample`, whatever the accumulation of gradients.

    Attributes:
        warmup_steps: steps before the first update; None stands for 0, also under `petl_ext.hf.SearchCallback`.
        search_steps: steps after which the selection is fixed; None: it is fixed by `finish` or `apply`.
        interval: steps from one update to the next. The authors update after every optimizer step, so with gradients
            accumulated over n micro-batches theirs is n.
        num_samples: draws that an update compares, at least 2; the authors take 10 for LLaMA.
        step_size: factor of every update, for scores in percent; their code for ScienceQA takes 10.
        evaluation_mode: "eval": layers are compared in eval mode; "train": in the mode in which the model trains, with
            dropout, as the authors do.
        temperature: of the softmax; theirs is 1.
    """

    num_samples: int = 5
    step_size: float = 0.005

    search_name: ClassVar[str] = "PlacementSearch"
    least: ClassVar[dict] = {**Constants.least, "num_samples": 2}


class PromptLayer(OneArm):
    """The layer at which the model's prompt enters: an arm is a layer.

    Args:
        model: with insert_layer and num_layers, as a `PlacementSearch` takes it.
    """

    verb, options_key, measure_name, measures_key = "insert", "layers", "score", "scores"

    def __init__(self, model):
        super().__init__(model, _checked_layers(model))

    def take(self, order):
        return order[0]

    def draw(self, bandit, constants, step):
        return self.take(bandit.order(uniform=True))

    def draw_to_compare(self, bandit, constants):
        return list(bandit.draw(constants.num_samples, replacement=True))

    def chosen(self):
        return self.model.insert_layer

    def choose(self, option):
        self.model.insert_layer = option

    def settings(self):
        return {"num_layers": self.num_arms}

    def summary(self, option, updates):
        return f"inserts the prompt at layer {option} after {updates} updates"

    def plot(self, search, path):
        plot_placement(search, path)

    def __str__(self):
        return f"{self.num_arms} layers"


class PlacementSearch(Search):
    """Finds, while the model trains, the layer at which its visual prompt enters best.

    Every training step takes a layer at random, all equally likely. In every update some layers are drawn with the
    probabilities pi = softmax(preferences / temperature), with replacement, and scored on one validation batch; the
    preference of each draw's layer moves by step_size * (score - mean score) * pi * (1 - pi), with the pi before the
    update:

        model = DVPBert(bert, vision, num_labels=3129, candidates="all")
        search = petl_ext.PlacementSearch(model, seed=0)
        for batch in loader:
            search.sample()                       # this step's layer
            model(**batch).loss.backward(); optimizer.step(); optimizer.zero_grad()
            if search.is_due:
                search.update(lambda: percent_right(model(**validation_batch).logits))
        layer = search.apply()

    The authors then train a new model with this insert_layer. KAB-APP trains a prompt layer of its own for each layer
    of the model, candidates="all"; with one that all share, the search compares places for the same prompt layer. Each
    candidate sees about one step in num_layers. Let the optimizer's zero_grad set gradients to None, as it does by
    default: AdamW then leaves the candidates that were not drawn alone; in the authors' code they decayed.

    With several processes give each the same seed: the draws are the same everywhere, and scores are averaged over the
    processes before the update, so the preferences are equal bit for bit. DistributedDataParallel needs
    find_unused_parameters=True.

    `update` takes a function that returns the score of one batch, larger for better. The authors' is in percent: the
    accuracy; for VQA the mean target score of the likeliest answer; for ScienceQA 100 * exp(-loss). Call it after the
    optimizer's step. A score that is not finite counts as 0, as if no answer were right.

    What differs from the authors' code: layers are compared in eval mode (there with dropout) and each from the same
    state of the random number generators, so that a layer that is drawn twice is scored once; draws are seeded, and the
    processes agree (there each has its own preferences); of equal preferences the lower index is selected. Score on
    data that are neither trained nor tested on: for GQA and SNLI-VE the authors scored on their test data.

    Args:
        model: a `petl_ext.models.DVPModel`, or any torch module with the attributes insert_layer, an integer that can
            be set at any time, and num_layers; DistributedDataParallel around it may be there or not.
        seed: an integer.
        process_group: the torch.distributed group to average over; None: all processes.
        **constants: the fields of `PlacementConstants`.

    Attributes:
        num_layers: how many layers the prompt can enter.
        constants: the `PlacementConstants`.
        bandit: the `Bandit`, whose preferences are the layers'.
        step: how often `sample` has drawn.
        finished: whether the selection is fixed.
        history: one dict per update, ready for JSON: step, layers as they were drawn, scores (None where not finite),
            rewards, preferences and selection after it.

    Raises:
        ValueError: the model has no insert_layer or fewer than two layers, or an argument is out of its range.
    """

    constants_class = PlacementConstants

    num_layers = property(attrgetter("choice.num_arms"))

    def __init__(self, model: nn.Module, seed: int = 0, process_group: ProcessGroup | None = None, **constants: Any):
        super().__init__(PromptLayer(unwrapped(model)), PlacementConstants(**constants), seed, process_group)

    @property
    def probabilities(self) -> list[float]:
        """pi, one float per layer."""
        return self.bandit.probabilities


def _checked_layers(model):
    missing = [name for name in ("insert_layer", "num_layers") if not hasattr(model, name)]
    if not isinstance(model, nn.Module) or missing:
        lacks = f", which has no {missing[0]}" if missing else ""
        raise ValueError(
            "PlacementSearch: model must be a torch module with insert_layer and num_layers, such as "
            f"petl_ext.models.DVPBert, got {type(model).__name__}{lacks}"
        )
    if type(model.num_layers) is not int or model.num_layers < 2:
        raise ValueError(f"PlacementSearch: the model must have two layers or more, got {model.num_layers!r}")
    return model.num_layers
