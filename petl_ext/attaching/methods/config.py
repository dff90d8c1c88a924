"""What to attach: one frozen dataclass per method, checked when it is made."""

import dataclasses
import re
from dataclasses import dataclass
from typing import ClassVar

from petl_ext.attaching.methods.deep_prompts import DeepPrompts
from petl_ext.checks import check_switch
from petl_ext.nn import AdapterLayer, APTLayer

# By kind of adapter: what None stands for.
ADAPTER_KINDS = {
    "sequential": {"layer_norm": False, "scale": 1.0},
    "parallel": {"layer_norm": True, "scale": 4.0},
}
DEFAULT_BYPASS_BOTTLENECK = 192
# Fields that folders saved before there were any do not have; they stand for the default.
LATER_FIELDS = {"class_token", "train_scale"}


class Config:
    """What the methods' configurations have in common.

    Attributes:
        method: the name of the method in saved files.
        trains_all: whether every parameter of the model trains.
        placement: its name in the tables of families.py; None for a method that adds nothing to the model.
        sites: which of the model's candidate sites get a layer. None stands for those of the model family's table;
            otherwise regular expressions, each of which must match the end of a site's dotted name from a dot or from
            its start: "attention.output", r"layer\\.[0-5]\\.attention\\.output"; of CLIP's two towers only the one that
            sees, r"vision_model\\..*self_attn"; of a UNet only the cross-attentions, "attn2". So they also say where
            in a model that is in no family's table.
        class_token: whether the method trains a class token too, which `ClassTokenConfig` explains, as the authors'
            APT, its baselines and DAS's METER do; ViLT and METER only.
    """

    method: ClassVar[str]
    trains_all: ClassVar[bool] = False
    placement = None
    sites = None
    class_token = False

    def to_dict(self):
        return {"method": self.method, **dataclasses.asdict(self)}


@dataclass(frozen=True)
class APTConfig(Config):
    """Approximated prompt tuning: one `APTLayer` per attention, whose documentation explains the sizes.

    In cross-attention (METER, T5, diffusers) the prompts are scored by the stream that asks.

    Attributes:
        train_scale: whether `log_scale` trains. The authors' ViLT trains it; in their METER it stays frozen at 0.
    """

    method: ClassVar[str] = "apt"
    placement: ClassVar[str] = "apt"
    num_prompts: int = 200
    rank: int = 4
    activation: str = "relu"
    dropout: float = 0.0
    sites: tuple[str, ...] | None = None
    train_scale: bool = True
    class_token: bool = False

    def __post_init__(self):
        self.new_layer(1, device="meta")  # the layer knows which sizes are right
        _check_common(self)

    def new_layer(self, dim, **place):
        sizes = (self.num_prompts, self.rank, self.activation, self.dropout, self.train_scale)
        return APTLayer(dim, *sizes, **place)


@dataclass(frozen=True)
class DeepPromptConfig(Config):
    """Deep prompts: `num_prompts` learned rows that every attention can attend to, new ones in each block."""

    method: ClassVar[str] = "deep_prompts"
    placement: ClassVar[str] = "deep_prompts"
    num_prompts: int = 200
    sites: tuple[str, ...] | None = None
    class_token: bool = False

    def __post_init__(self):
        self.new_layer(1, device="meta")
        _check_common(self)

    def new_layer(self, dim, **place):
        return DeepPrompts(dim, self.num_prompts, **place)


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
    kind: str = "sequential"
    bottleneck: int = 96
    activation: str = "relu"
    layer_norm: bool | None = None
    scale: float | None = None
    dropout: float = 0.0
    trainable_scale: bool = False
    zero_init: bool = False
    sites: tuple[str, ...] | None = None
    class_token: bool = False

    def __post_init__(self):
        if self.kind not in ADAPTER_KINDS:
            raise ValueError(f'AdapterConfig: kind must be "sequential" or "parallel", got {self.kind!r}')
        self.new_layer(1, device="meta")
        _check_common(self)

    @property
    def placement(self):
        return f"{self.kind}_adapter"

    def new_layer(self, dim, **place):
        return AdapterLayer(dim, **_adapter_options(self), **place)


