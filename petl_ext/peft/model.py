"""Which modules of a model carry approximated prompt tuning, and how PEFT puts it there."""

import re
from contextlib import contextmanager

from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import nn

from petl_ext.attaching.families import FAMILIES, family_of
from petl_ext.attaching.methods import CONFIGS
from petl_ext.attaching.patterns import whole_name
from petl_ext.attaching.sites.site import Site
from petl_ext.composing import composed, has_foreign_forward, unchanged_on_error
from petl_ext.peft.layer import NO_MERGE, PREFIX, APTTunerLayer

SITE_CLASSES = CONFIGS["apt"].site_classes["apt"]


class APTModel(BaseTuner):
    """Puts `APTTunerLayer`s into a model; `peft.get_peft_model` makes it from an `APTConfig`."""

    prefix = PREFIX
    tuner_layer_cls = APTTunerLayer

    def inject_adapter(self, model, adapter_name, *args, **kwargs):
        """As PEFT's, but after an error the model is as it was.

        Raises:
            ValueError: the adapter's name cannot be one, nothing or something that cannot carry APT is a target, or
                a target carries another method.
        """
        try:
            _check_adapter_name(adapter_name)
            with unchanged_on_error(model):
                super().inject_adapter(model, adapter_name, *args, **kwargs)
                _check_not_empty(model, adapter_name, self.peft_config[adapter_name])
        except BaseException:
            # Where the model has adapters already, this is their table.
            self.peft_config.pop(adapter_name, None)
            raise

    def _prepare_adapter_config(self, peft_config, model_config):
        if peft_config.target_modules is None:
            peft_config.target_modules = _default_targets(self.model, peft_config)
        return peft_config

    def _create_and_replace(self, peft_config, adapter_name, target, target_name, parent, current_key, **_):
        if not isinstance(target, APTTunerLayer):
            site_class = _site_class(target, target_name, parent, current_key)
            target = composed(APTTunerLayer, (site_class,))(target, adapter_name)
            setattr(parent, target_name, target)
        target.update_layer(adapter_name, peft_config, self.model)

    def _replace_module(self, parent, child_name, new_module, child):
        # PEFT's own looks for a weight, which these modules do not have.
        setattr(parent, child_name, new_module)

    def _check_merge_allowed(self):
        raise NotImplementedError(NO_MERGE)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args, **kwargs):
        # PEFT would ignore it silently.
        if kwargs.get("adapter_names") is not None:
            raise ValueError("APT: adapter_names, one adapter per sample, is not supported; use set_adapter")
        yield


def _check_adapter_name(name):
    # PEFT takes it for a part of the prefix when it loads; torch takes the others for names of modules or methods.
    if name in PREFIX or "." in name or hasattr(nn.ParameterDict, name):
        raise ValueError(
            f"APT: an adapter cannot be named {name!r}: that is empty, part of the prefix {PREFIX!r}, has a dot, or is "
            "an attribute of torch.nn.ParameterDict"
        )


def _check_not_empty(model, adapter_name, config):
    # PEFT 0.19 looks at the first adapter only.
    if not any(isinstance(module, APTTunerLayer) and module.carries(adapter_name) for module in model.modules()):
        raise ValueError(
            f"APT: target_modules {config.target_modules!r} match nothing in {type(model).__name__}, with "
            f"exclude_modules={config.exclude_modules!r} and layers_to_transform={config.layers_to_transform!r}"
        )


def _default_targets(model, config):
    """What `petl_ext.attach` takes in this model: the ends of the names behind the layer's index where they say it all,
    as in LoRA's defaults, otherwise a regular expression."""
    patterns = family_of(model).patterns("apt")
    if not patterns:
        known = ", ".join(family.name for family in FAMILIES.values() if "apt" in family.sites)
        raise ValueError(
            f"APTConfig: {type(model).__name__} belongs to none of the families with default targets ({known}); "
            "give target_modules"
        )
    pattern = whole_name("|".join(patterns))
    names = [name for name, _ in model.named_modules()]
    ends = {re.split(r"\.\d+\.", name)[-1] for name in names if re.fullmatch(pattern, name)}
    if all(re.fullmatch(pattern, name) for name in names if any(f".{name}".endswith(f".{end}") for end in ends)):
        return ends
    if config.layers_to_transform is not None:
        raise ValueError(
            f"APTConfig: the default targets of {type(model).__name__} are a regular expression, {pattern!r}; with "
            "layers_to_transform give target_modules, a list of names"
        )
    return pattern


def _site_class(target, target_name, parent, name):
    """The class of sites that the target is."""
    if isinstance(target, BaseTunerLayer | Site):
        raise ValueError(
            f"APT: {name} already carries another method, {type(target).__name__}; take that out first, or choose "
            "other target_modules"
        )
    if has_foreign_forward(target):
        raise ValueError(
            f"APT: {name} has a forward of its own, put there by another library, that would bypass the adapter"
        )
    for site_class in SITE_CLASSES:
        if site_class.candidates(parent).get(target_name) is target:
            _check_site(site_class, target, name)
            return site_class
    looked_for = " or ".join(site_class.looked_for for site_class in SITE_CLASSES)
    raise ValueError(
        f"APT: target_modules must name {looked_for}; {name} is a {type(target).__name__} that is none of them"
    )


def _check_site(site_class, module, name):
    try:
        site_class.check(module)
    except ValueError as error:
        raise ValueError(f"APT: {name}: {error}") from error
