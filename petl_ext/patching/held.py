"""What a module and its parts hold, down to the contents of lists, dictionaries and plain objects."""

import types
from collections import deque

import torch
from torch import nn

_TABLES = ("_parameters", "_buffers", "_modules")
# Accelerate's hook, which moves inputs and notes where they came from, and what `patch` itself has found out.
_NO_PART = ("_hf_hook", "petl_settings")
_SEQUENCES = (list, tuple, deque)
_VALUES = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device)
_METHODS = (types.FunctionType, property, staticmethod, classmethod)
_SHARED_BY_COPIES = (type, types.FunctionType, types.BuiltinFunctionType, types.ModuleType)


def held(module):
    """{name: value} of a module, "" of itself: ".down.weight", ".records[0]", ".calls". Attributes of its class and of
    those of its parts count as theirs. What is held twice appears under one of its names."""
    found, met, waiting = {}, set(), [("", module)]
    for name, value in waiting:
        found[name] = value
        if id(value) not in met:
            met.add(id(value))
            waiting += [(name + step, content) for step, content in _contents(value)]
    return found


def snapshot(module):
    """What `changed` compares a module with later."""
    return {name: (value, _copied(value)) for name, value in held(module).items()}


def changed(before, module):
    """The name of something in `module` that is no longer as in the snapshot `before`; "" where all is."""
    now = held(module)
    for name in dict.fromkeys((*now, *before)):
        if name not in now or name not in before or not _is_as_before(now[name], *before[name]):
            return name.lstrip(".")
    return ""


def structure(module):
    """Equal for two modules that differ in the values of their parameters and buffers alone; None where that cannot be
    told."""
    weights = {id(tensor) for tensor in (*module.parameters(), *module.buffers())}
    first, described = {}, []
    for name, value in held(module).items():
        if isinstance(value, _VALUES):
            described.append((name, type(value), value))
        elif id(value) in weights:
            described.append((name, first.setdefault(id(value), name), value.shape, value.dtype))
        elif isinstance(value, set):
            described.append((name, set, frozenset(value)))
        elif _is_open(value):
            described.append((name, first.setdefault(id(value), name), type(value)))
        elif type(value).__hash__ is object.__hash__:
            described.append((name, value))
        else:
            return None
    return tuple(described)


def _contents(value):
    """[(what leads to it: ".name" or "[key]", it), ...]"""
    if isinstance(value, nn.Module):
        attributes = _attributes(value)
        tables = [attributes.pop(table) for table in _TABLES]
        named = [*attributes.items(), *(entry for table in tables for entry in table.items())]
        return [(f".{name}", content) for name, content in named if name not in _NO_PART]
    if isinstance(value, _SEQUENCES):
        return [(f"[{index}]", content) for index, content in enumerate(value)]
    if isinstance(value, dict):
        return [(f"[{key!r}]", content) for key, content in value.items()]
    return [(f".{name}", content) for name, content in vars(value).items()] if _is_open(value) else []


def _attributes(module):
    """{name: value} of the module's own attributes and of those of its classes that are no methods."""
    classes = type(module).__mro__[: type(module).__mro__.index(nn.Module)]
    of_classes = [entry for its_class in reversed(classes) for entry in vars(its_class).items()]
    found = {name: value for name, value in of_classes if not name.startswith("__") and not isinstance(value, _METHODS)}
    return found | vars(module)


def _is_open(value):
    """Whether it is made of contents that can be looked at, and that a copy does not share."""
    if isinstance(value, (nn.Module, *_SEQUENCES, dict)):
        return True
    its_class = type(value)
    return (
        hasattr(value, "__dict__")
        and not isinstance(value, _SHARED_BY_COPIES)
        and (its_class.__reduce_ex__, its_class.__reduce__) == (object.__reduce_ex__, object.__reduce__)
        and not hasattr(its_class, "__deepcopy__")
    )


def _copied(value):
    if isinstance(value, torch.Tensor):
        return None if value.is_meta else value.detach().clone()
    return set(value) if isinstance(value, set) else None


def _is_as_before(value, before, copied):
    """Of one attribute; what it contains has names of its own."""
    if isinstance(value, (tuple, *_VALUES)) and value is not before:
        return type(value) is type(before) and (isinstance(value, tuple) or value == before)
    if value is not before:
        return False
    if isinstance(value, torch.Tensor):
        return copied is None or same_values(value, copied)
    return copied is None or value == copied


def same_values(tensor, other):
    """Whether they are equal, NaN to NaN."""
    if tensor.shape != other.shape or tensor.dtype != other.dtype:
        return False
    if torch.equal(tensor, other):
        return True
    return tensor.is_floating_point() and torch.allclose(tensor, other, rtol=0, atol=0, equal_nan=True)
