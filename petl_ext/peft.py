"""Approximated prompt tuning as a method of PEFT, which importing this module registers.

    import petl_ext.peft
    model = get_peft_model(model, petl_ext.peft.APTConfig(modules_to_save=["classifier"]))

From there on PEFT does what it does for its own methods: several adapters, saving, loading, disabling, unloading, and
transformers' and diffusers' `add_adapter`. A saved adapter needs this import before it is loaded, otherwise PEFT raises
KeyError: 'PETL_APT'.
"""

import dataclasses
import re
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

try:
    import peft
except ModuleNotFoundError as error:
    if error.name != "peft":
        raise
    raise ImportError("petl_ext.peft needs peft: pip install peft") from error

import safetensors.torch
from packaging.version import Version
from peft import PeftConfig, PeftType, get_peft_model_state_dict, inject_adapter_in_model, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import SAFETENSORS_WEIGHTS_NAME, register_peft_method
from torch import nn

from petl_ext.attaching.families import FAMILIES, family_of
from petl_ext.attaching.methods import CONFIGS
from petl_ext.attaching.patterns import whole_name
from petl_ext.attaching.sites.site import Site, location_beside, width_of
from petl_ext.composing import composed, has_device_hook, unchanged_on_error
from petl_ext.nn.apt import APTLayer, apt_output, current_keys, frozen_keys

SITE_CLASSES = CONFIGS["apt"].site_classes["apt"]
METHOD = "petl_apt"
PEFT_TYPE = METHOD.upper()
PREFIX = f"{METHOD}_"  # "apt_" would be part of "adapt_", and PEFT looks for it anywhere in a name
OLDEST_PEFT = "0.19"
PEFT_MODEL = "base_model.model."  # what a PeftModel's state-dict names begin with, and so those of its files
NO_MERGE = (
    "APT cannot be merged into the model's weights: relu(x keys^T) and its largest score depend on the input, so no "
    "weight matrix computes them. Keep the adapter, or unload() it"
)
MODEL_CARD = """
## Loading

The method of this adapter, approximated prompt tuning, comes with `petl_ext`. Without the first line PEFT raises
`KeyError: 'PETL_APT'`.

```python
import petl_ext.peft
from peft import PeftModel

model = PeftModel.from_pretrained(model, folder)
```
"""


@dataclass
class APTConfig(PeftConfig):
    """Approximated prompt tuning (arXiv 2306.15706): an `APTLayer`, whose documentation explains the sizes and the
    initialisation, for every attention that is a target.

    A target is the attention module that ends in its output projection (CLIP, T5, LLaMA, diffusers), or the output
    module `dense -> dropout -> (LayerNorm)` of an attention (ViLT, BERT, RoBERTa, METER).

    Args:
        num_prompts: P.
        rank: r of the map from prompts to keys.
        activation: "relu" or "softmax".
        dropout: on the scores, in training; above 0 the fused kernel does not run there.
        target_modules: the ends of the targets' dotted names, or one regular expression for whole names. None stands
            for what `petl_ext.attach` takes in a model of this family.
        exclude_modules: the same, of modules that are no targets.
        layers_to_transform: the indices of the layers whose targets count; None stands for all.
        layers_pattern: the name before the index, where there are several lists of layers.
        modules_to_save: names of the model's own modules that train and are saved too, such as "classifier".

    Raises:
        ValueError: a size, the activation or the dropout is not one of an `APTLayer`, or layers are named without a
            list of targets.
    """

    num_prompts: int = 200
    rank: int = 4
    activation: str = "relu"
    dropout: float = 0.0
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    modules_to_save: list[str] | None = None

    def __post_init__(self):
        super().__post_init__()
        self.peft_type = PeftType(PEFT_TYPE)
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            setattr(self, name, set(value) if isinstance(value, list | tuple) else value)
        if isinstance(self.target_modules, str) and self.layers_to_transform is not None:
            raise ValueError("APTConfig: layers_to_transform needs target_modules that are a list of names, or None")
        if self.layers_pattern is not None and self.layers_to_transform is None:
            raise ValueError("APTConfig: layers_pattern has no meaning without layers_to_transform")
        self.new_layer(1, device="meta")  # the layer knows which sizes are right

    def new_layer(self, dim, **place):
        return APTLayer(dim, self.num_prompts, self.rank, self.activation, self.dropout, **place)

    def save_pretrained(self, save_directory, **kwargs):
        super().save_pretrained(save_directory, **kwargs)
        card = Path(save_directory) / "README.md"
        text = card.read_text(encoding="utf-8") if card.exists() else ""
        if MODEL_CARD.strip() not in text:
            card.write_text(text.rstrip("\n") + "\n" + MODEL_CARD, encoding="utf-8")


