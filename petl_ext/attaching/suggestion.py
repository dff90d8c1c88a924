"""The line to copy for a model for which no family says where a method goes."""

from petl_ext.attaching.sites.site import candidates_of


def lines_to_copy(model, config, family):
    """The configuration with sites or, for a model of no known family, a call of `register_family` with them; nothing
    where the model holds nothing that could carry the layers of `config`."""
    candidates = candidates_of(model, config.site_classes_in(family)).items()
    fitting = [name for name, site_class in candidates if _fits(site_class, model.get_submodule(name))]
    if not fitting:
        return []
    pattern = "|".join(dict.fromkeys(map(_of_any_index, fitting)))
    if family.name is not None:
        return [f'To name them: {type(config).__name__}(sites=[r"{pattern}"])']
    name = getattr(getattr(model, "config", None), "model_type", None) or type(model).__name__
    return [
        "To make its family known: from petl_ext.attaching import Family, register_family",
        f'register_family(Family("{name}", sites={{"{config.row}": r"{pattern}"}}))',
    ]


def _fits(site_class, module):
    try:
        site_class.check(module)
        site_class.neighbor(module)
    except ValueError:
        return False
    return True


def _of_any_index(name):
    """The regular expression of the dotted name with any indices in the place of its own."""
    return r"\.".join(r"\d+" if part.isdigit() else part for part in name.split("."))
