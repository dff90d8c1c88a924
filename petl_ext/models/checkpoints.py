"""Checkpoints of the original authors for ViLT and METER models: the one place that knows their names.

Sources: the authors' ViLT and METER code bases, and those of APT and DAS, which add layers to both. All save Lightning
checkpoints, whose weights are under "state_dict". The tables below give each key of such a file its name here.
"""

import functools
import pickle
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from petl_ext.models.meter import grid_side, resize_position_embeddings

LISTED = 8
UNKNOWN = "unknown keys"
TIED = "two tensors in the file, one in the model; set config.tie_word_embeddings = False before it is made"
# Older versions of Lightning use the class of a callback as the key of what the file holds of it. It is read as the
# inert `LightningClass`.
LIGHTNING_CLASSES = ("pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint",)
# What stands in braces in the tables.
PLACEHOLDERS = {
    "i": r"\d+",
    "t": "weight|bias",
    "stream": "text|image",
    "attention": "attention|crossattention",
    "head": r"\w+_classifier|\w+_score|rank_output",
    "clip_text": "transformer|token_embedding|positional_embedding|ln_final|text_projection|logit_scale",
    "rest": ".+",
}


def load_vilt_checkpoint(model, path, ignore=()):
    """Fills a Hugging Face ViLT model with a checkpoint of the authors' ViLT code base, or of APT's or DAS's ViLT.

    The head is picked by the model's class: `vqa_classifier`, `gqa_classifier` or `snli_classifier` for
    ViltForQuestionAnswering, `nlvr2_classifier` for ViltForImagesAndTextClassification, `rank_output` for
    ViltForImageAndTextRetrieval, `mlm_score` for ViltForMaskedLM. A file without that head leaves the model's as it is;
    but a retrieval head then becomes row 1 of the file's `itm_score`, from which the original starts it. Position
    embeddings [1, 1 + g * g, D] of another grid are resized bicubically, and a third token type starts as a copy of the
    second.

    Attach APT or adapters before loading a file that holds them. What the file does not say stays as it was attached:
    activations, and the scale of adapters (4 in APT's parallel ones, 1 in DAS's). Load before layers are removed for
    good.

    NaN and infinity in the file are loaded, and the report says so. Finite values that the model's dtype cannot hold
    are refused.

    Args:
        model: a ViltModel or a ViltFor... model.
        path: a Lightning checkpoint, or its state dict alone, as written by torch.save. Nothing in it is executed.
        ignore: names of the file's keys, or parts that end at a dot: ["token4classifier", "vqa_classifier."].

    Returns:
        A `CheckpointReport`: what became of every key, and which of the model's tensors the file has not filled.

    Raises:
        TypeError: the model is no ViLT, or ignore is no list of names.
        FileNotFoundError: there is no such file.
        ValueError: the file is broken, holds more than data, is of another architecture, or does not fit the model:
            unknown keys, other shapes, layers of another method than is attached, tensors of the backbone that it
            lacks. The model has not changed.
    """
    return _load(model, path, ignore, VILT)


def load_meter_checkpoint(model, path, ignore=()):
    """Fills our METER with a checkpoint of the authors' METER code base (CLIP and RoBERTa), or of APT's or DAS's METER.

    As `load_vilt_checkpoint`. The head is `vqa_classifier` or `gqa_classifier` for MeterForQuestionAnswering,
    `snli_classifier` for MeterForVisualEntailment, `nlvr2_classifier` for MeterForImagesAndTextClassification,
    `rank_output` for MeterForImageAndTextRetrieval. Position embeddings [1 + g * g, D] are resized bicubically to the
    model's image size, as the original does. What the file holds of CLIP's text tower and of RoBERTa's pooler is left
    out.

    Args:
        model: a MeterModel or a MeterFor... model.
        path, ignore: those of `load_vilt_checkpoint`.

    Returns:
        A `CheckpointReport`.

    Raises:
        TypeError, FileNotFoundError, ValueError: as `load_vilt_checkpoint`.
    """
    return _load(model, path, ignore, METER)


