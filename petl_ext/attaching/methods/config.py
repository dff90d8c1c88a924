"""What the configurations of all methods have in common."""

import dataclasses
from typing import ClassVar

from petl_ext.attaching.patterns import check_patterns
from petl_ext.checks import check_switch


class Config:
    """What to attach: a frozen dataclass per method, checked when it is made.

    Attributes:
        method: the name of the method in saved files.
        row: the method's row in the families' tables of sites, which names the kind too where a method has several;
            None for a method that adds nothing to the model.
        site_classes: {row: what modules can become there}; a pattern of that row may match candidates of several.
        trains_all: whether every parameter of the model trains.
        later_fields: those that folders saved by older versions lack; their defaults hold there.
        sites: which of the model's candidate sites get a layer. None stands for those of the model family's table;
            otherwise regular expressions, each of which must match the end of a site's dotted name from a dot or from
            its start: "attention.output", r"layer\\.[0-5]\\.attention\\.output"; of CLIP's two towers only the one that
            sees, r"vision_model\\..*self_attn"; of a UNet only the cross-attentions, "attn2". So they also say where
            in a model of no known family.
        class_token: whether the method trains a class token too, which `ClassTokenConfig` explains, as the authors'
            APT, its baselines and DAS's METER do; ViLT and METER only.
    """

    method: ClassVar[str]
    row: ClassVar[str | None] = None
    site_classes: ClassVar[dict] = {}
    trains_all: ClassVar[bool] = False
    later_fields: ClassVar[frozenset] = frozenset({"class_token"})
    sites = None
    class_token = False

    def __post_init__(self):
        check_switch(f"{type(self).__name__}: class_token", self.class_token)
        self._check_sites()

    def site_classes_in(self, family):
        """What modules of a `Family` can become at the sites of this configuration."""
        return self.site_classes[self.row]

    def with_inner_places(self, places, model, family):
        """The places that were found for `row`, and those that follow from them."""
        return places

    def to_dict(self):
        return {"method": self.method, **dataclasses.asdict(self)}

    def _check_sites(self):
        sites, name = self.sites, type(self).__name__
        if sites is None:
            return
        if not isinstance(sites, list | tuple) or not sites or not all(isinstance(site, str) for site in sites):
            raise ValueError(f"{name}: sites must be None or a list of regular expressions, got {sites!r}")
        check_patterns(name, sites)
        object.__setattr__(self, "sites", tuple(sites))
