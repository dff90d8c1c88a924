"""Adds our methods to those of PEFT."""

import peft
from packaging.version import Version
from peft import PeftType
from peft.utils import register_peft_method

from petl_ext.peft.config import AdapterConfig, APTConfig
from petl_ext.peft.model import AdapterModel, APTModel

OLDEST_PEFT = "0.19"


METHODS = ((APTConfig, APTModel), (AdapterConfig, AdapterModel))


def register_methods():
    """Adds them to PEFT, whose methods are an enumeration that was not made to be extended.

    Raises:
        ImportError: this PEFT is too old, or keeps its methods differently.
    """
    if Version(peft.__version__) < Version(OLDEST_PEFT):
        raise ImportError(f"petl_ext.peft needs peft {OLDEST_PEFT} or later, got {peft.__version__}")
    for config_class, model_class in METHODS:
        try:
            _add_member(config_class.method.upper())
            register_peft_method(name=config_class.method, config_cls=config_class, model_cls=model_class)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ImportError(
                f"petl_ext.peft cannot add its methods to peft {peft.__version__}, which keeps its methods differently "
                f"from those that it was tested with, 0.19.1 and 0.21.2: {error}"
            ) from error


def _add_member(name):
    if name in PeftType.__members__:
        return
    member = str.__new__(PeftType, name)
    member._name_ = member._value_ = name
    type.__setattr__(PeftType, name, member)
    PeftType._member_names_.append(name)
    PeftType._member_map_[name] = member
    PeftType._value2member_map_[name] = member
