"""DAS, dynamic architecture skipping (arXiv 2309.01479): a bypass adapter takes the place of a whole layer, and others
stand beside the attentions and MLPs of the layers that run.

Whether a layer is skipped is a plain attribute, so it can change from step to step. A skipped layer must still return
what its model expects, and what other layers take from it must reach them: `SkippableLayer.rewire` sees to that.
"""

import inspect
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from petl_ext.attaching.methods.adapter import AdapterSite, ParallelAdapterOutput, adapter_options
from petl_ext.attaching.methods.config import Config
from petl_ext.attaching.patterns import matches
from petl_ext.attaching.sites.output_modules import AttentionOutputSite, attention_outputs
from petl_ext.attaching.sites.site import Place, candidates_of, location_beside, width_of
from petl_ext.nn import AdapterLayer

DEFAULT_BOTTLENECK = 192  # of the bypass of a layer that loses no adapters


@dataclass(frozen=True)
class BypassPlace(Place):
    """Where a bypass goes.

    Attributes:
        lost: how many adapters inside the layer fall away where it is skipped.
    """

    lost: int


class SkippableLayer(AdapterSite):
    """A layer that takes hidden states [..., D] first and returns a tensor of that shape.

    Attributes:
        skipped: whether the child `bypass` takes the layer's place.
        own_norm: dotted name, inside the layer, of the norm before the bypass; None where the bypass has its own.
        survivors: dotted names of modules that a skipped layer still needs.
    """

    child = "bypass"
    looked_for = "layers (modules of a ModuleList whose forward takes hidden_states first)"
    skipped = False
    own_norm = None
    survivors = ()

    @classmethod
    def candidates(cls, model):
        return {
            f"{name}.{index}".lstrip("."): layer
            for name, layers in model.named_modules()
            if isinstance(layers, nn.ModuleList)
            for index, layer in layers.named_children()
            if cls.fits(layer)
        }

    @staticmethod
    def fits(layer):
        return arguments_of(layer)[:1] == ["hidden_states"]

    @staticmethod
    def neighbor(module):
        """The norm whose width most of the layer's matrices have: norms of single heads are narrower."""
        norms = [inner for inner in module.modules() if _is_norm(inner)]
        widths = Counter(size for p in module.parameters() if p.dim() == 2 for size in p.shape)
        # The shapes of quantized weights may be others.
        linear = [inner for inner in module.modules() if hasattr(inner, "out_features")]
        widths.update(size for inner in linear for size in (inner.in_features, inner.out_features))
        if not norms:
            raise ValueError(f"{type(module).__name__} holds no norm that would tell how wide its bypass must be")
        return max(norms, key=lambda norm: widths[width_of(norm)])

    @classmethod
    def new_layer(cls, config, model, place):
        neighbor = cls.neighbor(model.get_submodule(place.name))
        size = {"dim": width_of(neighbor), "lost": place.lost}
        location = location_beside(neighbor, model)
        return config.new_bypass(**size, own_norm=cls.own_norm is not None, **location)

    def forward(self, hidden_states, *arguments, **named):
        if not self.skipped:
            return super().forward(hidden_states, *arguments, **named)
        normed = hidden_states if self.own_norm is None else self.get_submodule(self.own_norm)(hidden_states)
        return self.returned(self.bypass(normed, residual=hidden_states), *arguments, **named)

    def returned(self, hidden_states, *arguments, **named):
        """What the model expects of the layer: `hidden_states`, and perhaps more, from the layer's other arguments."""
        return hidden_states

    @staticmethod
    def rewire(stack, numbered, slot_types):
        """Called with all layers of one stack, the `numbered_modules` of each and its `slot_types_of`, after the set of
        skipped ones has changed.

        A key-value cache takes its length from layer 0, so a decoder whose first layer is skipped would believe the
        cache to be empty and give every token the position 0: the layers that run are numbered anew, each with the next
        slot of its own type.
        """
        slots = {name: iter([slot for slot, its in enumerate(slot_types) if its == name]) for name in slot_types}
        for layer, modules, slot_type in zip(stack, numbered, slot_types, strict=True):
            if getattr(layer, "skipped", False):
                continue
            slot = next(slots[slot_type])
            for module in modules:
                module.layer_idx = slot


class DeclaredTensorLayer(SkippableLayer):
    """A layer of a model of no known family, which must say what it returns: where a model expects a tuple, a tensor
    in its place can be taken apart sample by sample, without an error."""

    looked_for = (
        "layers (modules of a ModuleList whose forward takes hidden_states first and is declared -> torch.Tensor)"
    )

    @staticmethod
    def fits(layer):
        returned = inspect.signature(type(layer).forward).return_annotation
        return SkippableLayer.fits(layer) and returned in (torch.Tensor, "torch.Tensor", "Tensor")


class StreamAdapterSelfOutput(AttentionOutputSite, AdapterSite):
    """DAS beside a post-norm attention: its adapter reads the residual and is added before the LayerNorm."""

    looked_for = "output modules of attentions that end in a LayerNorm"

    @staticmethod
    def candidates(model):
        return {name: module for name, module in attention_outputs(model).items() if hasattr(module, "LayerNorm")}

    def forward(self, hidden_states, input_tensor):
        attended = self.dropout(self.dense(hidden_states)) + input_tensor
        return self.LayerNorm(self.adapter(input_tensor, residual=attended))


