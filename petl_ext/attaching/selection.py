"""Which modules get a layer and which of the model's own parameters stay trainable."""

import re

from petl_ext.attaching.families import FAMILIES, SITE_CLASSES, SKIPPABLE, family_of
from petl_ext.attaching.methods.config import ClassTokenConfig
from petl_ext.attaching.sites.site import Place
from petl_ext.composing import has_device_hook
from petl_ext.printing import listed


def select_places(model, config):
    """Where `config` puts new layers: a list of `Place`.

    Raises:
        ValueError: nothing, or nothing for one of the patterns, matches; or a site cannot take a layer.
    """
    places = [] if config.placement is None else _own_places(model, config)
    return [*places, *select_places(model, ClassTokenConfig())] if config.class_token else places


def select_kept(model, config, keep):
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


def is_part(entry, name):
    """Whether the dotted `entry` is a run of whole components of the dotted `name`."""
    return f".{entry}." in f".{name}."


def _own_places(model, config):
    patterns = _patterns(model, config)
    places = _matching(model, config, patterns)
    if config.sites is None:
        _check_all_fit(model, config, patterns, places)
    if config.placement == "bypass":
        places = _with_adapters(model, config, places)
    for place in places:
        _check_site(place, model.get_submodule(place.name))
    return places


def _patterns(model, config):
    if config.sites is not None:
        return config.sites
    sites = FAMILIES.get(family_of(model), {})
    if config.placement not in sites:
        known = ", ".join(family for family, sites in FAMILIES.items() if config.placement in sites)
        raise ValueError(
            f"attach: {type(model).__name__} belongs to none of the families with sites for {config.method} ({known}), "
            f"so {config} must name them. {_candidates_text(model, config.placement)}"
        )
    patterns = sites[config.placement]
    return [patterns] if isinstance(patterns, str) else patterns


def _matching(model, config, patterns):
    """The places that the patterns match, by pattern and then in the model's order."""
    candidates = _candidates(model, config.placement)
    order = [name for name, _ in model.named_modules()]
    chosen = {}
    for pattern in patterns:
        matching = {name: found for name, found in candidates.items() if _matches(pattern, name)}
        if not matching:
            raise ValueError(
                f"attach: {config} matches nothing in {type(model).__name__} with the pattern {pattern!r}. "
                f"{_candidates_text(model, config.placement)}"
            )
        chosen |= {name: matching[name] for name in order if name in matching and name not in chosen}
    return [Place(name, site_class) for name, site_class in chosen.items()]


def _check_all_fit(model, config, patterns, places):
    """Raises a ValueError if a module stands where the family's table wants a layer, but is none of the candidates."""
    fitting = {place.name for place in places}
    for name, module in model.named_modules():
        if name not in fitting and any(_matches(pattern, name) for pattern in patterns):
            raise ValueError(
                f"attach: {name}, a {type(module).__name__}, stands where {config} puts a layer, but is not what it "
                f"looks for. {_candidates_text(model, config.placement)}"
            )


def _candidates(model, placement):
    """{dotted name: what it can become}."""
    classes = _site_classes(model, placement)
    return {name: site_class for site_class in classes for name in site_class.candidates(model)}


def _site_classes(model, placement):
    if placement == "bypass":
        return SKIPPABLE.get(family_of(model), SITE_CLASSES[placement])
    return SITE_CLASSES[placement]


def _with_adapters(model, config, bypasses):
    """The bypasses, each told how many adapters are lost with its layer, and these adapters."""
    pattern = FAMILIES.get(family_of(model), {}).get("das_adapter")
    candidates = _candidates(model, "das_adapter") if pattern and config.bottleneck else {}
    adapters = {name: site_class for name, site_class in candidates.items() if _matches(pattern, name)}
    places = []
    for name, site_class, _ in bypasses:
        inside = [Place(inner, adapters[inner]) for inner in adapters if f"{inner}.".startswith(f"{name}.")]
        places += [Place(name, site_class, lost=len(inside)), *inside]
    return places


def _matches(pattern, name):
    return re.fullmatch(rf"(.*\.)?({pattern})", name)


def _candidates_text(model, placement):
    looked_for = " and ".join(dict.fromkeys(site_class.looked_for for site_class in _site_classes(model, placement)))
    places = [Place(name, site_class) for name, site_class in _candidates(model, placement).items()]
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
        place.site_class.neighbour(module)
    except ValueError as error:
        return str(error)


def _check_site(place, module):
    child = place.site_class.child
    if hasattr(module, child):
        raise ValueError(f"attach: {place.name} already has a child {child!r}; detach what is attached there first")
    if "forward" in vars(module) and not has_device_hook(module):
        raise ValueError(
            f"attach: {place.name} has a forward of its own, put there by another library, that would bypass the layer"
        )
    problem = _problem(place, module)
    if problem is not None:
        raise ValueError(f"attach: {place.name}: {problem}")
    _check_loaded(f"{place.name}'s weight", place.site_class.neighbour(module).weight)


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
