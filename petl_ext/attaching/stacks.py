"""The lists of layers in a model of which some can be skipped, and which of them run at the moment."""

from petl_ext.attaching.methods.das import SkippableLayer


class Stacks:
    """All lists of layers that hold layers which can be skipped.

    Args:
        model: the model.
        site_classes: {dotted name: what it becomes} of the layers that can be skipped.
    """

    def __init__(self, model, site_classes):
        self._model = model
        self._rewire = {name.rpartition(".")[0]: site_class.rewire for name, site_class in site_classes.items()}
        self._known = dict.fromkeys(self._rewire)

    def switch(self, skipped):
        """Makes the layers of these dotted names, and no others, the ones that are skipped."""
        for name in self._known:
            layers = self._layers_of(name)
            for layer_name, layer in layers.items():
                if isinstance(layer, SkippableLayer) and layer.skipped != (layer_name in skipped):
                    layer.skipped = layer_name in skipped
            self._rewire[name](tuple(layers.values()), *self._numbers_and_slot_types(name, layers))

    def check_decodes(self, skipped):
        """Raises a ValueError if a cache of several types of slots would have none left of one."""
        for name in self._known:
            layers = self._layers_of(name)
            numbered, slot_types = self._numbers_and_slot_types(name, layers)
            running = {slot_type for layer, slot_type in zip(layers, slot_types, strict=True) if layer not in skipped}
            lacking = sorted(map(str, set(slot_types) - running))
            if lacking and len(set(slot_types)) > 1 and any(numbered):
                raise ValueError(
                    f"skip: no layer of {name} that is {lacking[0]} would run, from which the model's cache takes its "
                    "length; keep one of them"
                )

    def _layers_of(self, stack):
        """{dotted name: layer}."""
        children = self._model.get_submodule(stack).named_children()
        return {f"{stack}.{child}".lstrip("."): layer for child, layer in children}

    def _numbers_and_slot_types(self, name, layers):
        """For each layer of a stack its modules that know the layer's number, and the type of its slot.

        Looked for only when the stack has other layers than before: a search switches at every step, and the walk over
        all modules takes longer than the rest of it.
        """
        layers = tuple(layers.values())
        if self._known[name] is None or self._known[name][0] != layers:
            self._known[name] = layers, [numbered_modules(layer) for layer in layers], slot_types_of(layers)
        return self._known[name][1:]


def numbered_modules(layer):
    """The modules of a layer that know its number in the stack."""
    return [module for module in layer.modules() if vars(module).get("layer_idx") is not None]


def slot_types_of(stack):
    """For each layer of a stack the type of its slot in the model's cache, such as "sliding_attention"; None for all
    where the configuration names none."""
    configs = (vars(module).get("config") for layer in stack for module in layer.modules())
    named = (getattr(config, "layer_types", None) for config in configs)
    slot_types = next(filter(None, named), ())
    return tuple(slot_types) if len(slot_types) == len(stack) else (None,) * len(stack)
