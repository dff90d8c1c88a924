"""What a module derives from its parameters, made once for serving."""

import torch
from torch import nn


class Frozen:
    """A value derived from parameters. It is valid for these very tensors as long as torch counts no change of them.

    Torch does not count changes through `parameter.data`, by collectives or by fused optimizers.

    Attributes:
        value: what `make()` has returned.
    """

    def __init__(self, parameters, make):
        self._parameters = tuple(parameters)
        self._state = _state(self._parameters)
        # A tensor of inference mode could take no part in a later training step.
        with torch.inference_mode(False), torch.no_grad():
            self.value = make()

    def holds_for(self, parameters):
        parameters = tuple(parameters)
        if len(parameters) != len(self._parameters):
            return False
        if any(before is not now for before, now in zip(self._parameters, parameters, strict=True)):
            return False
        return torch.compiler.is_compiling() or self._state == _state(parameters)

    def read(self, whose):
        """The value, where no parameter waits for a gradient through it.

        Raises:
            RuntimeError: one does; the message begins with `whose`.
        """
        if torch.is_grad_enabled() and any(parameter.requires_grad for parameter in self._parameters):
            raise RuntimeError(
                f"{whose} pass no gradient on to the parameters that they were made from, which require one; call "
                "thaw() or train(), compute under torch.no_grad(), or set requires_grad to False"
            )
        return self.value


class FreezingLayer(nn.Module):
    """A layer whose `freeze` puts a `Frozen` into `_frozen`, and perhaps a `SideStream` into `_side_stream`. Whatever
    could make the former stale undoes both; copies and pickles are not frozen.

    Attributes:
        can_overlap: whether `freeze` takes `overlap`.
    """

    can_overlap = False

    def __init__(self):
        super().__init__()
        self._frozen = self._side_stream = None

    def check_serves(self) -> None:
        """Raises a RuntimeError in training mode."""
        if self.training:
            name = type(self).__name__
            raise RuntimeError(f"{name}: freeze is for serving, but the layer is in training mode; call eval() first")

    def thaw(self) -> None:
        """Undoes `freeze`."""
        self._frozen = self._side_stream = None

    def train(self, mode: bool = True) -> "FreezingLayer":
        if mode:
            self.thaw()
        return super().train(mode)

    def _load_from_state_dict(self, *args, **kwargs):
        self.thaw()
        super()._load_from_state_dict(*args, **kwargs)

    def __getstate__(self):
        return {**self.__dict__, "_frozen": None, "_side_stream": None}


def _state(parameters):
    return [(0 if p.is_inference() else p._version, p.data_ptr(), p.dtype, p.device) for p in parameters]
