"""What replaces a module that carries approximated prompt tuning in a model of PEFT's."""

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from petl_ext.attaching.sites.site import location_beside, width_of
from petl_ext.nn.apt import current_keys, frozen_keys
from petl_ext.ops.apt import apt
from petl_ext.peft.config import METHOD

PREFIX = f"{METHOD}_"  # "apt_" would be part of "adapt_", and PEFT looks for it anywhere in a name
NO_MERGE = (
    "APT cannot be merged into the model's weights: relu(x keys^T) and its largest score depend on the input, so no "
    "weight matrix computes them. Keep the adapter, or unload() it"
)


class APTTunerLayer(nn.Module, BaseTunerLayer):
    """What takes the place of a target, which becomes `base_layer`. Its class is composed with the target's `Site`.

    The site's `forward` finds the target's own children here, and in place of an `APTLayer` the method `apt`. Every
    adapter has its tensors under its name in one flat dict per parameter: the only layout with which every release of
    PEFT since 0.19 takes the adapter's name out of the state-dict names and puts it back.
    """

    adapter_layer_names = tuple(f"{PREFIX}{name}" for name in ("prompts", "down", "up", "log_scale"))
    other_param_names = ("petl_apt_options", "petl_apt_frozen")

    def __init__(self, base_layer, adapter_name):
        super().__init__()
        self.base_layer = base_layer
        self.training = base_layer.training
        self._active_adapter = adapter_name
        for name in self.adapter_layer_names:
            setattr(self, name, nn.ParameterDict())
        self.petl_apt_options = {}  # of every adapter (activation, dropout)
        self.petl_apt_frozen = {}  # of some the `frozen_keys`

    def update_layer(self, adapter_name, config, model):
        neighbor = self.neighbor(self.base_layer)
        layer = config.new_layer(width_of(neighbor), **location_beside(neighbor, model))
        for name in self.adapter_layer_names:
            getattr(self, name)[adapter_name] = getattr(layer, name.removeprefix(PREFIX))
        self.petl_apt_options[adapter_name] = (config.activation, config.dropout)
        self.petl_apt_frozen.pop(adapter_name, None)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def carries(self, adapter_name):
        return adapter_name in self.petl_apt_options

    def apt(self, x, y):
        """The output y [..., D] as the active adapters change it one after the other; x [..., D] is the input."""
        if self.disable_adapters:
            return y
        for adapter_name in self.active_adapters:
            if self.carries(adapter_name):
                y = self._changed(adapter_name, x, y)
        return y

    def forward(self, *args, **kwargs):
        return self.base_layer(*args, **kwargs)

    def freeze(self):
        """As `APTLayer.freeze`, for every adapter here.

        Raises:
            RuntimeError: the layer is in training mode.
        """
        if self.training:
            raise RuntimeError("APT: freeze is for serving, but the model is in training mode; call eval() first")
        self.petl_apt_frozen = {name: frozen_keys(*self._of_keys(name)) for name in self.petl_apt_options}

    def thaw(self):
        """Undoes `freeze`."""
        self.petl_apt_frozen = {}

    def train(self, mode=True):
        if mode:
            self.thaw()
        return super().train(mode)

    def _load_from_state_dict(self, *args, **kwargs):
        self.thaw()
        super()._load_from_state_dict(*args, **kwargs)

    def __getstate__(self):
        return {**self.__dict__, "petl_apt_frozen": {}}

    def merge(self, safe_merge=False, adapter_names=None):
        raise NotImplementedError(NO_MERGE)

    def unmerge(self):
        raise NotImplementedError(NO_MERGE)

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

    def _changed(self, adapter_name, x, y):
        prompts, down, up = self._of_keys(adapter_name)
        log_scale = getattr(self, f"{PREFIX}log_scale")[adapter_name]
        activation, dropout = self.petl_apt_options[adapter_name]
        keys = current_keys(self.petl_apt_frozen.get(adapter_name), prompts, down, up)
        return apt(x, y, prompts, keys, log_scale, activation, dropout if self.training else 0.0)

    def _of_keys(self, adapter_name):
        """The parameters that keys are made from."""
        return [getattr(self, f"{PREFIX}{name}")[adapter_name] for name in ("prompts", "down", "up")]
