"""Which modules get a layer and which of the model's own parameters stay trainable."""

from typing import NamedTuple

from petl_ext.attaching.families import Family
from petl_ext.attaching.methods.class_token import ClassTokenConfig
from petl_ext.attaching.methods.config import TOWERS
from petl_ext.attaching.patterns import Wanted, is_part
from petl_ext.attaching.sites.site import Place, candidates_of
from petl_ext.attaching.suggestion import lines_to_copy
from petl_ext.attaching.whole_stacks import check_takes_whole_stacks
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
    wanted = _wanted(model, config, family)
    places = _matching(model, config, family, wanted)
    names = {place.name for place in places}
    _check_all_fit(model, config, family, wanted, names)
    check_takes_whole_stacks(model, config, family, wanted, names)
    _check_all_towers(model, config, family, names)
    places = config.with_inner_places(places, model, family)
    for place in places:
        _check_site(place, model.get_submodule(place.name))
    return places


def _wanted(model, config, family):
    """A list of `Wanted`: what `config` asks for, or what the family's record says."""
    entries = config.sites or (None,)
    return [wanted for entry in entries for wanted in _wanted_by(entry, model, config, family)]


def _wanted_by(entry, model, config, family):
    if entry is not None and entry not in TOWERS:
        return [Wanted(entry)]
    if not family.takes(config.row):
        raise ValueError(_no_sites_text(model, config, family))
    if entry is not None and entry not in family.towers:
        towers = ", ".join(map(repr, family.towers)) or "none"
        raise ValueError(f"attach: {type(model).__name__} has no tower {entry!r}; those of its family: {towers}")
    return [Wanted(pattern, True, entry) for pattern in family.patterns(config.row)]


def _no_sites_text(model, config, family):
    method, name = type(config).__name__, type(model).__name__
    if config.row in family.limits:
        return f"attach: {name} takes no {method}: {family.limits[config.row]}"
    lines = [
        f"attach: {name} belongs to none of the families with sites for {config.method}, so {method} must name them. "
        f"{_candidates_text(model, config.site_classes_in(family))}"
    ]
    return "\n".join([*lines, *lines_to_copy(model, config, family)])


def _matching(model, config, family, wanted):
    """The places that the patterns match, by pattern and then in the model's order."""
    site_classes = config.site_classes_in(family)
    candidates = candidates_of(model, site_classes)
    order = [name for name, _ in model.named_modules()]
    chosen, lacking, towers = {}, [], set()
    for each in wanted:
        matching = {name: found for name, found in candidates.items() if each.takes(name, family)}
        if matching:
            towers.add(each.tower)
        else:
            lacking.append(each)
        chosen |= {name: matching[name] for name in order if name in matching and name not in chosen}
    # A tower's patterns are those of all towers of its family; others are each to match something.
    missed = [each for each in lacking if each.tower is None or each.tower not in towers]
    if missed:
        where = f"in the tower {missed[0].tower!r}" if missed[0].tower else f"with the pattern {missed[0].pattern!r}"
        limit = family.limits.get(missed[0].tower)
        raise ValueError(
            f"attach: {config} matches nothing in {type(model).__name__} {where}{f': {limit}' if limit else ''}. "
            f"{_candidates_text(model, site_classes)}"
        )
    return [Place(name, site_class) for name, site_class in chosen.items()]


def _check_all_fit(model, config, family, wanted, fitting):
    """Raises a ValueError if a module stands where the family's record wants a layer, but is none of the candidates."""
    patterns = [each for each in wanted if each.is_familys]
    for name, module in model.named_modules() if patterns else ():
        holds_one = any(inner.startswith(f"{name}.") for inner in fitting)
        if name not in fitting and not holds_one and any(each.takes(name, family) for each in patterns):
            raise ValueError(
                f"attach: {name}, a {type(module).__name__}, stands where {config} puts a layer, but is not what it "
                f"looks for. {_candidates_text(model, config.site_classes_in(family))}"
            )


def _check_all_towers(model, config, family, names):
    """Raises a ValueError if the family's record gives one of the model's towers no layer, and `config` does not say
    that it is to have none."""
    if config.sites is not None:
        return
    reached = {family.tower_of(name) for name in names}
    there = {family.tower_of(name) for name, _ in model.named_modules()} - {None}
    for tower in family.towers:
        if tower in there - reached and reached - {None}:
            others = [other for other in family.towers if other in reached]
            raise ValueError(
                f"attach: {type(model).__name__}'s {tower} tower takes no {type(config).__name__}: "
                f"{family.limits.get(tower, 'its family has no sites for it')}. For the others alone write "
                f"sites={others}"
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
