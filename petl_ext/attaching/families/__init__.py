"""What is known of model families: one record each, which says where every method goes in a model of that family."""

import dataclasses
import re

from torch import nn

from petl_ext.attaching.families import diffusion, fusion, text, vision
from petl_ext.attaching.families.record import WHOLE, Family
from petl_ext.attaching.methods import CONFIGS
from petl_ext.attaching.methods.config import TOWERS
from petl_ext.attaching.patterns import check_patterns, matches

FAMILIES = {family.name: family for records in (fusion, text, vision, diffusion) for family in records.FAMILIES}
NO_FAMILY = Family(None, {})


def register_family(family):
    """Adds a `Family` to those that `attach` and petl_ext.peft know.

    Raises:
        TypeError: it is no `Family`.
        ValueError: one of this name is known, its sites name no method, its towers no tower, or one of both holds no
            regular expression.
    """
    if not isinstance(family, Family):
        raise TypeError(f"register_family: family must be a Family, got {type(family).__name__}")
    if not isinstance(family.name, str) or family.name in FAMILIES:
        raise ValueError(f"register_family: name must be one that no family has, got {family.name!r}")
    methods = [method for config in CONFIGS.values() for method in config.site_classes]
    for method in family.sites or ():
        if method not in methods:
            raise ValueError(f"register_family: sites must be for methods of {', '.join(methods)}, got {method!r}")
        check_patterns("register_family", family.patterns(method))
    for tower, pattern in family.towers.items():
        if tower not in TOWERS:
            raise ValueError(f"register_family: towers must be of {', '.join(TOWERS)}, got {tower!r}")
        check_patterns("register_family", [pattern])
    FAMILIES[family.name] = family


def family_of(model):
    """The one `Family` that `model` or all outermost models inside it belong to, or `NO_FAMILY`.

    A METER contains a RoBERTa, and is a METER. A Grounding DINO contains a BERT, but is of no family: layers would go
    into a part of it. The family of a model with models of other families in its towers is given their sites.
    """
    found = {}
    for name, module in model.named_modules():
        family = _own_family(module)
        if (family or _model_type(module)) and not any(f"{name}.".startswith(outer) for outer in found):
            found[f"{name}." if name else ""] = family
    families = set(found.values())
    family = FAMILIES.get(families.pop(), NO_FAMILY) if len(families) == 1 else NO_FAMILY
    return family if family.sites is not None else _with_sites_of_towers(family, model)


def _with_sites_of_towers(family, model):
    """The family with the sites of the models in its towers; a tower that is of no family is among its `limits`."""
    sites, skippable, limits, unused = {}, {}, dict(family.limits), ()
    owner = next(module for module in model.modules() if _own_family(module) == family.name)
    for tower, pattern in family.towers.items():
        for name, module in _outermost(model, pattern):
            inner = FAMILIES.get(_own_family(module), NO_FAMILY)
            if inner is NO_FAMILY:
                limits[tower] = f"{name} is a {type(module).__name__} of no known family"
            elif tower == "vision":
                unused += _behind_the_features(owner.config, name, module)
            for method in inner.sites or ():
                ours = tuple(_inside(name, its) for its in inner.patterns(method))
                sites[method] = (*sites.get(method, ()), *ours)
            limits |= {method: f"{tower}: {limit}" for method, limit in inner.limits.items()}
            skippable |= dict.fromkeys(inner.skippables)
    if unused:
        limits["vision"] = f"not in {', '.join(unused)}, behind the layer whose features the model takes"
    return dataclasses.replace(family, sites=sites, skippable=tuple(skippable), limits=limits, unused=unused)


def _behind_the_features(config, name, tower):
    """The dotted names of a vision tower's layers behind the last one whose output `vision_feature_layer` names: an
    index into its hidden states, of which the first is no layer's, or several; -1 where the configuration has none."""
    taken = getattr(config, "vision_feature_layer", -1)
    stacks = ((inner, module) for inner, module in tower.named_modules() if isinstance(module, nn.ModuleList))
    stack, layers = next(stacks, ("", ()))
    last = max(index % (len(layers) + 1) for index in (taken if isinstance(taken, list | tuple) else [taken]))
    return tuple(f"{name}.{stack}.{index}" for index in range(last, len(layers)))


def _outermost(model, pattern):
    """(dotted name, module) of those that a tower's pattern matches and that lie in no other such."""
    found = [(name, module) for name, module in model.named_modules() if name and matches(pattern, name)]
    return [(name, its) for name, its in found if not any(name.startswith(f"{outer}.") for outer, _ in found)]


def _inside(name, pattern):
    return rf"{re.escape(name)}\.(.*\.)?({pattern})"


def _own_family(module):
    names = (_model_type(module), *(name for its_class in type(module).__mro__ for name in _names_of(its_class)))
    return next((name for name in names if name in FAMILIES), None)


def _names_of(its_class):
    """Its name, also with its package's in front: more than one package has a VisionTransformer."""
    return its_class.__name__, f"{its_class.__module__.partition('.')[0]}.{its_class.__name__}"


def _model_type(module):
    return getattr(getattr(module, "config", None), "model_type", None)


__all__ = ["FAMILIES", "NO_FAMILY", "WHOLE", "Family", "family_of", "register_family"]