class KeyOutcome(NamedTuple):
    """What became of one key of the file.

    Attributes:
        key: its name in the file.
        action: "loaded", "split", "adapted", "left out" or "ignored".
        names: the tensors of the model that it filled.
        note: how it was adapted, or why it was left out.
    """

    key: str
    action: str
    names: tuple = ()
    note: str = ""

    def __str__(self):
        arrow = f" -> {', '.join(self.names)}" if self.names else ""
        return f"{self.key}{arrow}{': ' + self.note if self.note else ''}"


@dataclass(frozen=True)
class CheckpointReport:
    """What a checkpoint did to a model. Prints as a text.

    Attributes:
        path: the file.
        model: the name of the model's class.
        keys: a `KeyOutcome` for every key, in the file's order.
        unfilled: {name: why that is all right} of the model's tensors that the file has not filled.
        conversions: {(dtype in the file, dtype in the model): how many keys}, where the two differ.
        not_finite: the keys that fill the model and hold NaN or infinity in the file.
    """

    path: str
    model: str
    keys: tuple
    unfilled: dict
    conversions: dict
    not_finite: tuple = ()

    def __str__(self):
        lines = [f"{self.path} -> {self.model}"]
        lines += [f"{count} keys converted from {old} to {new}" for (old, new), count in self.conversions.items()]
        if self.not_finite:
            lines.append(f"NaN or infinity in {len(self.not_finite)} keys of the file: {', '.join(self.not_finite)}")
        for action in ("loaded", "split", "adapted", "left out", "ignored"):
            lines += _section(action, [str(outcome) for outcome in self.keys if outcome.action == action])
        lines += _section("not in the file", [f"{name}: {why}" for name, why in self.unfilled.items()])
        return "\n".join(lines)


class Rule(NamedTuple):
    """What becomes of keys of the file.

    Attributes:
        key: the key, with placeholders.
        names: of the model's tensors; into several of them the tensor is cut along its first axis.
        adapt: (tensor, wanted shape) -> (tensor, what was done or ""), or None.
        absent: why the key is left out if the model has no such tensor; "" makes that an error.
        layer: the `LayerNames` of a key of an attached layer, or None.
    """

    key: str
    names: tuple
    adapt: object = None
    absent: str = ""
    layer: object = None


class LayerNames(NamedTuple):
    """One kind of layer that the code bases add.

    Attributes:
        config: what attaches it here, with sizes in braces.
        placement: of that config. Several methods give their tensors the same names here, but compute something else.
        sizes: {size: the tensor in the file whose first axis it is}.
        parts: {tensor in the file: tensor here}.
    """

    config: str
    placement: str
    sizes: dict
    parts: dict


class Family(NamedTuple):
    """All that is known of one architecture.

    Attributes:
        title: its name.
        child: where models with a head keep the backbone.
        landmark: a tensor that every backbone has.
        origin: which entry of ORIGINS its files are.
        backbone: rules; their names are relative to the backbone.
        layers: (place in the file, place in the backbone, LayerNames).
        heads: {model class: roots of the heads that fit it, the preferred first}.
        class_token: what the file's token4classifier replaces.
    """

    title: str
    child: str
    landmark: str
    origin: str
    backbone: tuple
    layers: tuple
    heads: dict
    class_token: str


class LightningClass:
    """Stands for a class of the framework that wrote a file. Does nothing."""


def _resized(tensor, shape):
    """Position embeddings [1 + g * g, D] or [1, 1 + g * g, D]."""
    old, new = grid_side(tensor.size(-2)), grid_side(shape[-2])
    if tensor.shape[:-2] != shape[:-2] or old == new or 0 in (old, new):
        return tensor, ""
    resized = resize_position_embeddings(tensor.flatten(0, -2), new).reshape(*shape[:-1], -1)
    return resized, f"a grid of {old} x {old} positions resized bicubically to {new} x {new}"


def _with_third_row(tensor, shape):
    if len(tensor) != 2 or shape[0] != 3:
        return tensor, ""
    return tensor[[0, 1, 1]], "row 2 is a copy of row 1, as the original starts NLVR2"