class APTTunerLayer(nn.Module, BaseTunerLayer):
    """What takes the place of a target, which becomes `base_layer`. Its class is composed with the target's `Site`.

    The site's `forward` finds the target's own children here, and in place of an `APTLayer` the method `apt`. Every
    adapter has its tensors under its name in one flat dict per kind: the one layout from which every release of PEFT
    since 0.19 gets the adapter's name out of and into the state-dict names.
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
        neighbour = self.neighbour(self.base_layer)
        layer = config.new_layer(width_of(neighbour), **location_beside(neighbour, model))
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
        """What the target has is read from it, by its site's `forward` and by the model around it. Not what is private:
        accelerate would take the target's hook for one of this layer."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_layer" or name.startswith("_"):
                raise
            return getattr(self.base_layer, name)

    def _get_base_layer_device_and_dtype(self, base_layer):
        # Whereto PEFT moves an adapter that it has loaded without a place of its own.
        location = location_beside(self.neighbour(base_layer), self)
        return location["device"], location["dtype"]

    def _changed(self, adapter_name, x, y):
        prompts, down, up = self._of_keys(adapter_name)
        log_scale = getattr(self, f"{PREFIX}log_scale")[adapter_name]
        activation, dropout = self.petl_apt_options[adapter_name]
        keys = current_keys(self.petl_apt_frozen.get(adapter_name), prompts, down, up)
        return apt_output(x, y, prompts, keys, log_scale, activation, dropout if self.training else 0.0)

    def _of_keys(self, adapter_name):
        """The parameters that keys are made from."""
        return [getattr(self, f"{PREFIX}{name}")[adapter_name] for name in ("prompts", "down", "up")]


class APTModel(BaseTuner):
    """Puts `APTTunerLayer`s into a model; `peft.get_peft_model` makes it from an `APTConfig`."""

    prefix = PREFIX
    tuner_layer_cls = APTTunerLayer

    def inject_adapter(self, model, adapter_name, *args, **kwargs):
        """As PEFT's, but after an error the model is as it was.

        Raises:
            ValueError: the adapter's name cannot be one, nothing or something that cannot carry APT is a target, or
                a target carries another method.
        """
        try:
            _check_adapter_name(adapter_name)
            with unchanged_on_error(model):
                super().inject_adapter(model, adapter_name, *args, **kwargs)
                _check_not_empty(model, adapter_name, self.peft_config[adapter_name])
        except BaseException:
            # Where the model has adapters already, this is their table.
            self.peft_config.pop(adapter_name, None)
            raise

    def _prepare_adapter_config(self, peft_config, model_config):
        if peft_config.target_modules is None:
            peft_config.target_modules = _default_targets(self.model, peft_config)
        return peft_config

    def _create_and_replace(self, peft_config, adapter_name, target, target_name, parent, current_key, **_):
        if not isinstance(target, APTTunerLayer):
            site_class = _site_class(target, target_name, parent, current_key)
            target = composed(APTTunerLayer, (site_class,))(target, adapter_name)
            setattr(parent, target_name, target)
        target.update_layer(adapter_name, peft_config, self.model)

    def _replace_module(self, parent, child_name, new_module, child):
        # PEFT's own looks for a weight, which these modules do not have.
        setattr(parent, child_name, new_module)

    def _check_merge_allowed(self):
        raise NotImplementedError(NO_MERGE)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args, **kwargs):
        # PEFT would leave it out without a word.
        if kwargs.get("adapter_names") is not None:
            raise ValueError("APT: adapter_names, one adapter per sample, is not supported; use set_adapter")
        yield


