"""APT between an attention's projection and the dropout behind it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from petl_ext.attaching.methods.config import Config
from petl_ext.attaching.sites.output_modules import AttentionOutputSite
from petl_ext.attaching.sites.projections import ATTENTIONS, ProjectionSite, SecondStreamSite
from petl_ext.attaching.sites.site import Site, fused_kernel
from petl_ext.nn import APTLayer
from petl_ext.nn.apt import apt_macs


class APTSite(Site):
    """A module with a child `apt`, an `APTLayer`."""

    child = "apt"

    def begin(self, x):
        # Of several adapters, which a method stands for in petl_ext.peft, each waits for the one before.
        return self.apt.begin(x) if isinstance(self.apt, APTLayer) else None

    @staticmethod
    def macs(layer, tokens):
        num_prompts, dim = layer.prompts.shape
        return apt_macs(tokens, dim, num_prompts, layer.down.size(0))

    @staticmethod
    def kernel(layer):
        return fused_kernel("apt", layer)


class APTSelfOutput(AttentionOutputSite, APTSite):
    """What the output module `dense -> dropout -> (LayerNorm)` of an attention becomes: ViLT, BERT, RoBERTa, METER.

    `forward(hidden_states, input_tensor)`: what the attention's heads say and what the attention was given, both
    [..., D]; returns [..., D]. Where there is a LayerNorm, it takes the sum with the residual, as in BERT.
    """

    looked_for = "attention output modules (dense, dropout, perhaps LayerNorm) beside a self-attention"

    def forward(self, hidden_states, input_tensor):
        begun = self.begin(input_tensor)
        hidden_states = self.dropout(self.apt(input_tensor, self.dense(hidden_states), begun))
        if hasattr(self, "LayerNorm"):
            hidden_states = self.LayerNorm(hidden_states + input_tensor)
        return hidden_states


class APTSecondStream(SecondStreamSite, APTSite):
    """What a joint attention becomes besides for its second stream, which scores prompts of its own: SD3, Flux."""

    child = "apt_second"
    looked_for = "joint attentions of two streams"

    def changed_second(self, x, y):
        return self.apt_second(x, y)


class APTAttention(ProjectionSite, APTSite):
    """What an attention becomes that ends in its projection: CLIP, T5, LLaMA, diffusers. In cross-attention too the
    prompts are scored by what asks, the hidden states, as in METER."""

    looked_for = "attentions that end in their projection"
    projections = ATTENTIONS
    second_stream = APTSecondStream

    def finished(self, x, y, begun):
        return self.apt(x, y, begun)


@dataclass(frozen=True)
class APTConfig(Config):
    """Approximated prompt tuning: one `APTLayer` per attention, whose documentation explains the sizes.

    In cross-attention (METER, T5, diffusers) the prompts are scored by the stream that asks.

    Attributes:
        train_scale: whether `log_scale` trains. The authors' ViLT trains it; in their METER it stays frozen at 0.
    """

    method: ClassVar[str] = "apt"
    row: ClassVar[str] = "apt"
    site_classes: ClassVar[dict] = {"apt": (APTSelfOutput, APTAttention)}
    later_fields: ClassVar[frozenset] = Config.later_fields | {"train_scale"}
    num_prompts: int = 200
    rank: int = 4
    activation: str = "relu"
    dropout: float = 0.0
    sites: str | Sequence[str] | None = None
    train_scale: bool = True
    class_token: bool = False

    def __post_init__(self):
        self.new_layer(1, device="meta")  # the layer knows which sizes are right
        super().__post_init__()

    def new_layer(self, dim: int, **factory: Any) -> APTLayer:
        sizes = (self.num_prompts, self.rank, self.activation, self.dropout, self.train_scale)
        return APTLayer(dim, *sizes, **factory)