def _second_row(tensor, shape):
    return tensor[1:2] if len(tensor) == 2 else tensor, "row 1 alone, as the original starts retrieval"


def _rule(key, *names, **options):
    return Rule(key, names, **options)


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
# Where petl_ext.attach leaves its handle; models import nothing of it.
HANDLE = "petl_attachment"
# The children under which petl_ext.attach puts its layers into a model.
LAYER_CHILDREN = ("apt", "adapter", "bypass", "deep_prompts")

_FUSION = "cross_modal_{stream}_layers.{i}"

VILT = Family(
    title="ViLT",
    child="vilt",
    landmark="embeddings.patch_embeddings.projection.weight",
    origin="an original ViLT checkpoint",
    backbone=(
        _rule("text_embeddings.{rest}", "embeddings.text_embeddings.{rest}"),
        _rule("transformer.cls_token", "embeddings.cls_token"),
        _rule("transformer.pos_embed", "embeddings.position_embeddings", adapt=_resized),
        _rule("transformer.patch_embed.proj.{t}", "embeddings.patch_embeddings.projection.{t}"),
        _rule("transformer.blocks.{i}.norm1.{t}", "encoder.layer.{i}.layernorm_before.{t}"),
        _rule(
            "transformer.blocks.{i}.attn.qkv.{t}",
            "encoder.layer.{i}.attention.attention.query.{t}",
            "encoder.layer.{i}.attention.attention.key.{t}",
            "encoder.layer.{i}.attention.attention.value.{t}",
        ),
        _rule("transformer.blocks.{i}.attn.proj.{t}", "encoder.layer.{i}.attention.output.dense.{t}"),
        _rule("transformer.blocks.{i}.norm2.{t}", "encoder.layer.{i}.layernorm_after.{t}"),
        _rule("transformer.blocks.{i}.mlp.fc1.{t}", "encoder.layer.{i}.intermediate.dense.{t}"),
        _rule("transformer.blocks.{i}.mlp.fc2.{t}", "encoder.layer.{i}.output.dense.{t}"),
        _rule("transformer.norm.{t}", "layernorm.{t}"),
        _rule("token_type_embeddings.weight", "embeddings.token_type_embeddings.weight", adapt=_with_third_row),
        _rule("pooler.dense.{t}", "pooler.dense.{t}", absent="this model has no pooler"),
    ),
    layers=(
        ("transformer.blocks.{i}.attn.APT", "encoder.layer.{i}.attention.output.apt", APT),
        ("transformer.blocks.{i}.adapter0", "encoder.layer.{i}.attention.output.adapter", SEQUENTIAL_ADAPTER),
        ("transformer.blocks.{i}.adapter1", "encoder.layer.{i}.output.adapter", SEQUENTIAL_ADAPTER),
        ("transformer.blocks.{i}.attn.PA", "encoder.layer.{i}.attention.output.adapter", PARALLEL_ADAPTER),
        ("transformer.blocks.{i}.adapter0", "encoder.layer.{i}.adapter", DAS_ADAPTER),
        ("transformer.blocks.{i}.adapter1", "encoder.layer.{i}.output.adapter", DAS_ADAPTER),
        ("adapter_list.{i}.0", "encoder.layer.{i}.bypass", DAS_BYPASS),
    ),
    heads={
        "ViltForQuestionAnswering": ("vqa_classifier", "gqa_classifier", "snli_classifier"),
        "ViltForImagesAndTextClassification": ("nlvr2_classifier",),
        "ViltForImageAndTextRetrieval": ("rank_output", "itm_score"),
        "ViltForMaskedLM": ("mlm_score",),
    },
    class_token="the embedding of [CLS]",
)

