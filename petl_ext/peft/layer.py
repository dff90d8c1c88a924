"""What replaces a module that carries one of our methods in a model of PEFT's."""

from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from petl_ext.attaching.sites.site import location_beside, width_of
from petl_ext.nn.apt import current_keys, frozen_keys
from petl_ext.ops.adapter import adapter
from petl_ext.ops.apt import apt
from petl_ext.peft.config import AdapterConfig, APTConfig


class TunerLayer(nn.Module, BaseTunerLayer):
    """What takes the place of a target, which becomes `base_layer`. Its class is composed with the target's `Site`.

    The site's `forward` finds the target's own children here, and in place of the new layer a method of its name. Every
    adapter has its tensors under its name in one flat dict per parameter: the only layout with which every release of
    PEFT since 0.19 takes the adapter's name out of the state-dict names and puts it back.

    Attributes:
        petl_prefix: of the names of all these dicts.
        tensor_names: of the new layer's parameters, of which a configuration may have some.
        petl_no_merge: why the method cannot be merged into the model's weights.
        petl_options: {adapter: what of its configuration is no tensor}.
    """

    petl_prefix: str
    tensor_names: tuple
    petl_no_merge: str
    other_param_names = ("petl_options",)

    def __init__(self, base_layer: nn.Module, adapter_name: str):
        super().__init__()
        self.base_layer = base_layer
        self.training = base_layer.training
        self._active_adapter = adapter_name
        for name in self.adapter_layer_names:
            setattr(self, name, nn.ParameterDict())
        self.petl_options = {}

    def update_layer(self, adapter_name: str, config: Any, model: nn.Module) -> None:
        neighbor = self.neighbor(self.base_layer)
        layer = config.new_layer(width_of(neighbor), **location_beside(neighbor, model))
        for name in self.tensor_names:
            tensor = getattr(layer, name)
            if tensor is not None:
                getattr(self, f"{self.petl_prefix}{name}")[adapter_name] = tensor
        self.petl_options[adapter_name] = self.options_of(layer)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    @staticmethod
    def options_of(layer: nn.Module) -> dict[str, Any]:
        """What of a new layer is no tensor, as a dict."""
        raise NotImplementedError

    def carries(self, adapter_name: str) -> bool:
        return adapter_name in self.petl_options

    def petl_tensor(self, name: str, adapter_name: str) -> Tensor | None:
        """The adapter's parameter of that name, or None where its configuration has none."""
        return dict(getattr(self, f"{self.petl_prefix}{name}").items()).get(adapter_name)

    def petl_running(self) -> list[str]:
        """The names of the adapters that compute, in their order."""
        return [] if self.disable_adapters else [name for name in self.active_adapters if self.carries(name)]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.base_layer(*args, **kwargs)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        raise NotImplementedError(self.petl_no_merge)

    def unmerge(self) -> None:
        raise NotImplementedError(self.petl_no_merge)

    def __getattr__(self, name):
        """The site's `forward` and the model around it read the target's attributes through this layer. Private ones
        are excepted: accelerate would take the target's hook for this layer's."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_layer" or name.startswith("_"):
                raise
            return getattr(self.base_layer, name)

    def _get_base_layer_device_and_dtype(self, base_layer):
        # PEFT asks for them to move an adapter that it has loaded.
        location = location_beside(self.neighbor(base_layer), self)
        return location["device"], location["dtype"]


class APTTunerLayer(TunerLayer):
    """Of approximated prompt tuning."""

    petl_prefix = f"{APTConfig.method}_"  # "apt_" would be part of "adapt_", and PEFT looks for it anywhere in a name
    tensor_names = ("prompts", "down", "up", "log_scale")
    adapter_layer_names = tuple(f"{APTConfig.method}_{name}" for name in ("prompts", "down", "up", "log_scale"))
    other_param_names = ("petl_options", "petl_apt_frozen")
    petl_no_merge = (
        "APT cannot be merged into the model's weights: relu(x keys^T) and its largest score depend on the input, so "
        "no weight matrix computes them. Keep the adapter, or unload() it"
    )

    def __init__(self, base_layer: nn.Module, adapter_name: str):
        super().__init__(base_layer, adapter_name)
        self.petl_apt_frozen = {}  # of some the `frozen_keys`

    def update_layer(self, adapter_name: str, config: Any, model: nn.Module) -> None:
        super().update_layer(adapter_name, config, model)
        self.petl_apt_frozen.pop(adapter_name, None)

    @staticmethod
    def options_of(layer: nn.Module) -> dict[str, Any]:
        return {"activation": layer.activation, "dropout": layer.dropout}

    def apt(self, x: Tensor, y: Tensor, begun: None = None) -> Tensor:
        """The output y [..., D] as the active adapters change it one after the other; x [..., D] is the input."""
        for adapter_name in self.petl_running():
            y = self._changed(adapter_name, x, y)
        return y

    def freeze(self) -> None:
        """As `APTLayer.freeze`, for every adapter here.

        Raises:
            RuntimeError: the layer is in training mode.
        """
        if self.training:
            raise RuntimeError("APT: freeze is for serving, but the model is in training mode; call eval() first")
        self.petl_apt_frozen = {
            name: frozen_keys(*self._of_keys(name), options["activation"])
            for name, options in self.petl_options.items()
        }

    def thaw(self) -> None:
        """Undoes `freeze`."""
        self.petl_apt_frozen = {}

    def train(self, mode: bool = True) -> "APTTunerLayer":
        if mode:
            self.thaw()
        return super().train(mode)

    def _load_from_state_dict(self, *args, **kwargs):
        self.thaw()
        super()._load_from_state_dict(*args, **kwargs)

    def __getstate__(self):
        return {**self.__dict__, "petl_apt_frozen": {}}

    def _changed(self, adapter_name, x, y):
        options = self.petl_options[adapter_name]
        keys, packed = current_keys(self.petl_apt_frozen.get(adapter_name), *self._of_keys(adapter_name))
        prompts, log_scale = (self.petl_tensor(name, adapter_name) for name in ("prompts", "log_scale"))
        dropout = options["dropout"] if self.training else 0.0
        return apt(x, y, prompts, keys, log_scale, options["activation"], dropout, packed)

    def _of_keys(self, adapter_name):
        """The parameters that keys are made from."""
        return [self.petl_tensor(name, adapter_name) for name in ("prompts", "down", "up")]


class AdapterTunerLayer(TunerLayer):
    """Of bottleneck adapters."""

    petl_prefix = f"{AdapterConfig.method}_"
    tensor_names = ("down", "down_bias", "up", "up_bias", "norm_weight", "norm_bias", "gain")
    adapter_layer_names = tuple(
        f"{AdapterConfig.method}_{name}"
        for name in ("down", "down_bias", "up", "up_bias", "norm_weight", "norm_bias", "gain")
    )
    petl_no_merge = (
        "Adapters cannot be merged into the model's weights: their activation lies between two matrices. Keep the "
        "adapter, or unload() it"
    )

    @staticmethod
    def options_of(layer: nn.Module) -> dict[str, Any]:
        return {name: getattr(layer, name) for name in ("activation", "scale", "dropout")}

    def adapter(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """What the active adapters make of x [..., D], one after the other; where a `residual` [..., D] is given, each
        reads x and adds to that."""
        y = x if residual is None else residual
        for adapter_name in self.petl_running():
            y = self._added(adapter_name, y if residual is None else x, y)
        return y

    def _added(self, adapter_name, x, residual):
        options = self.petl_options[adapter_name]
        tensors = {name: self.petl_tensor(name, adapter_name) for name in self.tensor_names}
        gain = tensors.pop("gain")
        return adapter(
            x,
            **tensors,
            scale=options["scale"] if gain is None else gain,
            activation=options["activation"],
            residual=residual,
            dropout=options["dropout"] if self.training else 0.0,
        )
