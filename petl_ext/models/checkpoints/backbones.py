"""What ViLT's and METER's files have in common: heads, and the layers that the code bases of APT and DAS add. DVP's
adapters have the names of the sequential ones.
"""

import dataclasses
from typing import NamedTuple

from petl_ext.attaching.amend import add_class_token, freeze_scales
from petl_ext.composing import unchanged_on_error
from petl_ext.models.checkpoints.adapt import second_row
from petl_ext.models.checkpoints.plan import Layout, attached_configs, fill, opened, tensors_of
from petl_ext.models.checkpoints.rules import LayerNames, Rule, lookup, rule
from petl_ext.printing import listed

APT = LayerNames(
    "APTConfig(num_prompts={num_prompts}, rank={rank})",
    "apt",
    {"num_prompts": "mm_tokens", "rank": "mm.0.weight"},
    # "weight" is in REFUSED; the entry says what stays as it is when that is ignored.
    {"mm.0.weight": "down", "mm.1.weight": "up", "mm_tokens": "prompts", "scale": "log_scale", "weight": "log_scale"},
)
SEQUENTIAL_ADAPTER = LayerNames(
    "AdapterConfig(bottleneck={bottleneck})",
    "sequential_adapter",
    {"bottleneck": "down_sampler.weight"},
    {
        "down_sampler.weight": "down",
        "down_sampler.bias": "down_bias",
        "up_sampler.weight": "up",
        "up_sampler.bias": "up_bias",
    },
)
PARALLEL_ADAPTER = LayerNames(
    'AdapterConfig(kind="parallel", bottleneck={bottleneck})',
    "parallel_adapter",
    {"bottleneck": "down_proj.weight"},
    {
        "adapter_layer_norm_before.weight": "norm_weight",
        "adapter_layer_norm_before.bias": "norm_bias",
        "down_proj.weight": "down",
        "down_proj.bias": "down_bias",
        "up_proj.weight": "up",
        "up_proj.bias": "up_bias",
    },
)
DAS_ADAPTER = PARALLEL_ADAPTER._replace(config="DASConfig(bottleneck={bottleneck})", row="bypass")
DAS_BYPASS = DAS_ADAPTER._replace(config="DASConfig(bypass_bottleneck={bottleneck})")

# By root in the file; the names are those of whole models.
HEADS = {
    "vqa_classifier": (rule("vqa_classifier.{i}.{t}", "classifier.{i}.{t}"),),
    "gqa_classifier": (rule("gqa_classifier.{i}.{t}", "classifier.{i}.{t}"),),
    "snli_classifier": (rule("snli_classifier.{i}.{t}", "classifier.{i}.{t}"),),
    "nlvr2_classifier": (rule("nlvr2_classifier.{i}.{t}", "classifier.{i}.{t}"),),
    "rank_output": (rule("rank_output.{t}", "rank_output.{t}"),),
    "itm_score": (rule("itm_score.fc.{t}", "rank_output.{t}", adapt=second_row),),
    "mlm_score": (
        rule("mlm_score.bias", "mlm_score.decoder.bias"),
        rule("mlm_score.{rest}", "mlm_score.{rest}"),
    ),
}
LEFT_OUT = {
    "{rest}.position_ids": "a buffer that the model makes itself",
    "das_gate": "DAS's search, not a weight",
    "skip_num": "DAS's search, not a weight",
}
CLASS_TOKEN = "token4classifier"
BACKBONE = "{backbone}"  # in front of a name
ATTACHED = "what is attached"  # in a report
REFUSED = {
    "{rest}.APT.weight": (
        "an older name, either of what is .APT.scale now, if the code multiplies the layer's output by its exponential "
        "(rename it in the file), or of part of a gate, which the layers here do not have"
    ),
}


