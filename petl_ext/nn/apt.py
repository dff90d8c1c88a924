"""The layer of approximated prompt tuning."""

import torch
from torch import Tensor, nn

from petl_ext.checks import check_choice, check_positive_integer, check_probability, check_switch
from petl_ext.nn.frozen import FreezingLayer, Frozen
from petl_ext.nn.side_stream import side_stream_on
from petl_ext.ops.apt import ACTIVATIONS, apt, begun_apt, packed_apt
from petl_ext.ops.packed import Begun, dtype_of_activations

INITIAL_STD = 0.02


def apt_keys(prompts, down, up):
    """prompts + (prompts down^T) up^T, [P, D], in float32 or wider: rounded keys flip the ReLU's mask."""
    device = prompts.device.type
    if device != "meta" and torch.is_autocast_enabled(device):
        with torch.autocast(device, enabled=False):
            return apt_keys(prompts, down, up)
    wide = torch.promote_types(prompts.dtype, torch.float32)
    prompts, down, up = (t.to(wide) for t in (prompts, down, up))
    return torch.addmm(prompts, prompts @ down.mT, up.mT)


def frozen_keys(prompts, down, up, activation, dtype=None):
    """A `Frozen` of (keys, what `packed_apt` makes of them); dtype as for `APTLayer.freeze`."""

    def make():
        keys = apt_keys(prompts, down, up)
        return keys, packed_apt(prompts, keys, activation, dtype or dtype_of_activations(prompts))

    return Frozen((prompts, down, up), make)


def current_keys(frozen, *parameters):
    """The value of `frozen_keys`, where that holds for the parameters, or else (`apt_keys` of these, None)."""
    if frozen is not None and frozen.holds_for(parameters):
        return frozen.read("APT: frozen keys")
    return apt_keys(*parameters), None


def apt_parameters(dim, num_prompts, rank):
    """Of one layer: prompts [P, D], down [r, D], up [D, r] and log_scale [1]."""
    return num_prompts * dim + 2 * rank * dim + 1


def apt_macs(tokens, dim, num_prompts, rank):
    """Of one layer: scores and their product with the prompts, 2 N P D, and the keys, 2 P r D."""
    return 2 * tokens * num_prompts * dim + 2 * num_prompts * rank * dim