METER = Family(
    title="METER",
    child="meter",
    landmark="vit_model.embeddings.patch_embedding.weight",
    origin="an original METER checkpoint",
    backbone=(
        _rule(
            "text_transformer.pooler.{rest}", "text_transformer.pooler.{rest}", absent="METER does not use this pooler"
        ),
        _rule("text_transformer.{rest}", "text_transformer.{rest}"),
        _rule("vit_model.visual.conv1.weight", "vit_model.embeddings.patch_embedding.weight"),
        _rule("vit_model.visual.class_embedding", "vit_model.embeddings.class_embedding"),
        _rule(
            "vit_model.visual.positional_embedding", "vit_model.embeddings.position_embedding.weight", adapt=_resized
        ),
        _rule("vit_model.visual.ln_pre.{t}", "vit_model.pre_layrnorm.{t}"),
        _rule("vit_model.visual.transformer.resblocks.{i}.ln_1.{t}", "vit_model.encoder.layers.{i}.layer_norm1.{t}"),
        _rule(
            "vit_model.visual.transformer.resblocks.{i}.attn.in_proj_{t}",
            "vit_model.encoder.layers.{i}.self_attn.q_proj.{t}",
            "vit_model.encoder.layers.{i}.self_attn.k_proj.{t}",
            "vit_model.encoder.layers.{i}.self_attn.v_proj.{t}",
        ),
        _rule(
            "vit_model.visual.transformer.resblocks.{i}.attn.out_proj.{t}",
            "vit_model.encoder.layers.{i}.self_attn.out_proj.{t}",
        ),
        _rule("vit_model.visual.transformer.resblocks.{i}.ln_2.{t}", "vit_model.encoder.layers.{i}.layer_norm2.{t}"),
        _rule("vit_model.visual.transformer.resblocks.{i}.mlp.c_fc.{t}", "vit_model.encoder.layers.{i}.mlp.fc1.{t}"),
        _rule("vit_model.visual.transformer.resblocks.{i}.mlp.c_proj.{t}", "vit_model.encoder.layers.{i}.mlp.fc2.{t}"),
        _rule("vit_model.visual.ln_post.{t}", "vit_model.post_layernorm.{t}"),
        _rule("token_type_embeddings.weight", "token_type_embeddings.weight", adapt=_with_third_row),
        _rule("cross_modal_{rest}", "cross_modal_{rest}"),
    ),
    layers=(
        (f"{_FUSION}.{{attention}}.output.APT", f"{_FUSION}.{{attention}}.output.apt", APT),
        (f"{_FUSION}.{{attention}}.output.adapter", f"{_FUSION}.{{attention}}.output.adapter", SEQUENTIAL_ADAPTER),
        (f"{_FUSION}.output.adapter", f"{_FUSION}.output.adapter", SEQUENTIAL_ADAPTER),
        (f"{_FUSION}.{{attention}}.output.PA", f"{_FUSION}.{{attention}}.output.adapter", PARALLEL_ADAPTER),
        (f"{_FUSION}.{{attention}}.output.adapter", f"{_FUSION}.{{attention}}.output.adapter", DAS_ADAPTER),
        (f"{_FUSION}.adapter", f"{_FUSION}.output.adapter", DAS_ADAPTER),
        ("adapter_list_l.{i}.0", "cross_modal_text_layers.{i}.bypass", DAS_BYPASS),
        ("adapter_list_v.{i}.0", "cross_modal_image_layers.{i}.bypass", DAS_BYPASS),
    ),
    heads={
        "MeterForQuestionAnswering": ("vqa_classifier", "gqa_classifier"),
        "MeterForVisualEntailment": ("snli_classifier",),
        "MeterForImagesAndTextClassification": ("nlvr2_classifier",),
        "MeterForImageAndTextRetrieval": ("rank_output", "itm_score"),
    },
    class_token="the text transform's output for <s>",
)

