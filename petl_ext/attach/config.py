"""What to attach: one frozen dataclass per method, checked when it is made."""

import dataclasses
import re
from dataclasses import dataclass
from typing import ClassVar

from petl_ext.attach.deep_prompts import DeepPrompts
from petl_ext.nn import APTLayer


class Config:
    """What the methods' configurations have in common.

    Attributes:
        method: the name of the method in saved files and in the tables of families.py.
        trains_all: whether every parameter of the model trains.
        sites: which of the model's candidate sites get a layer. None stands for those of the model family's table;
            otherwise regular expressions, each of which must match the end of a site's dotted name from a dot or from
            its start: "attention.output", r"layer\\.[0-5]\\.attention\\.output".
    """

    method: ClassVar[str]
    trains_all: ClassVar[bool] = False
    sites = None

    def to_dict(self):
        return {"method": self.method, **dataclasses.asdict(self)}


@dataclass(frozen=True)
class APTConfig(Config):
    """Approximated prompt tuning: one `APTLayer` per attention, whose documentation explains the sizes."""

    method: ClassVar[str] = "apt"
    num_prompts: int = 200
    rank: int = 4
    activation: str = "relu"
    dropout: float = 0.0
    sites: tuple[str, ...] | None = None

    def __post_init__(self):
        self.new_layer(1, device="meta")  # the layer knows which sizes are right
        _check_sites(self)

    def new_layer(self, dim, **place):
        return APTLayer(dim, self.num_prompts, self.rank, self.activation, self.dropout, **place)


@dataclass(frozen=True)
class DeepPromptConfig(Config):
    """Deep prompts: `num_prompts` learned rows that every attention can attend to, new ones in each block."""

    method: ClassVar[str] = "deep_prompts"
    num_prompts: int = 200
    sites: tuple[str, ...] | None = None

    def __post_init__(self):
        self.new_layer(1, device="meta")
        _check_sites(self)

    def new_layer(self, dim, **place):
        return DeepPrompts(dim, self.num_prompts, **place)


@dataclass(frozen=True)
class ClassifierOnlyConfig(Config):
    """Adds nothing: only what `keep` names trains."""

    method: ClassVar[str] = "classifier_only"


@dataclass(frozen=True)
class FullTuningConfig(Config):
    """Adds nothing: everything trains."""

    method: ClassVar[str] = "full_tuning"
    trains_all: ClassVar[bool] = True


CONFIGS = {c.method: c for c in (APTConfig, DeepPromptConfig, ClassifierOnlyConfig, FullTuningConfig)}


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
    if fields.keys() != expected:
        raise ValueError(f"method {method!r}: expected the fields {sorted(expected)}, found {sorted(fields)}")
    return CONFIGS[method](**fields)


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