def save_adapter(model, folder, adapter_name="default"):
    """Writes an adapter of a model that is no PeftModel, such as a UNet after `add_adapter`, as a PeftModel would.

    `load_adapter`, `PeftModel.from_pretrained` and transformers' `load_adapter` read the folder.

    Raises:
        ValueError: the model has no such adapter.
    """
    configs = getattr(model, "peft_config", {})
    if adapter_name not in configs:
        raise ValueError(
            f"save_adapter: {type(model).__name__} has no adapter {adapter_name!r}, it has {list(configs)}"
        )
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {PEFT_MODEL + _plain(name): t.contiguous() for name, t in _tensors(model, adapter_name).items()}
    safetensors.torch.save_file(tensors, folder / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
    dataclasses.replace(configs[adapter_name], inference_mode=True).save_pretrained(folder)


def load_adapter(model, folder, adapter_name="default", is_trainable=False):
    """Adds to a model that is no PeftModel, such as a UNet, an adapter that PEFT or `save_adapter` wrote.

    It becomes the active one of its method; adapters of other methods stay as they are.

    Args:
        is_trainable: whether the adapter's parameters train.

    Raises:
        FileNotFoundError: the folder holds no adapter.
        ValueError: the model has an adapter of this name, or the folder's does not fit it. The model has not changed.
    """
    file = Path(folder) / SAFETENSORS_WEIGHTS_NAME
    if not file.exists():
        raise FileNotFoundError(f"load_adapter: there is no {file}")
    if adapter_name in getattr(model, "peft_config", {}):
        raise ValueError(f"load_adapter: {type(model).__name__} already has an adapter {adapter_name!r}")
    config = PeftConfig.from_pretrained(folder)
    config.inference_mode = not is_trainable
    tensors = safetensors.torch.load_file(file)
    with unchanged_on_error(model):
        inject_adapter_in_model(config, model, adapter_name)
        expected = _tensors(model, adapter_name)
        different = _shapes(expected) ^ _shapes(tensors)
        if different:
            names = sorted({name for name, _ in different})
            raise ValueError(f"load_adapter: {file} does not fit {type(model).__name__} in {names}")
        tensors = {_plain(name): tensor for name, tensor in tensors.items()}
        set_peft_model_state_dict(model, {name: tensors[_plain(name)] for name in expected}, adapter_name)
        if hasattr(model, "_hf_peft_config_loaded"):  # without it the model's own methods find no adapter
            model._hf_peft_config_loaded = True


def _tensors(model, adapter_name):
    """{name: tensor} of all that is saved; the names do not hold the adapter's."""
    tensors = get_peft_model_state_dict(model, adapter_name=adapter_name)
    # PEFT 0.19 leaves other adapters' tensors in, whose names end in the adapter's.
    return {
        name: tensor
        for name, tensor in tensors.items()
        if not (PREFIX in name and name.rpartition(".")[2] in model.peft_config)
    }


def _shapes(tensors):
    return {(_plain(name), tensor.shape) for name, tensor in tensors.items()}


def _plain(name):
    """The name in a model that carries this adapter alone: a target of another method around it adds to the name."""
    return name.removeprefix(PEFT_MODEL).replace(".base_layer.", ".")


def _check_adapter_name(name):
    # PEFT takes it for a part of the prefix when it loads; torch takes the others for names of modules or methods.
    if name in PREFIX or "." in name or hasattr(nn.ParameterDict, name):
        raise ValueError(
            f"APT: an adapter cannot be named {name!r}: that is empty, part of the prefix {PREFIX!r}, has a dot, or is "
            "an attribute of torch.nn.ParameterDict"
        )


def _check_not_empty(model, adapter_name, config):
    # PEFT 0.19 looks at the first adapter only.
    if not any(isinstance(module, APTTunerLayer) and module.carries(adapter_name) for module in model.modules()):
        raise ValueError(
            f"APT: target_modules {config.target_modules!r} match nothing in {type(model).__name__}, with "
            f"exclude_modules={config.exclude_modules!r} and layers_to_transform={config.layers_to_transform!r}"
        )


def _default_targets(model, config):
    """What `petl_ext.attach` takes in this model: the ends of the names behind the layer's index where they say it all,
    as in LoRA's defaults, otherwise a regular expression."""
    patterns = family_of(model).patterns("apt")
    if not patterns:
        known = ", ".join(family.name for family in FAMILIES.values() if "apt" in family.sites)
        raise ValueError(
            f"APTConfig: {type(model).__name__} belongs to none of the families with default targets ({known}); "
            "give target_modules"
        )
    pattern = whole_name("|".join(patterns))
    names = [name for name, _ in model.named_modules()]
    ends = {re.split(r"\.\d+\.", name)[-1] for name in names if re.fullmatch(pattern, name)}
    if all(re.fullmatch(pattern, name) for name in names if any(f".{name}".endswith(f".{end}") for end in ends)):
        return ends
    if config.layers_to_transform is not None:
        raise ValueError(
            f"APTConfig: the default targets of {type(model).__name__} are a regular expression, {pattern!r}; with "
            "layers_to_transform give target_modules, a list of names"
        )
    return pattern


def _site_class(target, target_name, parent, name):
    """The class of sites that the target is."""
    if isinstance(target, BaseTunerLayer | Site):
        raise ValueError(
            f"APT: {name} already carries another method, {type(target).__name__}; take that out first, or choose "
            "other target_modules"
        )
    if "forward" in vars(target) and not has_device_hook(target):
        raise ValueError(
            f"APT: {name} has a forward of its own, put there by another library, that would bypass the adapter"
        )
    for site_class in SITE_CLASSES:
        if site_class.candidates(parent).get(target_name) is target:
            _check_site(site_class, target, name)
            return site_class
    looked_for = " or ".join(site_class.looked_for for site_class in SITE_CLASSES)
    raise ValueError(
        f"APT: target_modules must name {looked_for}; {name} is a {type(target).__name__} that is none of them"
    )


def _check_site(site_class, module, name):
    try:
        site_class.check(module)
    except ValueError as error:
        raise ValueError(f"APT: {name}: {error}") from error


def _register():
    """Adds the method to PEFT, whose list of methods is an enumeration that was not made for additions.

    Raises:
        ImportError: this PEFT is too old, or keeps its methods differently.
    """
    if Version(peft.__version__) < Version(OLDEST_PEFT):
        raise ImportError(f"petl_ext.peft needs peft {OLDEST_PEFT} or later, got {peft.__version__}")
    try:
        if PEFT_TYPE not in PeftType.__members__:
            member = str.__new__(PeftType, PEFT_TYPE)
            member._name_ = member._value_ = PEFT_TYPE
            type.__setattr__(PeftType, PEFT_TYPE, member)
            PeftType._member_names_.append(PEFT_TYPE)
            PeftType._member_map_[PEFT_TYPE] = member
            PeftType._value2member_map_[PEFT_TYPE] = member
        register_peft_method(name=METHOD, config_cls=APTConfig, model_cls=APTModel)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ImportError(
            f"petl_ext.peft cannot add its method to peft {peft.__version__}, which keeps its methods differently from "
            f"those that it was tested with, 0.19.1 and 0.21.2: {error}"
        ) from error


_register()
