"""What the configurations of all methods have in common."""

import dataclasses
from collections.abc import Iterable
from typing import Any, ClassVar

from torch import nn

from petl_ext.attaching.patterns import check_patterns
from petl_ext.attaching.sites.site import Place, Site
from petl_ext.checks import check_switch

# What a family may call the parts of its models.
TOWERS = ("vision", "language", "fusion", "text", "encoder", "decoder")


class Config:
    """What to attach: a frozen dataclass per method, checked when it is made.

    Attributes:
        method: the name of the method in saved files.
        row: the method's row in the families' tables of sites, which names the kind too where a method has several;
            None for a method that adds nothing to the model.
        site_classes: {row: what modules can become there}; a pattern of that row may match candidates of several.
        trains_all: whether every parameter of the model trains.
        later_fields: those that folders saved by older versions lack; their defaults hold there.
        sites: which of the model's candidate sites get a layer. None stands for those of the model family's record;
            "vision", or several in a list, for those in the family's towers of these names, which are `TOWERS`.
            Other entries are regular expressions, each of which must match the end of a site's dotted name from a dot
            or from its start: "attention.output", r"layer\\.[0-5]\\.attention\\.output"; of a UNet only the
            cross-attentions, "attn2". So they also say where in a model of no known family.
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

    def site_classes_in(self, family: Any) -> tuple[type[Site], ...]:
        """What modules of a `Family` can become at the sites of this configuration."""
        return self.site_classes[self.row]

    def with_inner_places(self, places: Iterable[Place], model: nn.Module, family: Any) -> list[Place]:
        """The places that were found for `row`, and those that follow from them: a joint attention's second stream."""
        return [inner for place in places for inner in (place, *_second_streams(place, model))]

    def to_dict(self) -> dict[str, Any]:
        return {"method": self.method, **dataclasses.asdict(self)}

    def _check_sites(self):
        sites, name = self.sites, type(self).__name__
        if sites is None:
            return
        entries = (sites,) if sites in TOWERS else sites
        if not isinstance(entries, list | tuple) or not entries or not all(isinstance(entry, str) for entry in entries):
            raise ValueError(
                f"{name}: sites must be None, one of the towers {', '.join(TOWERS)}, or a list of towers and regular "
                f"expressions, got {sites!r}"
            )
        check_patterns(name, entries)
        object.__setattr__(self, "sites", tuple(entries))


def _second_streams(place, model):
    second = getattr(place.site_class, "second_stream", None)
    if second is not None and second.stands_in(model.get_submodule(place.name)):
        yield Place(place.name, second)