class APTLayer(FreezingLayer):
    """Diffuses `num_prompts` learned prompts into the output of one attention (APT, arXiv 2306.15706).

    It holds `prompts` [P, D], the low-rank pair `down` [r, D] and `up` [D, r] that turns prompts into keys, and
    `log_scale` [1]: P D + 2 r D + 1 parameters.

    Initialization: prompts, down and up are drawn from Normal(0, 0.02), log_scale is 0. The paper's code asks for
    Normal(0, 1) and zeros in `down` and `up`, but the initializers of its ViLT and METER overwrite both with 0.02
    before training starts; 0.02 is what its results were made with. The layer is not the identity at the start.

    Each forward makes the keys from the parameters. Who serves can have them made once, by `freeze`.

    Args:
        dim: the model's width D.
        num_prompts: P.
        rank: r of the map from prompts to keys.
        activation: "relu", or "softmax" over the prompts.
        dropout: on the scores, before the gate is taken, in training.
        train_scale: whether `log_scale` requires gradients. The authors' ViLT trains it; in their METER it stays at 0.

    Raises:
        ValueError: a size below 1, an unknown activation, a dropout outside [0, 1), or a train_scale that is neither
            True nor False.
    """

    can_overlap = True

    def __init__(
        self,
        dim: int,
        num_prompts: int = 200,
        rank: int = 4,
        activation: str = "relu",
        dropout: float = 0.0,
        train_scale: bool = True,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        for name, value in (("dim", dim), ("num_prompts", num_prompts), ("rank", rank)):
            check_positive_integer(f"APTLayer: {name}", value)
        check_choice("APTLayer: activation", activation, ACTIVATIONS)
        check_probability("APTLayer: dropout", dropout)
        check_switch("APTLayer: train_scale", train_scale)
        self.activation = activation
        self.dropout = dropout
        factory = {"device": device, "dtype": dtype}
        self.prompts = nn.Parameter(torch.empty(num_prompts, dim, **factory))
        self.down = nn.Parameter(torch.empty(rank, dim, **factory))
        self.up = nn.Parameter(torch.empty(dim, rank, **factory))
        self.log_scale = nn.Parameter(torch.empty(1, **factory), requires_grad=train_scale)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for weight in (self.prompts, self.down, self.up):
            nn.init.normal_(weight, std=INITIAL_STD)
        nn.init.zeros_(self.log_scale)

    def keys(self) -> Tensor:
        """`apt_keys` of the layer's parameters, [P, D], in float32 or wider; they do not depend on the input."""
        return current_keys(self._frozen, self.prompts, self.down, self.up)[0]

    def freeze(self, dtype: torch.dtype | None = None, overlap: bool = False) -> None:
        """Makes the keys once, for serving; from then on, gradients to the parameters that they were made from are
        refused. On CUDA, keys and prompts are also packed once for the kernels, so that a forward without gradients is
        one launch fewer.

        Undone by `thaw`, `train()`, loading, a move or a cast of the layer, and any change of a parameter that torch
        counts. It does not count changes through `parameter.data`, by collectives such as torch.distributed.broadcast,
        or by a fused optimizer. Copies and pickles of the layer are not frozen.

        Args:
            dtype: of the x and y that the packed weights are for; None: autocast's dtype where that is on, or else that
                of `prompts`. Others are served too, but each call packs.
            overlap: on CUDA, whether `begin` does anything. It takes one of the two launches of a call of few rows out
                of the way, where a CUDA graph is captured.

        Raises:
            RuntimeError: the layer is in training mode.
            ValueError: overlap is neither True nor False.
        """
        self.check_serves()
        check_switch("APTLayer.freeze: overlap", overlap)
        self._frozen = frozen_keys(self.prompts, self.down, self.up, self.activation, dtype)
        self._side_stream = side_stream_on(self.prompts.device) if overlap else None

    def begin(self, x: Tensor) -> Begun | None:
        """Queues what `forward` computes of the attention's input alone, before the attention itself, which so runs
        beside it; bit for bit the result is the same.

        Args:
            x: [..., D], of the forward that follows. To be kept until then.

        Returns:
            What `forward` is to be given as `begun`; None where it has nothing to gain: outside of the capture of a
            CUDA graph, where rows are many, or without `freeze(overlap=True)`.

        Raises:
            RuntimeError: a shape or device is not as `forward` wants it.
        """
        if self._side_stream is None or torch.compiler.is_compiling() or torch.is_grad_enabled() or not self.is_frozen:
            return None
        keys, packed = self._frozen.value
        return self._side_stream.queue(lambda: begun_apt(x, self.prompts, keys, self.activation, packed))

    @property
    def is_frozen(self) -> bool:
        return self._frozen is not None and self._frozen.holds_for((self.prompts, self.down, self.up))

    def forward(self, x: Tensor, y: Tensor, begun: Begun | None = None) -> Tensor:
        """x [..., D], the attention's input, and y [..., D], its output, to the new output [..., D] in y's dtype.
        `begun` is what `begin` returned for this x."""
        if begun is not None:
            self._side_stream.wait()
        dropout = self.dropout if self.training else 0.0
        keys, packed = current_keys(self._frozen, self.prompts, self.down, self.up)
        return apt(x, y, self.prompts, keys, self.log_scale, self.activation, dropout, packed, begun=begun)

    def extra_repr(self) -> str:
        num_prompts, dim = self.prompts.shape
        return (
            f"dim={dim}, num_prompts={num_prompts}, rank={self.down.size(0)}, "
            f"activation={self.activation!r}, dropout={self.dropout}, train_scale={self.log_scale.requires_grad}"
        )
