"""The handle on what `attach` has put into a model, which knows how to take it out again.

A site's module is not wrapped or replaced: it becomes an instance of another class (site.py) and gets one more child.
So its place, its hooks and its state-dict keys stay, copies and pickles of the model carry the layers with them, and
giving it back its own class restores the backbone exactly.
"""

import dataclasses
from contextlib import contextmanager

from petl_ext.attaching.families import family_of
from petl_ext.attaching.report import Report, ReportRow
from petl_ext.attaching.saved import Saved, write_folder
from petl_ext.attaching.selection import is_part
from petl_ext.checks import check_positive_integer
from petl_ext.composing import HANDLE, become, composed
from petl_ext.counting import count_macs, count_parameters
from petl_ext.saving import fill

ADDS_NOTHING = "adds nothing to the model"


class Attachment:
    """What `attach` put into a model. Made by `attach` and `load`.

    Attributes:
        model: the model.
        config: the configuration that was attached.
        keep: the entries given to `attach`.
        sites: dotted names of the modules that carry layers.
    """

    def __init__(self, model, config, keep, kept, layers):
        self.model = model
        self.config = config
        self.keep = keep
        self._places = tuple(layers)
        self._kept = kept
        self._disabled = 0  # how many `disable` contexts are open
        self._required_grad = {
            name: parameter.requires_grad for name, parameter in model.named_parameters(remove_duplicate=False)
        }
        self._backbone_classes = {name: type(model.get_submodule(name)) for name in self.sites}
        self._install(layers)
        self._saved_names = tuple(self._tensors())
        setattr(model, HANDLE, self)

    @property
    def sites(self):
        return tuple(dict.fromkeys(place.name for place in self._places))

    def named_parameters(self):
        """(name in the model, parameter) of all that trains: the new layers' and the kept ones, each once."""
        self._check_attached()
        seen = set()
        for name, parameter in self.model.named_parameters(remove_duplicate=False):
            if parameter.requires_grad and self._owns(name) and id(parameter) not in seen:
                seen.add(id(parameter))
                yield name, parameter

    def parameters(self):
        """The parameters of `named_parameters`, as an optimiser takes them."""
        return (parameter for _, parameter in self.named_parameters())

    def report(self, tokens=None, inputs=None):
        """A `Report`: every site, its parameters, the MACs that it adds, which kernel runs there and, if none, why.

        Args:
            tokens: rows N of the sequence that the encoder sees (ViLT: text, image class token and patches), for
                which MACs follow from formulas.
            inputs: in its place, what `petl_ext.counting.count_macs` takes: the model runs, and MACs are counted.
                Models whose sites see sequences of different lengths, such as METER, CLIP, T5 and UNets, need it.

        Raises:
            ValueError: both are given, or tokens is no positive integer.
        """
        self._check_attached()
        if tokens is not None and inputs is not None:
            raise ValueError("report: give tokens or inputs, not both")
        if tokens is not None:
            check_positive_integer("report: tokens", tokens)
        if inputs is not None:
            return self._counted_report(inputs)

        def macs_of(place, layer):
            idle = self._disabled or self._idle(place)
            return None if tokens is None else 0 if idle else place.site_class.macs(layer, tokens)

        return self._report(macs_of, None if tokens is None else f"a sequence of {tokens} tokens")

    def save(self, folder):
        """Writes the new layers and the kept modules, nothing else of the model, and how to attach them.

        The folder is complete or, after an error, as it was. With several processes, call it in one; where
        `fully_shard` has spread the parameters over them, call it in all: they gather the tensors, the first writes.
        The model's own `save_pretrained` would write the layers too, but `from_pretrained` would leave them out: use
        `load`.

        Raises:
            RuntimeError: a layer or a kept module has been replaced or wrapped since `attach`, and its parameters have
                other names.
        """
        self._check_attached()
        tensors = self._tensors()
        gone = [name for name in self._saved_names if name not in tensors]
        if gone:
            raise RuntimeError(
                f"save: {len(gone)} tensors are gone from {type(self.model).__name__}, such as {gone[0]}; "
                "a module there has been replaced or wrapped since attach"
            )
        write_folder(folder, Saved(self.config, family_of(self.model), self.keep, tensors))

    def freeze(self):
        """For serving: weights that are derived from parameters, such as APT's keys, are made once.

        `report` shows where. Undone by `thaw`, by training mode, and by whatever `APTLayer.freeze` says; new layers
        that derive nothing, such as adapters, stay as they are.

        Raises:
            RuntimeError: the model is in training mode.
        """
        for layer in self._layers_that_freeze():
            layer.freeze()

    def thaw(self):
        """Undoes `freeze`."""
        for layer in self._layers_that_freeze():
            layer.thaw()

    @contextmanager
    def disable(self):
        """Inside the `with`, the model computes what it would without the new layers, bit for bit.

        Kept modules keep what they have learned. Parameters, their names and requires_grad stay as they are.
        """
        self._check_attached()
        self._leave_sites()
        self._disabled += 1
        try:
            yield self
        finally:
            self._disabled -= 1
            if self._is_attached() and not self._disabled:
                self._enter_sites()

    def detach(self):
        """Takes the new layers out for good and gives every parameter the requires_grad that it had before `attach`.

        Kept modules keep what they have learned.
        """
        self._check_attached()
        self._restore()
        delattr(self.model, HANDLE)

    def __repr__(self):
        return f"Attachment({self.config} on {type(self.model).__name__}, {len(self.sites)} sites, keep={self.keep})"

    def _layers_that_freeze(self):
        self._check_attached()
        layers = [self.model.get_submodule(place.layer_name) for place in self._places]
        return [layer for layer in layers if hasattr(layer, "freeze")]

    def _install(self, layers):
        self.model.requires_grad_(False)
        for name, parameter in self.model.named_parameters(remove_duplicate=False):
            if name in self._kept:
                parameter.requires_grad_(True)
        self._put_in(layers)
        self._enter_sites()

    def _put_in(self, layers):
        for place, layer in layers.items():
            module = self.model.get_submodule(place.name)
            module.add_module(place.site_class.child, layer.train(module.training))

    def _extend(self, config, layers):
        """Adds the layers that `config` has beyond those that are attached."""
        self._leave_sites()
        self.config = config
        self._places += tuple(layers)
        new_sites = {place.name: type(self.model.get_submodule(place.name)) for place in layers}
        self._backbone_classes = new_sites | self._backbone_classes
        self._put_in(layers)
        if not self._disabled:
            self._enter_sites()
        self._saved_names = tuple(self._tensors())

    def _freeze_scales(self):
        """Makes `train_scale` False in the configuration and in the layers."""
        self.config = dataclasses.replace(self.config, train_scale=False)
        for place in self._places:
            layer = self.model.get_submodule(place.layer_name)
            if hasattr(layer, "log_scale"):
                layer.log_scale.requires_grad_(False)

    def _restore(self):
        self._leave_sites()
        for place in self._places:
            self.model.get_submodule(place.name)._modules.pop(place.site_class.child, None)
        for name, parameter in self.model.named_parameters(remove_duplicate=False):
            parameter.requires_grad_(self._required_grad.get(name, parameter.requires_grad))

    def _enter_sites(self):
        for module, attached, backbone in self._site_modules():
            become(module, attached, (attached, backbone))

    def _leave_sites(self):
        for module, attached, backbone in self._site_modules():
            become(module, backbone, (attached, backbone))

    def _site_modules(self):
        """(the site's module, its class with the layers, its class without) of every site."""
        found = [(self.model.get_submodule(name), *self._classes(name)) for name in self.sites]
        for name, (module, *classes) in zip(self.sites, found, strict=True):
            if not isinstance(module, tuple(classes)):
                raise RuntimeError(f"{name}, which carries layers, has been replaced by a {type(module).__name__}")
        return found

    def _classes(self, name):
        """What the site's module is with the layers and without."""
        site_classes = tuple(place.site_class for place in self._places if place.name == name)
        return composed(self._backbone_classes[name], site_classes), self._backbone_classes[name]

    def _is_attached(self):
        return getattr(self.model, HANDLE, None) is self

    def _check_attached(self):
        if not self._is_attached():
            raise RuntimeError(f"{self.config} has been detached from {type(self.model).__name__}")

    def _owns(self, name):
        return name in self._kept or any(name.startswith(f"{place.layer_name}.") for place in self._places)

    def _tensors(self):
        """What is saved, by state-dict name: new layers and kept modules, buffers too."""
        return {name: tensor for name, tensor in self.model.state_dict().items() if self._owns(name)}

    def _counted_report(self, inputs):
        attached, backbone = count_macs(self.model, inputs), self._count_backbone(inputs)

        def macs_of(place, _):
            return place.site_class.counted_macs(place, attached, backbone)

        totals = {"all_macs": attached.total, "backbone_macs": None if backbone is None else backbone.total}
        return self._report(macs_of, "these inputs", **totals, layer_costs=self._count_layers(inputs, backbone))

    def _report(self, macs_of, counted_for, **counted):
        rows = [self._site_row(place, macs_of) for place in self._places]
        rows += [self._kept_row(entry) for entry in self.keep]
        trained, total = count_parameters(self.model)
        if self.config.trains_all:
            rows = [ReportRow("the whole model", "its own", trained, 0, "none", ADDS_NOTHING)]
        title = f"{self.config} on {type(self.model).__name__}"
        return Report(title, rows, trained, total, counted_for, **counted)

    def _site_row(self, place, macs_of):
        layer = self.model.get_submodule(place.layer_name)
        idle = "disabled" if self._disabled else self._idle(place)
        kernel, reason = ("none", idle) if idle else place.site_class.kernel(layer)
        if getattr(layer, "is_frozen", False):
            kernel = f"{kernel}, frozen"
        size = sum(parameter.numel() for parameter in layer.parameters() if parameter.requires_grad)
        return ReportRow(place.layer_name, type(layer).__name__, size, macs_of(place, layer), kernel, reason)

    def _count_backbone(self, inputs):
        with self.disable():
            return count_macs(self.model, inputs)

    def _count_layers(self, inputs, backbone):
        """The `LayerCosts`, where layers can be skipped."""
        return None

    def _idle(self, place):
        """Why the layer does not run, or an empty string."""
        return ""

    def _kept_row(self, entry):
        size = sum(parameter.numel() for name, parameter in self.named_parameters() if is_part(entry, name))
        return ReportRow(entry, "kept", size, 0, "none", ADDS_NOTHING)

    def _take_over(self, saved, folder):
        """Fills what is attached from a folder of the same configuration."""
        self._check_same(saved, folder)
        self._fill(saved.tensors, folder)

    def _check_same(self, saved, folder):
        for what, ours, theirs in (("config", self.config, saved.config), ("keep", self.keep, saved.keep)):
            if ours != theirs:
                raise ValueError(f"{folder}: expected the {what} that is attached, {ours}, found {theirs}")

    def _fill(self, tensors, folder):
        fill(self._tensors(), tensors, folder)
        self.thaw()
