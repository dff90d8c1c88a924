"""The bottleneck adapter as a layer."""

import math

import torch
from torch import Tensor, nn

from petl_ext.checks import check_choice, check_positive_integer, check_probability, check_switch
from petl_ext.nn.frozen import FreezingLayer, Frozen
from petl_ext.ops.adapter import ACTIVATIONS, adapter, packed_adapter
from petl_ext.ops.packed import dtype_of_activations

INITIAL_STD = 0.02


def adapter_parameters(dim, bottleneck, layer_norm=False):
    """Of one adapter: down [B, D], down_bias [B], up [D, B] and up_bias [D]; LayerNorm's weight [D] and bias [D]."""
    return 2 * bottleneck * dim + bottleneck + dim + (2 * dim if layer_norm else 0)


def adapter_macs(tokens, dim, bottleneck):
    """Of one adapter: down and up, N D B each. LayerNorm is not counted, nor are the activation and the biases."""
    return 2 * tokens * dim * bottleneck


class AdapterLayer(FreezingLayer):
    """Adds `scale * (act(norm(x) down^T + down_bias) up^T + up_bias)` to a residual, which by default is x itself.

    With its defaults it is the sequential adapter behind a frozen module (arXiv 1902.00751). With `layer_norm=True`,
    `residual=False` and a `scale` it is the scaled parallel one beside a module (arXiv 2110.04366), and with
    `layer_norm=True` the bypass that takes the place of a skipped layer.

    It holds `down` [B, D], `down_bias` [B], `up` [D, B] and `up_bias` [D]; with layer_norm also `norm_weight` [D] and
    `norm_bias` [D], and with trainable_scale `gain` [1]: 2 B D + B + D parameters, 2 D more for the norm.

    Initialization: down and up are drawn from Normal(0, 0.02), biases are 0, the norm is 1 and 0. The APT paper's
    code asks for Normal(0, 0.01) in its adapter, but the initializers of its ViLT and METER overwrite that with 0.02
    before training starts; 0.02 is what its results were made with. Without zero_init the layer is not the identity at
    the start.

    Args:
        dim: the model's width D.
        bottleneck: B.
        activation: "relu", "gelu" or "silu".
        layer_norm: whether LayerNorm over the last axis comes first.
        scale: a number; with trainable_scale the initial value of `gain`.
        residual: whether x is added where `forward` is given no residual.
        dropout: on the hidden units, in training.
        trainable_scale: whether the scale is a parameter.
        zero_init: whether `up` starts at zero, so that the layer starts as its residual.

    Raises:
        ValueError: a size below 1, an unknown activation, a scale that is no finite number, a dropout outside [0, 1),
            or a switch that is neither True nor False.
    """

    def __init__(
        self,
        dim: int,
        bottleneck: int = 96,
        activation: str = "relu",
        layer_norm: bool = False,
        scale: float = 1.0,
        residual: bool = True,
        dropout: float = 0.0,
        trainable_scale: bool = False,
        zero_init: bool = False,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        for name, value in (("dim", dim), ("bottleneck", bottleneck)):
            check_positive_integer(f"AdapterLayer: {name}", value)
        check_choice("AdapterLayer: activation", activation, ACTIVATIONS)
        switches = {
            "layer_norm": layer_norm,
            "residual": residual,
            "trainable_scale": trainable_scale,
            "zero_init": zero_init,
        }
        for name, value in switches.items():
            check_switch(f"AdapterLayer: {name}", value)
        if type(scale) not in (int, float) or not math.isfinite(scale):
            raise ValueError(f"AdapterLayer: scale must be a finite number, got {scale!r}")
        check_probability("AdapterLayer: dropout", dropout)
        self.activation = activation
        self.scale = scale
        self.residual = residual
        self.dropout = dropout
        self.zero_init = zero_init

        def parameter(*shape):
            return nn.Parameter(torch.empty(*shape, device=device, dtype=dtype))

        self.norm_weight = parameter(dim) if layer_norm else None
        self.norm_bias = parameter(dim) if layer_norm else None
        self.down = parameter(bottleneck, dim)
        self.down_bias = parameter(bottleneck)
        self.up = parameter(dim, bottleneck)
        self.up_bias = parameter(dim)
        self.gain = parameter(1) if trainable_scale else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for weight in (self.down, self.up):
            nn.init.normal_(weight, std=INITIAL_STD)
        if self.zero_init:
            nn.init.zeros_(self.up)
        for bias in (self.down_bias, self.up_bias):
            nn.init.zeros_(bias)
        if self.norm_weight is not None:
            nn.init.ones_(self.norm_weight)
            nn.init.zeros_(self.norm_bias)
        if self.gain is not None:
            nn.init.constant_(self.gain, self.scale)

    def freeze(self, dtype: torch.dtype | None = None) -> None:
        """Packs the weights once for the kernels, for serving on CUDA: a forward without gradients is one launch fewer.

        Elsewhere it changes nothing. Undone by `thaw`, `train()`, loading, a move or a cast of the layer, and any
        change of a parameter that torch counts, of which `APTLayer.freeze` tells more. `gain` may change.

        Args:
            dtype: of the x that the packed weights are for; None: autocast's dtype where that is on, or else that of
                `down`. Others are served too, but each call packs.

        Raises:
            RuntimeError: the layer is in training mode.
        """
        self.check_serves()
        weights = self._packed_weights()
        frozen = Frozen(
            [weight for weight in weights if weight is not None],
            lambda: packed_adapter(*weights, dtype or dtype_of_activations(self.down)),
        )
        self._frozen = frozen if frozen.value is not None else None

    @property
    def is_frozen(self) -> bool:
        return self._frozen is not None and self._frozen.holds_for(w for w in self._packed_weights() if w is not None)

    def _packed_weights(self):
        return self.down, self.down_bias, self.up, self.up_bias, self.norm_weight, self.norm_bias

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """x [..., D] to the new output [..., D] in the dtype that `ops.adapter` says; a given `residual` is added in
        place of x."""
        if residual is None and self.residual:
            residual = x
        return adapter(
            x,
            self.down,
            self.down_bias,
            self.up,
            self.up_bias,
            scale=self.scale if self.gain is None else self.gain,
            activation=self.activation,
            norm_weight=self.norm_weight,
            norm_bias=self.norm_bias,
            residual=residual,
            dropout=self.dropout if self.training else 0.0,
            packed=self._frozen.value if self.is_frozen else None,
        )

    def extra_repr(self) -> str:
        bottleneck, dim = self.down.shape
        return (
            f"dim={dim}, bottleneck={bottleneck}, activation={self.activation!r}, "
            f"layer_norm={self.norm_weight is not None}, scale={self.scale}, residual={self.residual}, "
            f"dropout={self.dropout}, trainable_scale={self.gain is not None}, zero_init={self.zero_init}"
        )
