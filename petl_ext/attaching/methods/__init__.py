"""The methods. Each is one file here: its configuration, what sites become for it, the layer if none of nn fits.

`CONFIGS` is made from what the files hold; nothing else lists the methods.
"""

import dataclasses
import importlib
import pkgutil

from petl_ext.attaching.methods.config import Config


def find_configs():
    """{method: its configuration's class} of all files in this folder."""
    names = [f"{__name__}.{found.name}" for found in pkgutil.iter_modules(__path__)]
    own = {name: vars(importlib.import_module(name)).values() for name in names}
    return {value.method: value for name, values in own.items() for value in values if _is_method_of(name, value)}


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
        raise ValueError(f"method must be one of {', '.join(CONFIGS)}, got {method!r}")
    expected = {field.name for field in dataclasses.fields(CONFIGS[method])}
    if not expected - CONFIGS[method].later_fields <= fields.keys() <= expected:
        raise ValueError(f"method {method!r} must have the fields {sorted(expected)}, got {sorted(fields)}")
    return CONFIGS[method](**fields)


def _is_method_of(module_name, value):
    """Whether a value of that module is the class of a method's configuration, and no import."""
    is_config = isinstance(value, type) and issubclass(value, Config) and hasattr(value, "method")
    return is_config and value.__module__ == module_name


CONFIGS = find_configs()