# By root in the file; the names are those of whole models.
HEADS = {
    "vqa_classifier": (_rule("vqa_classifier.{i}.{t}", "classifier.{i}.{t}"),),
    "gqa_classifier": (_rule("gqa_classifier.{i}.{t}", "classifier.{i}.{t}"),),
    "snli_classifier": (_rule("snli_classifier.{i}.{t}", "classifier.{i}.{t}"),),
    "nlvr2_classifier": (_rule("nlvr2_classifier.{i}.{t}", "classifier.{i}.{t}"),),
    "rank_output": (_rule("rank_output.{t}", "rank_output.{t}"),),
    "itm_score": (_rule("itm_score.fc.{t}", "rank_output.{t}", adapt=_second_row),),
    "mlm_score": (
        _rule("mlm_score.bias", "mlm_score.decoder.bias"),
        _rule("mlm_score.{rest}", "mlm_score.{rest}"),
    ),
}
LEFT_OUT = {
    "{rest}.position_ids": "a buffer that the model makes itself",
    "das_gate": "DAS's search, not a weight",
    "skip_num": "DAS's search, not a weight",
    "vit_model.visual.proj": "CLIP's projection to its joint space, which METER does not use",
    "vit_model.{clip_text}": "CLIP's text tower, which METER does not use",
    "vit_model.{clip_text}.{rest}": "CLIP's text tower, which METER does not use",
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
# What a file is, by the first line that any of its keys matches, and what to do with it.
_NOT_ORIGINAL = "use from_pretrained, or load_state_dict of a model of the same class"
ORIGINS = (
    ("vit_model.visual.{rest}", METER.origin, "use load_meter_checkpoint"),
    ("transformer.blocks.{i}.attn.qkv.weight", VILT.origin, "use load_vilt_checkpoint"),
    ("vit_model.layers.{rest}", "a METER with a Swin image encoder", "the METER here has CLIP's"),
    ("vit_model.embeddings.{rest}", "a state dict of the MeterModel of petl_ext", _NOT_ORIGINAL),
    ("meter.{rest}", "a state dict of a METER of petl_ext", _NOT_ORIGINAL),
    ("vilt.{rest}", "a state dict of a Hugging Face ViLT", _NOT_ORIGINAL),
    ("embeddings.text_embeddings.{rest}", "a state dict of a Hugging Face ViltModel", _NOT_ORIGINAL),
    ("module.{rest}", "a state dict of a model in DataParallel", 'take the leading "module." off its keys'),
)


def _load(model, path, ignore, family):
    places = _places(model, family)
    path = Path(path)
    tensors = _read(path)
    _check_origin(path, tensors, family)
    plan = _Plan(model, places, family, tensors, _ignored(path, tensors, ignore))
    for key in tensors:
        plan.take(key)
    unfilled = plan.unfilled()
    if plan.problems:
        lines = [f"  {title} ({len(entries)}): {_listed(entries)}" for title, entries in plan.problems.items()]
        raise ValueError("\n".join([f"{path} does not fit {type(model).__name__}, which has not changed:", *lines]))
    with torch.no_grad():
        for name, tensor in plan.filled.items():
            places[name].copy_(tensor)
    outcomes, conversions = tuple(plan.outcomes), dict(plan.conversions)
    return CheckpointReport(str(path), type(model).__name__, outcomes, unfilled, conversions, tuple(plan.not_finite))


class _Plan:
    """What is to become of every key, worked out before anything in the model changes.

    Attributes:
        filled: {name: new tensor, in the model's dtype}.
        outcomes: a list of KeyOutcome.
        conversions: a Counter of (dtype in the file, dtype in the model).
        not_finite: a dict whose keys are those of the file that hold NaN or infinity.
        problems: {title: a list of what is wrong}.
    """

    def __init__(self, model, places, family, tensors, ignored):
        self.places = places
        self.family = family
        self.tensors = tensors
        self.ignored = ignored
        self.model_class = type(model).__name__
        self.prefix = _prefix(model, family)
        self.attached = [vars(module)[HANDLE].config for module in model.modules() if HANDLE in vars(module)]
        self.buffers = {name for name, _ in model.named_buffers(remove_duplicate=False)}
        self.heads = _heads_for(model, family)
        self.head = next((root for root in self.heads if any(key.startswith(f"{root}.") for key in tensors)), None)
        self.rules = _rules(family, self.prefix, self.head)
        self.filled, self.excused = {}, set()
        self.outcomes, self.conversions, self.not_finite, self.problems = [], Counter(), {}, {}

    def take(self, key):
        rule, names = self._target(key)
        if key in self.ignored:
            self.excused.update(names)
            self._record(key, "ignored", note="on request")
        elif reason := _lookup(REFUSED, key):
            self._problem(reason.format(class_token=self.family.class_token), key)
        elif reason := _lookup(LEFT_OUT, key):
            self._record(key, "left out", note=reason)
        elif rule is None:
            self._take_other_head(key)
        elif rule.layer and (reason := self._layer_problem(key, rule.layer, names)):
            self._problem(reason, key)
        elif all(name in self.places for name in names):
            self._fill(key, rule, names)
        elif rule.absent:
            self._record(key, "left out", note=rule.absent)
        else:
            self._problem(UNKNOWN, key)

    def unfilled(self):
        """{name: why that is all right} of the tensors that no key fills; where it is not, that is a problem."""
        owners = {}
        for name, tensor in self.filled.items():
            owner = owners.setdefault(id(self.places[name]), name)
            if name != owner and not torch.allclose(tensor, self.filled[owner], rtol=0, atol=0, equal_nan=True):
                self._problem(TIED, f"{owner} and {name}")
        reasons = {
            name: self._why_unfilled(name, owners.get(id(place)))
            for name, place in self.places.items()
            if name not in self.filled
        }
        for name, reason in reasons.items():
            if not reason:
                self._problem("tensors of the model that the file lacks", name)
        return reasons

    def _target(self, key):
        for rule in self.rules:
            if match := _pattern(rule.key).fullmatch(key):
                return rule, tuple(name.format(**match.groupdict()) for name in rule.names)
        return None, ()

    def _take_other_head(self, key):
        root = key.partition(".")[0]
        if not _pattern("{head}").fullmatch(root):
            self._problem(UNKNOWN, key)
        elif root in self.heads:
            self._record(key, "left out", note=f"{self.head} is loaded instead")
        else:
            self._record(key, "left out", note="this model has no such head")

    def _fill(self, key, rule, names):
        tensor, note = self.tensors[key], ""
        if storage := _unusual_storage(tensor):
            self.excused.update(names)
            self._problem("no dense tensors", f"{key} {storage}")
            return
        wanted = [self.places[name].shape for name in names]
        if rule.adapt and tensor.dim() == len(wanted[0]):
            tensor, note = rule.adapt(tensor, wanted[0])
        pieces = tensor.chunk(len(names)) if tensor.dim() else (tensor,)
        if [piece.shape for piece in pieces] != wanted:
            self.excused.update(names)  # named here, and so not once more as lacking
            self._problem(self._misfit(key), self._both_shapes(key, names))
            return
        for name, piece in zip(names, pieces, strict=True):
            self._fill_one(key, name, piece)
        action = "split" if len(names) > 1 else "adapted" if note else "loaded"
        self._record(key, action, names, note)
        dtypes = [str(t.dtype).removeprefix("torch.") for t in (self.tensors[key], self.places[names[0]])]
        if dtypes[0] != dtypes[1]:
            self.conversions[tuple(dtypes)] += 1

    def _fill_one(self, key, name, piece):
        place = self.places[name]
        if not (piece.is_floating_point() and place.is_floating_point()):
            self._problem("not floating-point", f"{key} {piece.dtype} for {name} {place.dtype}")
        elif name in self.filled:
            self._problem("filled by another key too", f"{name} by {key}")
        else:
            self.filled[name] = piece.to(place.dtype)
            self._check_finite(key, name, piece)

    def _check_finite(self, key, name, piece):
        finite = self.filled[name].isfinite()
        if finite.all():
            return
        finite_in_file = piece.double().isfinite()
        if (finite_in_file & ~finite).any():
            dtype = str(self.filled[name].dtype).removeprefix("torch.")
            self._problem(f"values beyond the range of {dtype}", f"{key} for {name}")
        if not finite_in_file.all():
            self.not_finite[key] = True

    def _why_unfilled(self, name, owner):
        root = name.partition(".")[0]
        child = next((part for part in name.split(".") if part in LAYER_CHILDREN), None)
        if owner:
            return f"one tensor with {owner}"
        if name in self.buffers:
            return "a buffer that the model makes itself"
        if name in self.excused:
            return "its key is ignored on request"
        if not name.startswith(self.prefix) and not any(other.startswith(f"{root}.") for other in self.filled):
            return "stays as it is: the file holds no head for this model"
        if child and not any(child in other.split(".") for other in self.filled):
            return "stays as it is: the file holds no such layers"
        return ""

    def _layer_problem(self, key, layer, names):
        """Why the key of an attached layer cannot fill these tensors, or an empty string."""
        placements = {config.placement for config in self.attached} - {None}
        if placements and layer.placement not in placements:
            attached = ", ".join(map(str, self.attached))
            return (
                f"layers of another method than is attached: the file's are those of {self._config(key, layer)}, "
                f"the model's of {attached}"
            )
        if not all(name in self.places for name in names):
            return f"layers that the model does not have there; attach {self._config(key, layer)} first"
        if not placements:  # the model is a part of the one that knows
            return "layers whose method cannot be told; load into the model that petl_ext.attach was given"
        return ""

    def _config(self, key, layer):
        part = next(part for part in layer.parts if key.endswith(f".{part}"))
        stem = key.removesuffix(part)
        sizes = {field: self.tensors.get(stem + other) for field, other in layer.sizes.items()}
        sizes = {field: len(tensor) if tensor is not None and tensor.dim() else "?" for field, tensor in sizes.items()}
        return layer.config.format(**sizes)

    def _misfit(self, key):
        root = key.partition(".")[0]
        if root == self.head:
            return f"a head of other sizes: give the model its num_labels, or name {root!r} in ignore to keep its own"
        return "shapes that do not fit"

    def _both_shapes(self, key, names):
        shapes = ", ".join(f"{name} {list(self.places[name].shape)}" for name in names)
        return f"{key} {list(self.tensors[key].shape)} for {shapes}"

    def _record(self, key, action, names=(), note=""):
        self.outcomes.append(KeyOutcome(key, action, names, note))

    def _problem(self, title, entry):
        self.problems.setdefault(title, []).append(entry)


def _places(model, family):
    """{name: tensor} of the model's parameters and buffers, those that share a tensor too."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected a {family.title} model, got {type(model).__name__}")
    places = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    if _prefix(model, family) + family.landmark not in places:
        raise TypeError(
            f"{type(model).__name__} is no {family.title} model: it has no {family.landmark}, neither of its own nor "
            f"in {family.child!r}"
        )
    for name, tensor in places.items():
        if tensor.is_meta:
            raise ValueError(f"{name} of {type(model).__name__} is on the meta device; make the model on another first")
    return places


def _prefix(model, family):
    return f"{family.child}." if hasattr(model, family.child) else ""


def _heads_for(model, family):
    """The roots of the heads that fit a model of this class or of a class derived from it."""
    return next((family.heads[c.__name__] for c in type(model).__mro__ if c.__name__ in family.heads), ())


def _rules(family, prefix, head):
    layers = [
        Rule(f"{place}.{old}", (f"{site}.{new}",), layer=layer)
        for place, site, layer in family.layers
        for old, new in layer.parts.items()
    ]
    rules = [rule._replace(names=tuple(prefix + name for name in rule.names)) for rule in (*layers, *family.backbone)]
    return (*rules, *HEADS.get(head, ()))


def _read(path):
    """{key: tensor} of the file."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: there is no such file")
    inert = torch.serialization.safe_globals([(LightningClass, name) for name in LIGHTNING_CLASSES])
    with path.open("rb") as file, inert:
        content = _unpickled(path, file)
    tensors = content.get("state_dict", content) if isinstance(content, dict) else content
    if not isinstance(tensors, dict):
        raise ValueError(
            f"{path}: expected a state dict, by itself or under 'state_dict', got {type(tensors).__name__}"
        )
    for key, value in tensors.items():
        if not isinstance(key, str) or not isinstance(value, torch.Tensor):
            raise ValueError(
                f"{path}: expected a Lightning checkpoint with 'state_dict', or tensors by name; {key!r} holds "
                f"{type(value).__name__}"
            )
    return tensors


