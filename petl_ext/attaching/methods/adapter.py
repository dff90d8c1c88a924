"""Bottleneck adapters behind and beside attentions and MLPs.

An output module, `dense -> dropout -> (LayerNorm)`, takes (hidden_states, input_tensor). In post-norm blocks (BERT,
METER) input_tensor is the residual, and the module adds it and ends in a LayerNorm. In pre-norm blocks (ViLT) there is
no LayerNorm: an attention's module takes the normalized stream and leaves the residual to the block, an MLP's takes the
stream and adds it. Where there are no output modules (CLIP, T5, LLaMA, diffusers), whole attentions and MLPs take the
normalized stream and leave the residual to the block.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from petl_ext.attaching.methods.config import Config
from petl_ext.attaching.sites.mixtures import MixtureSite
from petl_ext.attaching.sites.output_modules import AttentionOutputSite, MLPOutputSite
from petl_ext.attaching.sites.projections import ATTENTIONS, MLPS, ProjectionSite, SecondStreamSite
from petl_ext.attaching.sites.site import Site, fused_kernel
from petl_ext.nn import AdapterLayer
from petl_ext.nn.adapter import adapter_macs

# By kind of adapter: what None stands for.
KINDS = {
    "sequential": {"layer_norm": False, "scale": 1.0},
    "parallel": {"layer_norm": True, "scale": 4.0},
}


class AdapterSite(Site):
    """A module with a child `adapter`, an `AdapterLayer`."""

    child = "adapter"

    @staticmethod
    def macs(layer, tokens):
        bottleneck, dim = layer.down.shape
        return adapter_macs(tokens, dim, bottleneck)

    @staticmethod
    def kernel(layer):
        return fused_kernel("adapter", layer)


class SequentialAdapterSelfOutput(AttentionOutputSite, AdapterSite):
    """The adapter behind an attention's projection (arXiv 1902.00751): before the dropout in post-norm blocks, after it
    in pre-norm ones, as in the baselines of the APT paper (arXiv 2306.15706)."""

    looked_for = "output modules (dense, dropout, perhaps LayerNorm) of attentions"

    def forward(self, hidden_states, input_tensor):
        if hasattr(self, "LayerNorm"):
            return self.LayerNorm(self.dropout(self.adapter(self.dense(hidden_states))) + input_tensor)
        return self.adapter(self.dropout(self.dense(hidden_states)))


class SequentialAdapterOutput(MLPOutputSite, SequentialAdapterSelfOutput):
    """The same behind an MLP's second projection."""

    looked_for = "output modules (dense, dropout, perhaps LayerNorm) of MLPs"

    def forward(self, hidden_states, input_tensor):
        hidden_states = super().forward(hidden_states, input_tensor)
        return hidden_states if hasattr(self, "LayerNorm") else hidden_states + input_tensor


class ParallelAdapterSelfOutput(AttentionOutputSite, AdapterSite):
    """The adapter beside an attention (arXiv 2110.04366): it reads what the attention was given, and is added to the
    module's output, behind a LayerNorm, as in the baselines of the APT paper (arXiv 2306.15706)."""

    looked_for = SequentialAdapterSelfOutput.looked_for

    def forward(self, hidden_states, input_tensor):
        hidden_states = self.dropout(self.dense(hidden_states))
        if hasattr(self, "LayerNorm"):
            hidden_states = self.LayerNorm(hidden_states + input_tensor)
        return self.adapter(input_tensor, residual=hidden_states)


class ParallelAdapterOutput(MLPOutputSite, AdapterSite):
    """The adapter beside an MLP, which reads the residual and is added behind a LayerNorm: also DAS's
    (arXiv 2309.01479)."""

    looked_for = SequentialAdapterOutput.looked_for

    def forward(self, hidden_states, input_tensor):
        hidden_states = self.dropout(self.dense(hidden_states)) + input_tensor
        if hasattr(self, "LayerNorm"):
            hidden_states = self.LayerNorm(hidden_states)
        return self.adapter(input_tensor, residual=hidden_states)