class Architecture(NamedTuple):
    """All that is known of the files of one architecture.

    Attributes:
        title: its name.
        child: where models with a head keep the backbone.
        landmark: a tensor that every backbone has.
        origin: what its files are, as origins.py says.
        backbone: rules; their names are relative to the backbone.
        layers: (stem of the keys in the file, stem of the names in the backbone, LayerNames).
        heads: {model class: roots of the heads that fit it, the preferred first}.
        left_out: {key with placeholders: why it is left out}, of this architecture alone.
        class_token: the module of the backbone that carries a class token.
        epsilons: {norm, with placeholders: what the authors' adds to the variance}, where the model's configuration
            does not say it.
        trains_scale: whether the authors' code trains APT's scale.
    """

    title: str
    child: str
    landmark: str
    origin: str
    backbone: tuple
    layers: tuple
    heads: dict
    left_out: dict
    class_token: str
    epsilons: dict
    trains_scale: bool


def load_checkpoint(model, source, ignore, architecture):
    """Fills a model of that architecture. Arguments, result and errors are those of `load_vilt_checkpoint`."""
    prefix = _prefix(model, architecture)
    checkpoint = opened(source, ignore, architecture.origin)
    before = attached_configs(model)
    with unchanged_on_error(model):
        _attach_class_token(model, checkpoint, prefix + architecture.class_token)
        report = fill(model, checkpoint, _layout(model, architecture, prefix))
    filled = [name for key in report.keys for name in key.names]
    if not architecture.trains_scale and any(name.endswith(".apt.log_scale") for name in filled):
        freeze_scales(model)
    epsilons = {line.replace(BACKBONE, prefix): value for line, value in architecture.epsilons.items()}
    settings = _set_epsilons(model, epsilons)
    after = attached_configs(model)
    if after != before:
        settings[ATTACHED] = f"{listed(list(map(str, after)))}, was {listed(list(map(str, before)))}"
    return dataclasses.replace(report, settings=settings)


def _prefix(model, architecture):
    """How the names of the backbone's tensors begin."""
    tensors = tensors_of(model, architecture.title)
    prefix = f"{architecture.child}." if hasattr(model, architecture.child) else ""
    if prefix + architecture.landmark not in tensors:
        raise TypeError(
            f"{type(model).__name__} is no {architecture.title} model: it has no {architecture.landmark}, "
            f"neither of its own nor in {architecture.child!r}"
        )
    return prefix


def _layout(model, architecture, prefix):
    class_token = rule(CLASS_TOKEN, f"{architecture.class_token}.class_token.vector")
    return Layout(
        model_tensors=tensors_of(model, architecture.title),
        rules=tuple(
            each._replace(names=tuple(prefix + name for name in each.names))
            for each in (*_layer_rules(architecture), class_token, *architecture.backbone)
        ),
        needed=(prefix,),
        heads={root: HEADS[root] for root in _heads_for(model, architecture)},
        left_out=LEFT_OUT | architecture.left_out,
        refused=REFUSED,
        attached=attached_configs(model),
    )


def _attach_class_token(model, checkpoint, site):
    """The model gets a class token where the checkpoint holds one."""
    if checkpoint.wanted(CLASS_TOKEN) is None or hasattr(model.get_submodule(site), "class_token"):
        return
    try:
        add_class_token(model)
    except ValueError as error:
        raise ValueError(
            f"{checkpoint.name} holds {CLASS_TOKEN}, but no class token can be attached to {type(model).__name__}; "
            f"name it in ignore to do without, which computes something else: {error}"
        ) from error


def _set_epsilons(model, epsilons):
    """Gives the norms of these names what they add to the variance; returns what has changed."""
    settings = {}
    for name, module in model.named_modules():
        wanted = lookup(epsilons, name)
        if wanted is not None and getattr(module, "eps", wanted) != wanted:
            settings[f"{name}.eps"] = f"{wanted}, was {module.eps}"
            module.eps = wanted
    return settings


def _layer_rules(architecture):
    return [
        Rule(f"{theirs}.{old}", (f"{ours}.{new}",), layer=layer)
        for theirs, ours, layer in architecture.layers
        for old, new in layer.parts.items()
    ]


def _heads_for(model, architecture):
    """The roots of the heads that fit a model of this class or of a class derived from it."""
    return next((architecture.heads[c.__name__] for c in type(model).__mro__ if c.__name__ in architecture.heads), ())
