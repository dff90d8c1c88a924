"""Which modules get a layer and which of the model's own parameters stay trainable."""

from typing import NamedTuple

from petl_ext.attaching.families import FAMILIES, Family
from petl_ext.attaching.methods.class_token import ClassTokenConfig
from petl_ext.attaching.patterns import is_part, matches
from petl_ext.attaching.sites.site import Place, candidates_of
from petl_ext.composing import has_foreign_forward
from petl_ext.printing import listed


class Selection(NamedTuple):
    """What of a model `attach` changes.

    Attributes:
        family: the model's.
        places: a list of `Place`: where new layers go.
        keep: the entries given to `attach`.
        kept: the state-dict names of what trains although the model brought it.
    """

    family: Family
    places: list
    keep: tuple
    kept: set


def select(model, config, family, keep):
    """The `Selection` for a model of that family.

    Raises:
        ValueError: as `select_places` and `_select_kept`, or nothing would train.
    """
    selection = Selection(family, select_places(model, config, family), keep, _select_kept(model, config, keep))
    if not selection.places and not selection.kept:
        raise ValueError(f"attach: {config} adds nothing and keep is empty, so nothing would train")
    return selection


def select_places(model, config, family):
    """Where `config` puts new layers: a list of `Place`.

    Raises:
        ValueError: nothing, or nothing for one of the patterns, matches; or a site cannot take a layer.
    """
    places = [] if config.row is None else _own_places(model, config, family)
    return [*places, *select_places(model, ClassTokenConfig(), family)] if config.class_token else places


def _select_kept(model, config, keep):
    """The state-dict names of what trains although the model brought it.

    Args:
        keep: dotted names, or parts of them between dots: "classifier", "vilt.pooler", "pooler".

    Raises:
        ValueError: an entry matches no parameter, or one that cannot train.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    names = dict.fromkeys([*parameters, *model.state_dict()])
    for entry in keep:
        if not any(is_part(entry, name) for name in parameters):
            raise ValueError(
                f"attach: keep={entry!r} matches no parameter of {type(model).__name__}; "
                f"it has, for instance, {listed(_parts(parameters))}"
            )
    kept = {name for name in names if config.trains_all or any(is_part(entry, name) for entry in keep)}
    for name in kept & parameters.keys():
        _check_trainable(name, parameters[name])
    return kept


def _own_places(model, config, family):
    patterns = config.sites or _patterns(model, config, family)
    places = _matching(model, config, family, patterns)
    if config.sites is None:
        _check_all_fit(model, config, family, {place.name for place in places})
    places = config.with_inner_places(places, model, family)
    for place in places:
        _check_site(place, model.get_submodule(place.name))
    return places


def _patterns(model, config, family):
    if config.row not in family.sites:
        known = ", ".join(other.name for other in FAMILIES.values() if config.row in other.sites)
        raise ValueError(
            f"attach: {type(model).__name__} belongs to none of the families with sites for {config.method} ({known}), "
            f"so {config} must name them. {_candidates_text(model, config.site_classes_in(family))}"
        )
    return family.patterns(config.row)


def _matching(model, config, family, patterns):
    """The places that the patterns match, by pattern and then in the model's order."""
    site_classes = config.site_classes_in(family)
    candidates = candidates_of(model, site_classes)
    order = [name for name, _ in model.named_modules()]
    chosen = {}
    for pattern in patterns:
        matching = {name: found for name, found in candidates.items() if matches(pattern, name)}
        if not matching:
            raise ValueError(
                f"attach: {config} matches nothing in {type(model).__name__} with the pattern {pattern!r}. "
                f"{_candidates_text(model, site_classes)}"
            )
        chosen |= {name: matching[name] for name in order if name in matching and name not in chosen}
    return [Place(name, site_class) for name, site_class in chosen.items()]


def _check_all_fit(model, config, family, fitting):
    """Raises a ValueError if a module stands where the family's record wants a layer, but is none of the candidates."""
    patterns = family.patterns(config.row)
    for name, module in model.named_modules():
        if name not in fitting and any(matches(pattern, name) for pattern in patterns):
            raise ValueError(
                f"attach: {name}, a {type(module).__name__}, stands where {config} puts a layer, but is not what it "
                f"looks for. {_candidates_text(model, config.site_classes_in(family))}"
            )


def _candidates_text(model, site_classes):
    looked_for = " and ".join(dict.fromkeys(site_class.looked_for for site_class in site_classes))
    places = [Place(name, site_class) for name, site_class in candidates_of(model, site_classes).items()]
    problems = {place.name: _problem(place, model.get_submodule(place.name)) for place in places}
    fitting = [name for name, problem in problems.items() if problem is None]
    if fitting:
        return f"Candidates, {looked_for}: {listed(fitting)}"
    if problems:
        reasons = [f"{name}: {problem}" for name, problem in problems.items()]
        return f"It has no {looked_for}; what looks like one: {listed(reasons, '; ')}"
    modules = [name for name, _ in model.named_modules() if name]
    attentions = [name for name in modules if "att" in name.rpartition(".")[2].lower()]
    return f"It has no {looked_for}; its modules: {listed(attentions or modules)}"


def _problem(place, module):
    """Why a candidate is none after all, or None."""
    try:
        place.site_class.check(module)
        place.site_class.neighbor(module)
    except ValueError as error:
        return str(error)


def _check_site(place, module):
    child = place.site_class.child
    if hasattr(module, child):
        raise ValueError(f"attach: {place.name} already has a child {child!r}; detach what is attached there first")
    if has_foreign_forward(module):
        raise ValueError(
            f"attach: {place.name} has a forward of its own, put there by another library, that would bypass the layer"
        )
    problem = _problem(place, module)
    if problem is not None:
        raise ValueError(f"attach: {place.name}: {problem}")
    _check_loaded(f"{place.name}'s weight", place.site_class.neighbor(module).weight)


def _check_loaded(name, weight):
    if getattr(weight, "is_meta", False):
        raise ValueError(f"attach: {name} is on the meta device; load the model's weights first")


def _check_trainable(name, tensor):
    _check_loaded(name, tensor)
    if not tensor.is_floating_point():
        raise ValueError(f"attach: {name} is {tensor.dtype}; only floating-point weights can train")


def _parts(names):
    """The names of parameters and of the modules that hold them, down to two levels."""
    return dict.fromkeys(".".join(name.split(".")[:depth]) for depth in (1, 2) for name in names)
