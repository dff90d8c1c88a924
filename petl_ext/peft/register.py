"""Adds approximated prompt tuning to the methods of PEFT."""

import peft
from packaging.version import Version
from peft import PeftType
from peft.utils import register_peft_method

from petl_ext.peft.config import METHOD, PEFT_TYPE, APTConfig
from petl_ext.peft.model import APTModel

OLDEST_PEFT = "0.19"


def register_method():
    """Adds the method to PEFT, whose methods are an enumeration that was not made to be extended.

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
