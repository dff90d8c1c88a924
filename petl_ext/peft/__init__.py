"""Approximated prompt tuning and bottleneck adapters as methods of PEFT, which importing this package registers.

    import petl_ext.peft
    model = get_peft_model(model, petl_ext.peft.APTConfig(modules_to_save=["classifier"]))

From there on PEFT does what it does for its own methods: several adapters, saving, loading, disabling, unloading, and
transformers' and diffusers' `add_adapter`. A saved adapter needs this import before it is loaded, otherwise PEFT raises
KeyError: 'PETL_APT' or 'PETL_ADAPTER'.
"""

try:
    import peft  # noqa: F401
except ModuleNotFoundError as error:
    if error.name != "peft":
        raise
    raise ImportError("petl_ext.peft needs peft: pip install peft") from error

from petl_ext.peft.config import AdapterConfig, APTConfig
from petl_ext.peft.layer import AdapterTunerLayer, APTTunerLayer
from petl_ext.peft.model import AdapterModel, APTModel
from petl_ext.peft.register import register_methods
from petl_ext.peft.saving import load_adapter, save_adapter

__all__ = [
    "APTConfig",
    "APTModel",
    "APTTunerLayer",
    "AdapterConfig",
    "AdapterModel",
    "AdapterTunerLayer",
    "load_adapter",
    "save_adapter",
]

register_methods()
