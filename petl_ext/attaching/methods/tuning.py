"""The methods that add nothing to the model but, on request, a class token: what they are compared with."""

from dataclasses import dataclass
from typing import ClassVar

from petl_ext.attaching.methods.config import Config


@dataclass(frozen=True)
class ClassifierOnlyConfig(Config):
    """Adds nothing, or a class token: only that and what `keep` names train."""

    method: ClassVar[str] = "classifier_only"
    class_token: bool = False


@dataclass(frozen=True)
class FullTuningConfig(Config):
    """Adds nothing, or a class token: everything trains."""

    method: ClassVar[str] = "full_tuning"
    trains_all: ClassVar[bool] = True
    class_token: bool = False
