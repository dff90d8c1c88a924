"""What ViLT's and METER's files have in common: heads, and the layers that the code bases of APT and DAS add. DVP's
adapters have the names of the sequential ones.
"""

from typing import NamedTuple

from petl_ext.models.checkpoints.adapt import second_row
from petl_ext.models.checkpoints.plan import Layout, attached_configs, fill, places_of
from petl_ext.models.checkpoints.rules import LayerNames, Rule, rule

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
DAS_ADAPTER = PARALLEL_ADAPTER._replace(config="DASConfig(bottleneck={bottleneck})", placement="bypass")
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
REFUSED = {
    "token4classifier": (
        "a trained vector in place of {class_token} in every sample; the models here have no such parameter and "
        "compute something else than the model that was saved: name it in ignore to accept that"
    ),
    "{rest}.APT.weight": (
        "an older name, either of what is .APT.scale now, if the code multiplies the layer's output by its exponential "
        "(rename it in the file), or of part of a gate, which the layers here do not have"
    ),
}


class Family(NamedTuple):
    """All that is known of one architecture.

    Attributes:
        title: its name.
        child: where models with a head keep the backbone.
        landmark: a tensor that every backbone has.
        origin: what its files are, as origins.py says.
        backbone: rules; their names are relative to the backbone.
        layers: (place in the file, place in the backbone, LayerNames).
        heads: {model class: roots of the heads that fit it, the preferred first}.
        left_out: {key with placeholders: why it is left out}, of this architecture alone.
        class_token: what the file's token4classifier replaces.
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


def load_family(model, path, ignore, family):
    """Fills a model of the family; the arguments, what it returns and raises are those of `load_vilt_checkpoint`."""
    return fill(model, path, ignore, _layout(model, family))


def _layout(model, family):
    places = places_of(model, family.title)
    prefix = f"{family.child}." if hasattr(model, family.child) else ""
    if prefix + family.landmark not in places:
        raise TypeError(
            f"{type(model).__name__} is no {family.title} model: it has no {family.landmark}, neither of its own nor "
            f"in {family.child!r}"
        )
    return Layout(
        origin=family.origin,
        places=places,
        rules=tuple(
            each._replace(names=tuple(prefix + name for name in each.names))
            for each in (*_layer_rules(family), *family.backbone)
        ),
        needed=(prefix,),
        heads={root: HEADS[root] for root in _heads_for(model, family)},
        left_out=LEFT_OUT | family.left_out,
        refused={key: reason.format(class_token=family.class_token) for key, reason in REFUSED.items()},
        attached=attached_configs(model),
    )


def _layer_rules(family):
    return [
        Rule(f"{place}.{old}", (f"{site}.{new}",), layer=layer)
        for place, site, layer in family.layers
        for old, new in layer.parts.items()
    ]


def _heads_for(model, family):
    """The roots of the heads that fit a model of this class or of a class derived from it."""
    return next((family.heads[c.__name__] for c in type(model).__mro__ if c.__name__ in family.heads), ())
