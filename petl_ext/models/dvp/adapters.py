"""The adapters of DVP_adp, behind modules of a language model."""

from typing import NamedTuple

from petl_ext.attaching.patterns import matches
from petl_ext.attaching.sites.installed import Installed
from petl_ext.attaching.sites.site import Place
from petl_ext.composing import Composable
from petl_ext.nn import AdapterLayer


class AdapterPlan(NamedTuple):
    """Where the adapters of a type of language model go and what they are.

    Attributes:
        sites: regular expression over the dotted names of modules, whose output, or its first part, is adapted.
        reduction: how many times narrower than the model they are in the authors' code.
        activation: the `AdapterLayer`'s.
        initialize: what fills `down` and `up`.
    """

    sites: str
    reduction: int
    activation: str
    initialize: object

    def default_bottleneck(self, dim):
        return max(1, dim // self.reduction)

    def new_layer(self, dim, bottleneck, **factory):
        layer = AdapterLayer(dim, bottleneck, self.activation, **factory)
        for weight in (layer.down, layer.up):
            self.initialize(weight)
        return layer


class AdaptedOutput(Composable):
    """What a module becomes to get the child `adapter` behind its output [..., D], or behind the first part of a tuple.

    Not a `Site`: those are of what `attach` has put in, and it puts nothing into a model that carries some. These stay
    for good, and it may put other layers beside them.
    """

    child = "adapter"

    def forward(self, hidden_states, *arguments, **named):
        output = super().forward(hidden_states, *arguments, **named)
        if isinstance(output, tuple):
            return self.adapter(output[0]), *output[1:]
        return self.adapter(output)


def add_adapters(model, plan, new_layer):
    """Puts an adapter behind each module that the plan names.

    Raises:
        ValueError: one of them carries an adapter already. The model has not changed.
    """
    places = [Place(name, AdaptedOutput) for name, _ in model.named_modules() if matches(plan.sites, name)]
    for place in places:
        if hasattr(model.get_submodule(place.name), place.site_class.child):
            raise ValueError(
                f"{place.name} of {type(model).__name__} already has a child {place.site_class.child!r}: "
                "use a fresh model"
            )
    Installed(model).plus({place: new_layer() for place in places}).enter()


def replace_adapters(model, new_layer):
    """Other adapters in place of all that `add_adapters` has put into the model."""
    for module in list(model.modules()):
        if isinstance(module, AdaptedOutput):
            module.adapter = new_layer().train(module.training)
