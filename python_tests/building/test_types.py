"""Every public function, class and method says what it takes and gives, for editors and type checkers."""

import importlib
import inspect
import re
from pathlib import Path

import pytest

import petl_ext

PUBLIC = ["petl_ext.hf", "petl_ext.models", "petl_ext.ops", "petl_ext.peft"]
MODULES = ["petl_ext", "petl_ext.counting", *PUBLIC]


def functions_of(cls):
    """Of a class's public methods and properties, its own and those of our classes before it, (name, function)."""
    members = {name: member for parent in reversed(cls.__mro__) for name, member in vars(parent).items()}
    for name, member in members.items():
        if name.startswith("_") and name != "__init__":
            continue
        if isinstance(member, property):
            member = member.fget
        member = inspect.unwrap(getattr(member, "__func__", member))
        if inspect.isfunction(member) and member.__module__.startswith("petl_ext"):
            yield f"{cls.__name__}.{name}", member


def public_functions(module):
    for name in getattr(module, "__all__", dir(module)):
        value = getattr(module, name)
        if name.startswith("_") or not getattr(value, "__module__", "").startswith("petl_ext"):
            continue
        if inspect.isclass(value):
            yield from functions_of(value)
        elif inspect.isfunction(value):
            yield name, inspect.unwrap(value)


def untyped(name, function):
    """Names of arguments without a type, and "return"."""
    signature = inspect.signature(function)
    arguments = [p for p in signature.parameters.values() if p.name not in ("self", "cls")]
    found = [p.name for p in arguments if p.annotation is inspect.Parameter.empty]
    gives = signature.return_annotation is not inspect.Signature.empty or name.endswith("__init__")
    return found if gives else [*found, "return"]


@pytest.mark.parametrize("name", MODULES)
def test_public_names_have_types(name):
    functions = dict(public_functions(importlib.import_module(name)))
    assert functions
    overloaded = {"backend"}  # its overloads have them
    found = {
        name: missing for name, of in functions.items() if (missing := untyped(name, of)) and name not in overloaded
    }
    assert found == {}


def test_the_typed_program_uses_every_public_name():
    """Which `make lint` has mypy check."""
    program = (Path(__file__).parent / "typed_use.py").read_text(encoding="utf-8")
    names = {name for module in ("petl_ext", *PUBLIC) for name in importlib.import_module(module).__all__}
    missing = {name for name in names if not re.search(rf"\b{name}\b", program)}
    assert missing == set()


def test_type_checkers_are_told():
    assert (Path(petl_ext.__file__).parent / "py.typed").is_file()