def _unpickled(path, file):
    _check_format(path, file)
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(_refusal(path, error)) from error
    except Exception as error:  # there is no telling what a broken file raises
        detail = f"{type(error).__name__}: {_first_line(error)}"
        raise ValueError(f"{path} is no checkpoint, or not a whole one ({detail})") from error


def _check_format(path, file):
    """By the file's first bytes; afterwards it stands at its start again."""
    start = file.read(9)
    file.seek(0)
    if not start:
        raise ValueError(f"{path} is an empty file")
    # The length of the header, which is JSON.
    if start[8:] == b"{" and int.from_bytes(start[:8], "little") < path.stat().st_size:
        raise ValueError(
            f"{path} is a safetensors file, not one of torch.save: use from_pretrained for a Hugging Face model; if "
            "its tensors have the original names, torch.save(safetensors.torch.load_file(path), new_path) converts it"
        )
    if not start.startswith((b"PK", b"\x80")):  # a zip archive, or a pickle as older versions of torch wrote it
        raise ValueError(f"{path} is no file of torch.save: it begins with {start!r}")


def _refusal(path, error):
    unsafe = re.search(r"GLOBAL (\S+)", str(error))
    if unsafe is None:
        detail = str(error).rpartition("WeightsUnpickler error: ")[2]
        return f"{path} is no checkpoint, is broken, or holds more than data: {_first_line(detail)}"
    return (
        f"{path} is refused: it holds {unsafe[1]}, and reading that could run code. If you trust the file, read it "
        "where nothing is at risk and where the code that wrote it is installed, and keep only the weights: "
        'torch.save({"state_dict": torch.load(path, weights_only=False)["state_dict"]}, new_path)'
    )