@dataclass(frozen=True)
class DASConfig(Config):
    """Dynamic architecture skipping (arXiv 2309.01479): a bypass adapter for every layer, which takes the layer's place
    while it is skipped, and adapters beside the attentions and MLPs of the layers that run.

    Both kinds are `AdapterLayer`s with LayerNorm. Which layers are skipped can change at any time
    (`SkippingAttachment.skip`); `DepthSearch` finds those that a task does not need. CLIP, LLaMA and T5 get bypasses
    only; those of LLaMA and T5 keep the first norm of the layer that they replace in place of one of their own.

    Attributes:
        bottleneck: of the adapters in the layers that run; 0 for none.
        bypass_bottleneck: of the bypasses. None stands for the sum of the adapters that the skipped layer loses (ViLT:
            2 x 96, METER: 3 x 96), or 192 where it loses none.
        skip: indices of the layers that are skipped now, in the order of `SkippingAttachment.layers`.
        permanent: whether the weights of these layers are removed from the model.
        sites: regular expressions for the layers that can be skipped; None stands for the family's. A layer of a model
            that is in no family's table must be declared `forward(self, hidden_states, ...) -> torch.Tensor`.
    """

    method: ClassVar[str] = "das"
    placement: ClassVar[str] = "bypass"
    bottleneck: int = 96
    bypass_bottleneck: int | None = None
    activation: str = "relu"
    layer_norm: bool = True
    scale: float = 1.0
    dropout: float = 0.0
    trainable_scale: bool = False
    zero_init: bool = False
    skip: tuple[int, ...] = ()
    permanent: bool = False
    sites: tuple[str, ...] | None = None
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
        _check_common(self)

    def new_layer(self, dim, **place):
        return AdapterLayer(dim, **_adapter_options(self), **place)

    def new_bypass(self, dim, lost, own_norm=False, **place):
        """Args: how many adapters the skipped layer loses, and whether it keeps a norm that the bypass reads."""
        width = self.bypass_bottleneck
        if width is None:
            width = lost * self.bottleneck or DEFAULT_BYPASS_BOTTLENECK
        options = _adapter_options(self) | {"bottleneck": width}
        if own_norm:
            options["layer_norm"] = False
        return AdapterLayer(dim, **options, **place)


@dataclass(frozen=True)
class ClassTokenConfig(Config):
    """A class token alone: a trained vector in place of the first text token of every sample.

    It takes the place of the first row of what ViLT's text embeddings, METER's text transform or, by `sites`, other
    text embeddings or linear layers give. Beside the layers of another method, `class_token=True` of that one's
    configuration does the same.
    """

    method: ClassVar[str] = "class_token"
    placement: ClassVar[str] = "class_token"
    sites: tuple[str, ...] | None = None

    def __post_init__(self):
        _check_common(self)


@dataclass(frozen=True)
class ClassifierOnlyConfig(Config):
    """Adds nothing, or a class token: only that and what `keep` names train."""

    method: ClassVar[str] = "classifier_only"
    class_token: bool = False

    def __post_init__(self):
        _check_common(self)


@dataclass(frozen=True)
class FullTuningConfig(Config):
    """Adds nothing, or a class token: everything trains."""

    method: ClassVar[str] = "full_tuning"
    trains_all: ClassVar[bool] = True
    class_token: bool = False

    def __post_init__(self):
        _check_common(self)


_ALL = (
    APTConfig,
    DeepPromptConfig,
    AdapterConfig,
    DASConfig,
    ClassTokenConfig,
    ClassifierOnlyConfig,
    FullTuningConfig,
)
CONFIGS = {config.method: config for config in _ALL}


def config_from_dict(data):
    """The inverse of `Config.to_dict`.

    Raises:
        ValueError: unknown method, unknown or missing fields, or a value that the configuration refuses.
    """
    if not isinstance(data, dict):
        raise ValueError(f"a configuration must be an object with the key 'method', got {data!r}")
    fields = dict(data)
    method = fields.pop("method", None)
    if method not in CONFIGS:
        raise ValueError(f"unknown method {method!r}; this petl_ext knows {', '.join(CONFIGS)}")
    expected = {field.name for field in dataclasses.fields(CONFIGS[method])}
    if not expected - LATER_FIELDS <= fields.keys() <= expected:
        raise ValueError(f"method {method!r}: expected the fields {sorted(expected)}, found {sorted(fields)}")
    return CONFIGS[method](**fields)


def _adapter_options(config):
    names = ("bottleneck", "activation", "layer_norm", "scale", "dropout", "trainable_scale", "zero_init")
    options = {name: getattr(config, name) for name in names}
    defaults = ADAPTER_KINDS.get(getattr(config, "kind", None), {})
    return options | {name: value for name, value in defaults.items() if options[name] is None}


def _check_common(config):
    check_switch(f"{type(config).__name__}: class_token", config.class_token)
    _check_sites(config)


def _check_sites(config):
    sites = config.sites
    if sites is None:
        return
    if not isinstance(sites, list | tuple) or not sites or not all(isinstance(site, str) for site in sites):
        raise ValueError(f"{type(config).__name__}: sites must be None or a list of regular expressions, got {sites!r}")
    for site in sites:
        try:
            re.compile(f"(.*)({site})")  # it is not matched alone: global flags inside would fail then
        except re.error as error:
            raise ValueError(f"{type(config).__name__}: {site!r} is not a regular expression: {error}") from error
    object.__setattr__(config, "sites", tuple(sites))