class SequentialAdapterSecondStream(SecondStreamSite, AdapterSite):
    """The adapter behind the projection of a joint attention's second stream: SD3, Flux."""

    child = "adapter_second"
    looked_for = "joint attentions of two streams"

    def changed_second(self, x, y):
        return self.adapter_second(y)


class ParallelAdapterSecondStream(SequentialAdapterSecondStream):
    """The adapter beside a joint attention, for its second stream."""

    def changed_second(self, x, y):
        return self.adapter_second(x, residual=y)


class SequentialAdapterProjection(ProjectionSite, AdapterSite):
    """The adapter behind the projection in which an attention or MLP ends (arXiv 1902.00751), before the residual."""

    looked_for = "attentions and MLPs that end in a projection"
    projections = ATTENTIONS | MLPS
    second_stream = SequentialAdapterSecondStream

    def changed(self, x, y):
        return self.adapter(y)


class ParallelAdapterProjection(SequentialAdapterProjection):
    """The adapter beside such an attention or MLP (arXiv 2110.04366): it reads the same input."""

    second_stream = ParallelAdapterSecondStream

    def changed(self, x, y):
        return self.adapter(x, residual=y)


class SequentialAdapterMixture(MixtureSite, SequentialAdapterProjection):
    """The adapter behind a mixture of experts, before the residual."""


class ParallelAdapterMixture(MixtureSite, ParallelAdapterProjection):
    """The adapter beside a mixture of experts: it reads the same input."""

    def changed(self, x, y):
        return self.adapter(x.reshape(y.shape), residual=y)


@dataclass(frozen=True)
class AdapterConfig(Config):
    """Bottleneck adapters: an `AdapterLayer`, whose documentation explains the sizes, at every site.

    The defaults are those of the APT paper's baselines (arXiv 2306.15706). "sequential": behind every attention and
    every MLP, before the residual is added. "parallel": beside every attention, with LayerNorm and a scale of 4; MLPs
    too where `sites` says so.

    Attributes:
        kind: "sequential" (arXiv 1902.00751) or "parallel" (arXiv 2110.04366).
        layer_norm: None stands for the kind's own: False, True.
        scale: None stands for the kind's own: 1.0, 4.0.
    """

    method: ClassVar[str] = "adapter"
    site_classes: ClassVar[dict] = {
        "sequential_adapter": (
            *(SequentialAdapterSelfOutput, SequentialAdapterOutput, SequentialAdapterProjection),
            SequentialAdapterMixture,
        ),
        "parallel_adapter": (
            *(ParallelAdapterSelfOutput, ParallelAdapterOutput, ParallelAdapterProjection),
            ParallelAdapterMixture,
        ),
    }
    kind: str = "sequential"
    bottleneck: int = 96
    activation: str = "relu"
    layer_norm: bool | None = None
    scale: float | None = None
    dropout: float = 0.0
    trainable_scale: bool = False
    zero_init: bool = False
    sites: str | Sequence[str] | None = None
    class_token: bool = False

    def __post_init__(self):
        if self.kind not in KINDS:
            raise ValueError(f'AdapterConfig: kind must be "sequential" or "parallel", got {self.kind!r}')
        self.new_layer(1, device="meta")
        super().__post_init__()

    @property
    def row(self) -> str:
        return f"{self.kind}_adapter"

    def new_layer(self, dim: int, **factory: Any) -> AdapterLayer:
        return AdapterLayer(dim, **adapter_options(self), **factory)


def adapter_options(config):
    """The `AdapterLayer`'s keyword arguments that `config` has as fields."""
    names = ("bottleneck", "activation", "layer_norm", "scale", "dropout", "trainable_scale", "zero_init")
    options = {name: getattr(config, name) for name in names}
    defaults = KINDS.get(getattr(config, "kind", None), {})
    return options | {name: value for name, value in defaults.items() if options[name] is None}
