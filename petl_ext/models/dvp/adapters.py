"""The adapters of DVP_adp: behind modules of a language model, by forward hooks that read the layer from the module.

So the backbone's state-dict keys stay, and copies and pickles of the model carry the layers with them.
"""

import re
from typing import NamedTuple

from petl_ext.nn import AdapterLayer

CHILD = "adapter"


class AdapterPlan(NamedTuple):
    """Where a family's adapters go and what they are.

    Attributes:
        places: regular expression over the dotted names of modules, whose output, or its first part, is adapted.
        reduction: how many times narrower than the model they are in the authors' code.
        activation: the `AdapterLayer`'s.
        initialise: what fills `down` and `up`.
    """

    places: str
    reduction: int
    activation: str
    initialise: object

    def default_bottleneck(self, dim):
        return max(1, dim // self.reduction)

    def new_layer(self, dim, bottleneck, **place):
        layer = AdapterLayer(dim, bottleneck, self.activation, **place)
        for weight in (layer.down, layer.up):
            self.initialise(weight)
        return layer


def adapter_places(model, plan):
    """{dotted name: module} of what the plan names.

    Raises:
        ValueError: one of them carries an adapter already.
    """
    found = {name: module for name, module in model.named_modules() if re.fullmatch(plan.places, name)}
    for name, module in found.items():
        if hasattr(module, CHILD):
            raise ValueError(f"{name} of {type(model).__name__} already has a child {CHILD!r}: use a fresh model")
    return found


def add_adapters(modules, new_layer):
    """Gives each module an adapter."""
    for module in modules:
        module.add_module(CHILD, new_layer())
        module.register_forward_hook(_adapted)


def replace_adapters(model, new_layer):
    """Other adapters in place of all that `add_adapters` has put into the model."""
    for module in list(model.modules()):
        if _hooks_of(module):
            setattr(module, CHILD, new_layer().train(module.training))


def remove_adapters(model):
    """Takes out all that `add_adapters` has put into the model."""
    for module in list(model.modules()):
        for key in _hooks_of(module):
            del module._forward_hooks[key]
            delattr(module, CHILD)


def _hooks_of(module):
    """The keys of the hooks by which the module has an adapter."""
    return [key for key, hook in module._forward_hooks.items() if hook is _adapted]


def _adapted(module, arguments, output):
    layer = getattr(module, CHILD)
    return (layer(output[0]), *output[1:]) if isinstance(output, tuple) else layer(output)