class StreamAdapterBlock(AdapterSite):
    """DAS beside a pre-norm attention: its adapter reads the stream before the block's first LayerNorm, which only the
    block itself sees. So `forward` is the whole of ViLT's block."""

    looked_for = "pre-norm blocks (layernorm_before, attention, layernorm_after, intermediate, output)"

    @staticmethod
    def candidates(model):
        parts = {"layernorm_before", "attention", "layernorm_after", "intermediate", "output"}
        return {name: module for name, module in model.named_modules() if parts <= module._modules.keys()}

    @staticmethod
    def neighbor(module):
        return module.layernorm_before

    def forward(self, hidden_states, *arguments, **named):
        attended, *attentions = self.attention(self.layernorm_before(hidden_states), *arguments, **named)
        hidden_states = self.adapter(hidden_states, residual=attended + hidden_states)
        output = self.output(self.intermediate(self.layernorm_after(hidden_states)), hidden_states)
        return output, *attentions


@dataclass(frozen=True)
class DASConfig(Config):
    """Dynamic architecture skipping (arXiv 2309.01479): a bypass adapter for every layer, which takes the layer's place
    while it is skipped, and adapters beside the attentions and MLPs of the layers that run.

    Both are `AdapterLayer`s with LayerNorm. Which layers are skipped can change at any time
    (`SkippingAttachment.skip`); `DepthSearch` finds those that a task does not need. CLIP, LLaMA and T5 get bypasses
    only; those of LLaMA and T5 keep the first norm of the layer that they replace in place of one of their own.

    Attributes:
        bottleneck: of the adapters in the layers that run; 0 for none.
        bypass_bottleneck: of the bypasses. None stands for the sum of the adapters that the skipped layer loses (ViLT:
            2 x 96, METER: 3 x 96), or 192 where it loses none.
        skip: indices of the layers that are skipped now, in the order of `SkippingAttachment.layers`.
        permanent: whether the weights of these layers are removed from the model.
        sites: regular expressions for the layers that can be skipped; None stands for the family's. A layer of a model
            of no known family must be declared `forward(self, hidden_states, ...) -> torch.Tensor`.
    """

    method: ClassVar[str] = "das"
    row: ClassVar[str] = "bypass"
    site_classes: ClassVar[dict] = {
        "bypass": (DeclaredTensorLayer,),
        "das_adapter": (StreamAdapterBlock, StreamAdapterSelfOutput, ParallelAdapterOutput),
    }
    bottleneck: int = 96
    bypass_bottleneck: int | None = None
    activation: str = "relu"
    layer_norm: bool = True
    scale: float = 1.0
    dropout: float = 0.0
    trainable_scale: bool = False
    zero_init: bool = False
    skip: Sequence[int] = ()
    permanent: bool = False
    sites: str | Sequence[str] | None = None
    class_token: bool = False

    def __post_init__(self):
        if type(self.bottleneck) is not int or self.bottleneck < 0:
            raise ValueError(f"DASConfig: bottleneck must be a positive integer, or 0, got {self.bottleneck!r}")
        width = self.bypass_bottleneck
        if width is not None and (type(width) is not int or width < 1):
            raise ValueError(f"DASConfig: bypass_bottleneck must be a positive integer or None, got {width!r}")
        self.new_bypass(1, lost=1, device="meta")
        if not isinstance(self.skip, list | tuple) or not all(type(i) is int and i >= 0 for i in self.skip):
            raise ValueError(f"DASConfig: skip must be a list of the layers' indices, got {self.skip!r}")
        if type(self.permanent) is not bool or (self.permanent and not self.skip):
            raise ValueError(f"DASConfig: permanent must be False, or True with layers in skip, got {self.permanent!r}")
        object.__setattr__(self, "skip", tuple(sorted(set(self.skip))))
        super().__post_init__()

    def site_classes_in(self, family: Any) -> Any:
        return family.skippables

    def with_inner_places(self, places: Iterable[Place], model: nn.Module, family: Any) -> list[Place]:
        """The bypasses, each told how many adapters are lost with its layer, and these adapters."""
        adapters = self._adapters_in(model, family)
        found = []
        for place in places:
            inside = [Place(name, adapters[name]) for name in adapters if f"{name}.".startswith(f"{place.name}.")]
            found += [BypassPlace(place.name, place.site_class, len(inside)), *inside]
        return found

    def new_layer(self, dim: int, **factory: Any) -> AdapterLayer:
        return AdapterLayer(dim, **adapter_options(self), **factory)

    def new_bypass(self, dim: int, lost: int, own_norm: bool = False, **factory: Any) -> AdapterLayer:
        """Args: how many adapters the skipped layer loses, and whether it keeps a norm that the bypass reads."""
        width = self.bypass_bottleneck
        if width is None:
            width = lost * self.bottleneck or DEFAULT_BOTTLENECK
        options = adapter_options(self) | {"bottleneck": width}
        if own_norm:
            options["layer_norm"] = False
        return AdapterLayer(dim, **options, **factory)

    def _adapters_in(self, model, family):
        """{dotted name: what it becomes} of what gets an adapter beside it in the layers that run."""
        patterns = family.patterns("das_adapter") if self.bottleneck else ()
        candidates = candidates_of(model, self.site_classes["das_adapter"]) if patterns else {}
        return {
            name: site_class
            for name, site_class in candidates.items()
            if any(matches(pattern, name) for pattern in patterns)
        }


def strip(layer):
    """Deletes from a skipped layer all but the bypass and what a skipped layer still needs."""
    _keep_only(layer, (layer.child, *layer.survivors))


def _keep_only(module, names):
    """Deletes all children but those with one of the dotted `names` and what leads there."""
    for child in list(module._modules):
        below = [rest for head, _, rest in (name.partition(".") for name in names) if head == child]
        if not below:
            del module._modules[child]
        elif "" not in below:
            _keep_only(module._modules[child], below)


def _is_norm(module):
    weight = getattr(module, "weight", None)
    return isinstance(weight, torch.Tensor) and weight.dim() == 1


def arguments_of(layer):
    """The names of what its forward takes."""
    _, *arguments = inspect.signature(type(layer).forward).parameters
    return arguments
