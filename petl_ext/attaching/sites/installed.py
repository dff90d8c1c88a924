"""Puts new layers into a model and takes them out again.

A site's module is not wrapped or replaced: it becomes an instance of another class (composing.py) and gets one more
child. So its place, its hooks and its state-dict keys stay, copies and pickles of the model carry the layers with them,
and giving it back its own class restores the backbone exactly.
"""

import dataclasses
from dataclasses import dataclass

from torch import nn

from petl_ext.composing import become, composed


@dataclass(frozen=True)
class Installed:
    """The new layers that a model holds.

    Attributes:
        model: the model.
        places: a tuple of `Place`.
        backbone_classes: {dotted name of a site's module: its class without the layers}.
    """

    model: nn.Module
    places: tuple = ()
    backbone_classes: dict = dataclasses.field(default_factory=dict)

    @property
    def sites(self):
        """Dotted names of the modules that carry layers."""
        return tuple(dict.fromkeys(place.name for place in self.places))

    @property
    def layers(self):
        return [self.model.get_submodule(place.layer_name) for place in self.places]

    def holds(self, name):
        """Whether a dotted name lies in one of the layers."""
        return any(name.startswith(f"{place.layer_name}.") for place in self.places)

    def plus(self, layers):
        """With further layers, {place: layer}, which are put into the model; its sites must have been left."""
        for place, layer in layers.items():
            module = self.model.get_submodule(place.name)
            module.add_module(place.site_class.child, layer.train(module.training))
        classes = {place.name: type(self.model.get_submodule(place.name)) for place in layers}
        return Installed(self.model, (*self.places, *layers), classes | self.backbone_classes)

    def minus(self, places):
        """Without the layers at these places, which are taken out of the model; its sites must have been left."""
        for place in places:
            self.model.get_submodule(place.name)._modules.pop(place.site_class.child, None)
        return dataclasses.replace(self, places=tuple(place for place in self.places if place not in places))

    def enter(self):
        """Makes the sites' modules what they become with the layers."""
        for module, attached, backbone in self._modules():
            become(module, attached, (attached, backbone))

    def leave(self):
        """Gives the sites' modules back their own classes; the layers stay where they are, unused."""
        for module, attached, backbone in self._modules():
            become(module, backbone, (attached, backbone))

    def _modules(self):
        """(the site's module, its class with the layers, its class without) of every site.

        Raises:
            RuntimeError: the module is another one than when the layers came.
        """
        found = [(self.model.get_submodule(name), *self._classes(name)) for name in self.sites]
        for name, (module, *classes) in zip(self.sites, found, strict=True):
            if not isinstance(module, tuple(classes)):
                raise RuntimeError(f"{name}, which carries layers, has been replaced by a {type(module).__name__}")
        return found

    def _classes(self, name):
        """What the site's module is with the layers and without."""
        site_classes = tuple(place.site_class for place in self.places if place.name == name)
        return composed(self.backbone_classes[name], site_classes), self.backbone_classes[name]
