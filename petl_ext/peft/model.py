"""Which modules of a model carry one of our methods, and how PEFT puts it there."""

import re
from contextlib import contextmanager
from typing import Any

from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import nn

from petl_ext.attaching.families import family_of
from petl_ext.attaching.methods import CONFIGS
from petl_ext.attaching.patterns import whole_name
from petl_ext.attaching.sites.site import Site
from petl_ext.composing import composed, has_foreign_forward, unchanged_on_error
from petl_ext.peft.layer import AdapterTunerLayer, APTTunerLayer

# {row: what a target can become}
SITE_CLASSES = {row: classes for config in CONFIGS.values() for row, classes in config.site_classes.items()}


class MethodModel(BaseTuner):
    """Puts the `TunerLayer`s of a method into a model; `peft.get_peft_model` makes it from a `MethodConfig`.

    Attributes:
        title: the method's name in messages.
    """

    title: str

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """As PEFT's, but after an error the model is as it was.

        Raises:
            ValueError: the adapter's name cannot be one, nothing or something that cannot carry the method is a target,
                or a target carries another method.
        """
        try:
            self._check_adapter_name(adapter_name)
            with unchanged_on_error(model):
                super().inject_adapter(model, adapter_name, *args, **kwargs)
                self._check_not_empty(model, adapter_name, self.peft_config[adapter_name])
        except BaseException:
            # Where the model has adapters already, this is their table.
            self.peft_config.pop(adapter_name, None)
            raise

    def _prepare_adapter_config(self, peft_config, model_config):
        if peft_config.target_modules is None:
            peft_config.target_modules = _default_targets(self.model, peft_config)
        return peft_config

    def _create_and_replace(self, peft_config, adapter_name, target, target_name, parent, current_key, **_):
        if isinstance(target, self.tuner_layer_cls):
            self._check_same_sort(target, current_key, peft_config)
        else:
            site_class = self._site_class(target, target_name, parent, current_key, SITE_CLASSES[peft_config.row])
            target = composed(self.tuner_layer_cls, (site_class,))(target, adapter_name)
            setattr(parent, target_name, target)
        target.update_layer(adapter_name, peft_config, self.model)

    def _replace_module(self, parent, child_name, new_module, child):
        # PEFT's own looks for a weight, which these modules do not have.
        setattr(parent, child_name, new_module)

    def _check_merge_allowed(self):
        raise NotImplementedError(self.tuner_layer_cls.petl_no_merge)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args, **kwargs):
        # PEFT would ignore it silently.
        if kwargs.get("adapter_names") is not None:
            raise ValueError(f"{self.title}: adapter_names, one adapter per sample, is not supported; use set_adapter")
        yield

    def _check_adapter_name(self, name):
        # PEFT takes it for a part of the prefix when it loads; torch takes the others for names of modules or methods.
        if name in self.prefix or "." in name or hasattr(nn.ParameterDict, name):
            raise ValueError(
                f"{self.title}: an adapter cannot be named {name!r}: that is empty, part of the prefix "
                f"{self.prefix!r}, has a dot, or is an attribute of torch.nn.ParameterDict"
            )

    def _check_not_empty(self, model, adapter_name, config):
        # PEFT 0.19 looks at the first adapter only.
        layers = (module for module in model.modules() if isinstance(module, self.tuner_layer_cls))
        if not any(layer.carries(adapter_name) for layer in layers):
            raise ValueError(
                f"{self.title}: target_modules {config.target_modules!r} match nothing in {type(model).__name__}, with "
                f"exclude_modules={config.exclude_modules!r} and layers_to_transform={config.layers_to_transform!r}"
            )

    def _check_same_sort(self, target, name, config):
        """What a target has become for its first adapter must be right for the next."""
        become = next(its for its in type(target).__mro__ if any(its in row for row in SITE_CLASSES.values()))
        if become not in SITE_CLASSES[config.row]:
            raise ValueError(
                f"{self.title}: {name} carries adapters of another kind than {config.row!r}; all adapters of a target "
                "must be of one"
            )

    def _site_class(self, target, target_name, parent, name, site_classes):
        """The class of sites that the target is."""
        if isinstance(target, BaseTunerLayer | Site):
            raise ValueError(
                f"{self.title}: {name} already carries another method, {type(target).__name__}; take that out first, "
                "or choose other target_modules"
            )
        if has_foreign_forward(target):
            raise ValueError(
                f"{self.title}: {name} has a forward of its own, put there by another library, that would bypass the "
                "adapter"
            )
        for site_class in site_classes:
            if site_class.candidates(parent).get(target_name) is target:
                self._check_site(site_class, target, name)
                return site_class
        looked_for = " or ".join(dict.fromkeys(site_class.looked_for for site_class in site_classes))
        raise ValueError(
            f"{self.title}: target_modules must name {looked_for}; {name} is a {type(target).__name__} that is none of "
            "them"
        )

    def _check_site(self, site_class, module, name):
        try:
            site_class.check(module)
        except ValueError as error:
            raise ValueError(f"{self.title}: {name}: {error}") from error
        second = getattr(site_class, "second_stream", None)
        if second is not None and second.stands_in(module):
            raise ValueError(
                f"{self.title}: {name} is a joint attention of two streams, of which PEFT's layer would see one; use "
                "petl_ext.attach"
            )


class APTModel(MethodModel):
    """Of an `APTConfig`."""

    title = "APT"
    prefix = APTTunerLayer.petl_prefix
    tuner_layer_cls = APTTunerLayer


class AdapterModel(MethodModel):
    """Of an `AdapterConfig`."""

    title = "Adapter"
    prefix = AdapterTunerLayer.petl_prefix
    tuner_layer_cls = AdapterTunerLayer


def _default_targets(model, config):
    """What `petl_ext.attach` takes in this model: the ends of the names behind the layer's index where they say it all,
    as in LoRA's defaults, otherwise a regular expression."""
    family, name = family_of(model), type(config).__name__
    patterns = family.patterns(config.row)
    if not patterns and config.row in family.limits:
        raise ValueError(f"{name}: {type(model).__name__} takes none: {family.limits[config.row]}")
    if not patterns:
        raise ValueError(
            f"{name}: {type(model).__name__} belongs to none of the families with default targets; give "
            "target_modules, or make its family known by petl_ext.attaching.register_family"
        )
    refused = [f"{tower}: {family.limits[tower]}" for tower in family.towers if tower in family.limits]
    if refused and not family.unused:
        raise ValueError(
            f"{name}: {type(model).__name__} has a tower without targets; give target_modules. {refused[0]}"
        )
    pattern = whole_name("|".join(patterns))
    names = [name for name, _ in model.named_modules()]
    matching = [name for name in names if re.fullmatch(pattern, name) and family.uses(name)]
    ends = {re.split(r"\.\d+\.", name)[-1] for name in matching}
    if all(name in matching for name in names if any(f".{name}".endswith(f".{end}") for end in ends)):
        return ends
    if config.layers_to_transform is not None:
        raise ValueError(
            f"{name}: the default targets of {type(model).__name__} are a regular expression, {pattern!r}; with "
            "layers_to_transform give target_modules, a list of names"
        )
    return pattern if all(map(family.uses, names)) else "|".join(map(re.escape, matching))
