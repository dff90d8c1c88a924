"""Which modules get a layer and which of the model's own parameters stay trainable."""

import re

from petl_ext.attach.families import FAMILIES, SITE_CLASSES, family_of

LISTED = 12


def select_sites(model, config):
    """The modules that get a layer, by dotted name.

    Raises:
        ValueError: nothing, or nothing for one of the patterns, matches; or a site cannot take a layer.
    """
    if config.method not in SITE_CLASSES:
        return {}
    site_class = SITE_CLASSES[config.method]
    candidates = site_class.candidates(model)
    patterns = _patterns(model, config)
    chosen = {}
    for pattern in patterns:
        matching = {name: site for name, site in candidates.items() if re.fullmatch(rf"(.*\.)?({pattern})", name)}
        if not matching:
            raise ValueError(_nothing_found(model, config, pattern, candidates))
        chosen |= matching
    for name, site in chosen.items():
        _check_site(name, site, site_class)
    return {name: site for name, site in candidates.items() if name in chosen}


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
                f"it has, for instance, {_listed(_parts(parameters))}"
            )
    kept = {name for name in names if config.trains_all or any(is_part(entry, name) for entry in keep)}
    for name in kept & parameters.keys():
        _check_trainable(name, parameters[name])
    return kept


def is_part(entry, name):
    """Whether the dotted `entry` is a run of whole components of the dotted `name`."""
    return f".{entry}." in f".{name}."


def _patterns(model, config):
    if config.sites is not None:
        return config.sites
    sites = FAMILIES.get(family_of(model), {})
    if config.method not in sites:
        candidates = SITE_CLASSES[config.method].candidates(model)
        known = ", ".join(family for family, sites in FAMILIES.items() if config.method in sites)
        raise ValueError(
            f"attach: {type(model).__name__} belongs to none of the families with sites for {config.method} ({known}), "
            f"so {config} must name them. {_candidates_text(model, config, candidates)}"
        )
    return [sites[config.method]]


def _nothing_found(model, config, pattern, candidates):
    return (
        f"attach: {config} matches nothing in {type(model).__name__} with the pattern {pattern!r}. "
        f"{_candidates_text(model, config, candidates)}"
    )


def _candidates_text(model, config, candidates):
    looked_for = SITE_CLASSES[config.method].looked_for
    if candidates:
        return f"Candidates, {looked_for}: {_listed(candidates)}"
    modules = [name for name, _ in model.named_modules() if name]
    attentions = [name for name in modules if "att" in name.rpartition(".")[2].lower()]
    return f"It has no {looked_for}; its modules: {_listed(attentions or modules)}"


def _check_site(name, site, site_class):
    if hasattr(site, site_class.child):
        raise ValueError(
            f"attach: {name} already has a child {site_class.child!r}; detach what is attached there first"
        )
    if "forward" in vars(site):
        raise ValueError(
            f"attach: {name} has a forward of its own, put there by another library, that would bypass the layer"
        )
    _check_trainable(f"{name}'s weight", site_class.weight_of(site))


def _check_trainable(name, tensor):
    if tensor.is_meta:
        raise ValueError(f"attach: {name} is on the meta device; load the model's weights first")
    if not tensor.is_floating_point():
        raise ValueError(f"attach: {name} is {tensor.dtype}; only floating-point weights can train or carry a layer")


def _parts(names):
    """The names of parameters and of the modules that hold them, down to two levels."""
    return dict.fromkeys(".".join(name.split(".")[:depth]) for depth in (1, 2) for name in names)


def _listed(names):
    names = list(names)
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return (", ".join(names[:LISTED]) or "nothing") + more