def _check_origin(path, tensors, family):
    found = ((what, advice) for line, what, advice in ORIGINS if any(map(_pattern(line).fullmatch, tensors)))
    what, advice = next(found, ("", ""))
    if what == family.origin:
        return
    if what:
        raise ValueError(f"{path} seems to be {what}, not {family.origin}: {advice}")
    raise ValueError(f"{path} is not {family.origin}; its keys are {_listed(list(tensors))}")


def _ignored(path, tensors, ignore):
    """The keys that are one of the names in `ignore`, or begin with one and a dot."""
    if not isinstance(ignore, list | tuple) or not all(isinstance(entry, str) for entry in ignore):
        raise TypeError(f"ignore must be a list of names, got {ignore!r}")
    ignored = set()
    for entry in ignore:
        matching = {key for key in tensors if key == entry or key.startswith(f"{entry.removesuffix('.')}.")}
        if not matching:
            raise ValueError(f"ignore={entry!r} matches no key of {path}; it has {_listed(list(tensors))}")
        ignored |= matching
    return ignored


def _unusual_storage(tensor):
    """Why the tensor's values cannot be copied as they are, or an empty string."""
    if tensor.is_nested or tensor.is_meta:
        return "nested" if tensor.is_nested else "meta"
    return "" if tensor.layout is torch.strided else str(tensor.layout).removeprefix("torch.")


def _first_line(text):
    return str(text).strip().partition("\n")[0]


def _lookup(table, key):
    return next((value for line, value in table.items() if _pattern(line).fullmatch(key)), None)


@functools.cache
def _pattern(line):
    """The regular expression that a line of the tables stands for."""
    return re.compile(re.sub(r"\\{(\w+)\\}", lambda match: _group(match[1]), re.escape(line)))


def _group(placeholder):
    return f"(?P<{placeholder}>{PLACEHOLDERS[placeholder]})"


def _listed(entries):
    more = f" and {len(entries) - LISTED} more" if len(entries) > LISTED else ""
    return (", ".join(entries[:LISTED]) or "none") + more


def _section(title, entries):
    return [f"{title} ({len(entries)})", *(f"  {entry}" for entry in entries)] if entries else []
