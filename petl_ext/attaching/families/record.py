"""What is known of a family of models: one record."""

import re
from dataclasses import dataclass, field

from petl_ext.attaching.methods.das import DeclaredTensorLayer

WHOLE = ".*"  # the tower that is the whole model


@dataclass(frozen=True)
class Family:
    """A model family.

    Attributes:
        name: a Hugging Face `config.model_type`, or the name of a class of models without one, with the package in
            front where others name theirs alike ("timm.VisionTransformer"); None for `NO_FAMILY`.
        sites: {method: where it goes}, the method being the `row` of its configuration. Regular expressions over the
            dotted names of the method's candidate sites, matched from a dot or from the start to the end of the name;
            several stand in a tuple in the order in which their sites are numbered. DAS has two rows: "bypass" for the
            layers that can be skipped, "das_adapter" for the adapters in them. None: the sites of the families of the
            models that stand in the towers.
        skippable: what a layer becomes that can be skipped, or several such classes, of which the last that fits a
            layer is its. The default takes those that are declared to return one tensor; `SkippableLayer` trusts that
            they do; where they return more, it is a subclass of that.
        towers: {tower: regular expression of the dotted name of the module or modules that it is}, the tower being one
            of `petl_ext.attaching.methods.config.TOWERS`; `WHOLE` where it is the whole model.
        limits: {method or tower: why there is no place for it}, for error messages, reports and the table of models.
            A method that has sites is said here not to go everywhere.
        unused: dotted names of layers whose output the model does not use, as the last of a vision tower whose features
            are taken before it; found in a model, not written into a record.
    """

    name: str | None
    sites: dict | None = None
    skippable: type | tuple = DeclaredTensorLayer
    towers: dict = field(default_factory=dict)
    limits: dict = field(default_factory=dict)
    unused: tuple = ()

    @property
    def skippables(self):
        return self.skippable if isinstance(self.skippable, tuple) else (self.skippable,)

    def patterns(self, method):
        """The regular expressions of a method, none where the family has no sites for it."""
        found = (self.sites or {}).get(method, ())
        return (found,) if isinstance(found, str) else tuple(found)

    def takes(self, method):
        """Whether the family has sites for a method."""
        return bool(self.patterns(method))

    def tower_of(self, name):
        """The tower that the module of this dotted name stands in, or None."""
        return next((tower for tower, pattern in self.towers.items() if _stands_in(pattern, name)), None)

    def uses(self, name):
        """Whether the model uses what the module of this dotted name computes."""
        return not any(f"{name}.".startswith(f"{layer}.") for layer in self.unused)


def _stands_in(pattern, name):
    return re.match(rf"(.*\.)?({pattern})(\.|$)", name) is not None
