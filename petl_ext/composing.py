"""A module becomes an instance of a composed class, and is given its own class back.

The composed class is a subclass of the module's own, in which one class per addition comes first (`composed`). So its
children, hooks and state-dict keys stay, `isinstance` goes on finding it, and giving it back its own class takes the
additions out again.
"""

import copyreg
import functools
import types
from contextlib import contextmanager

from torch import nn

HANDLE = "petl_attachment"  # where a model keeps what is attached to it


class Composable(nn.Module):
    """Comes before a module's own class in a class made by `composed`, and lets it be copied and pickled."""

    def __reduce_ex__(self, protocol):
        _, _, *state = super().__reduce_ex__(protocol)
        *added, own = type(self).__bases__
        return (_new, (own, tuple(added)), *state)


@functools.cache
def composed(backbone, sites):
    """The class of a module of the class `backbone` that has become each of the classes `sites`, the first outermost.

    It keeps the backbone's name, by which other libraries know a layer (FSDP's wrapping policy, device maps).
    """
    return type(backbone.__name__, (*sites, backbone), {})


def become(module, its_class, others):
    """Gives `module`, whose class is one of `others` or derived from one, the class `its_class`.

    What other libraries have derived at run time stays on top: `fully_shard` makes of a module's class one of its own.
    """
    other = next(other for other in others if isinstance(module, other))
    module.__class__ = _replaced(type(module), other, its_class)
    # Code that torch 2.10 has compiled looks at a module again only where its attributes were touched.
    vars(module)["petl_touched"] = True
    del vars(module)["petl_touched"]
    if has_device_hook(module):
        # It calls what forward was when the hook came.
        module._old_forward = types.MethodType(type(module).forward, module)


def has_device_hook(module):
    """Whether accelerate moves the module's inputs, as it does for a model with a device_map."""
    return "_hf_hook" in vars(module)


def has_foreign_forward(module):
    """Whether another library has given this one module a forward, which would hide that of a composed class."""
    return "forward" in vars(module) and not has_device_hook(module)


@contextmanager
def unchanged_on_error(model):
    """Puts back all modules' classes, attributes and children, requires_grad and what is attached.

    What tensors hold is not kept.
    """
    handles = [vars(module)[HANDLE] for module in model.modules() if HANDLE in vars(module)]
    attached = [(handle, dict(vars(handle))) for handle in handles]
    modules = [
        (module, type(module), dict(vars(module)), [(v, dict(v)) for v in vars(module).values() if type(v) is dict])
        for module in model.modules()
    ]
    required_grad = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield
    except BaseException:
        for handle, attributes in attached:
            _refill(vars(handle), attributes)
        for module, its_class, attributes, tables in modules:
            module.__class__ = its_class
            _refill(vars(module), attributes)
            for table, entries in tables:
                _refill(table, entries)
        for parameter, required in required_grad:
            parameter.requires_grad_(required)
        raise


def _replaced(its_class, old, new):
    if its_class is old:
        return new
    bases = tuple(_replaced(base, old, new) if issubclass(base, old) else base for base in its_class.__bases__)
    return _with_bases(its_class, bases)


@functools.cache
def _with_bases(its_class, bases):
    own = {name: value for name, value in vars(its_class).items() if name not in ("__dict__", "__weakref__")}
    # transformers wraps the forward that a new subclass of a layer inherits; of this one it will do so again.
    wrapped = getattr(own.get("forward"), "__wrapped__", None)
    if wrapped and any(wrapped is vars(base).get("forward") for base in its_class.__mro__[1:]):
        del own["forward"]
    return type(its_class.__name__, bases, own)


def _new(backbone, sites):
    """What unpickling and copying start from: classes made at run time have no name to be found by."""
    return copyreg.__newobj__(composed(backbone, sites))


def _refill(table, entries):
    table.clear()
    table.update(entries)
