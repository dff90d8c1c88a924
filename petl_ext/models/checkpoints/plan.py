"""Fills a model from a file: all is worked out, and may be refused, before anything in the model changes."""

from collections import Counter
from typing import NamedTuple

import torch
from torch import nn

from petl_ext.attaching.methods import CONFIGS
from petl_ext.composing import HANDLE
from petl_ext.models.checkpoints.origins import check_origin
from petl_ext.models.checkpoints.read import read
from petl_ext.models.checkpoints.report import CheckpointReport, KeyOutcome
from petl_ext.models.checkpoints.rules import lookup, pattern, rule_of
from petl_ext.printing import listed

UNKNOWN = "unknown keys"
TIED = "two tensors in the file, one in the model; set config.tie_word_embeddings = False before it is made"
# The children under which petl_ext.attach puts its layers into a model.
LAYER_CHILDREN = {
    site_class.child
    for config in CONFIGS.values()
    for site_classes in config.site_classes.values()
    for site_class in site_classes
}


class Layout(NamedTuple):
    """What there is to know of a model before its file is read.

    Attributes:
        model_tensors: {name: tensor} of its parameters and buffers, as `tensors_of` gives them.
        rules: for the keys of its files, but those of heads.
        needed: how the names begin of what every file must fill; the rest are heads.
        heads: {root in the file: rules} of the heads that fit it, the preferred first.
        left_out: {key with placeholders: why it is left out}.
        refused: {key with placeholders: why the file is refused}.
        attached: what `attached_configs` gives.
    """

    model_tensors: dict
    rules: tuple
    needed: tuple
    heads: dict
    left_out: dict
    refused: dict
    attached: tuple


def tensors_of(model, title):
    """{name: tensor} of a model's parameters and buffers, those that share a tensor too.

    Raises:
        TypeError: it is no model.
        ValueError: it is on the meta device.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a {title} model, got {type(model).__name__}")
    tensors = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    for name, tensor in tensors.items():
        if tensor.is_meta:
            raise ValueError(f"{name} of {type(model).__name__} is on the meta device; make the model on another first")
    return tensors


def attached_configs(model):
    """The configurations of what petl_ext.attach has put into the model."""
    return tuple(vars(module)[HANDLE].config for module in model.modules() if HANDLE in vars(module))


def opened(source, ignore, origin):
    """The `Checkpoint` of a path or a state dict, which must be what `origin` says, as origins.py has it.

    Raises:
        TypeError, FileNotFoundError, ValueError: those of `load_vilt_checkpoint` that do not depend on the model.
    """
    checkpoint = read(source)
    check_origin(checkpoint, origin)
    return checkpoint._replace(ignored=_ignored(checkpoint, ignore))


def fill(model, checkpoint, layout):
    """Fills the model with a `Checkpoint`.

    Returns:
        A `CheckpointReport`.

    Raises:
        ValueError: it does not fit. Nothing has been copied.
    """
    plan = _Plan(model, layout, checkpoint)
    for key in checkpoint.tensors:
        plan.take(key)
    unfilled = plan.unfilled()
    if plan.problems:
        lines = [f"  {title} ({len(entries)}): {listed(entries)}" for title, entries in plan.problems.items()]
        title = f"{checkpoint.name} does not fit {type(model).__name__}, which has not changed:"
        raise ValueError("\n".join([title, *lines]))
    with torch.no_grad():
        for name, tensor in plan.filled.items():
            layout.model_tensors[name].copy_(tensor)
    outcomes, conversions = tuple(plan.outcomes), dict(plan.conversions)
    return CheckpointReport(
        checkpoint.name, type(model).__name__, outcomes, unfilled, conversions, tuple(plan.not_finite)
    )


class _Plan:
    """What is to become of every key, worked out before anything in the model changes.

    Attributes:
        filled: {name: new tensor, in the model's dtype}.
        outcomes: a list of KeyOutcome.
        conversions: a Counter of (dtype in the file, dtype in the model).
        not_finite: a dict whose keys are those of the file that hold NaN or infinity.
        problems: {title: a list of what is wrong}.
    """

    def __init__(self, model, layout, checkpoint):
        self.layout = layout
        self.model_tensors = layout.model_tensors
        self.tensors = tensors = checkpoint.tensors
        self.ignored = checkpoint.ignored
        self.buffers = {name for name, _ in model.named_buffers(remove_duplicate=False)}
        self.head = next((root for root in layout.heads if any(key.startswith(f"{root}.") for key in tensors)), None)
        self.rules = (*layout.rules, *layout.heads.get(self.head, ()))
        self.filled, self.excused = {}, set()
        self.outcomes, self.conversions, self.not_finite, self.problems = [], Counter(), {}, {}

    def take(self, key):
        rule = rule_of(key, self.rules)
        if key in self.ignored:
            self.excused.update(rule.names if rule else ())
            self._record(key, "ignored", note="on request")
        elif reason := lookup(self.layout.refused, key):
            self._problem(reason, key)
        elif reason := lookup(self.layout.left_out, key):
            self._record(key, "left out", note=reason)
        elif rule is None:
            self._take_other_head(key)
        elif rule.twin and rule.twin in self.tensors:
            self._take_twin(key, rule.twin)
        elif rule.layer and (reason := self._layer_problem(key, rule)):
            self._problem(reason, key)
        elif all(name in self.model_tensors for name in rule.names):
            self._fill(key, rule)
        elif rule.absent:
            self._record(key, "left out", note=rule.absent)
        else:
            self._problem(rule.needs or UNKNOWN, key)

    def unfilled(self):
        """{name: why that is all right} of the tensors that no key fills; where it is not, that is a problem."""
        owners = {}
        for name, tensor in self.filled.items():
            owner = owners.setdefault(id(self.model_tensors[name]), name)
            if name != owner and not _is_same(tensor, self.filled[owner]):
                self._problem(TIED, f"{owner} and {name}")
        reasons = {
            name: self._why_unfilled(name, owners.get(id(tensor)))
            for name, tensor in self.model_tensors.items()
            if name not in self.filled
        }
        for name, reason in reasons.items():
            if not reason:
                self._problem("tensors of the model that the file lacks", name)
        return reasons

    def _take_twin(self, key, twin):
        if _is_same(self.tensors[key], self.tensors[twin]):
            self._record(key, "left out", note=f"the same tensor as {twin}")
        else:
            self._problem("copies of one tensor that differ", f"{key} and {twin}")

    def _take_other_head(self, key):
        root = key.partition(".")[0]
        if not pattern("{head}").fullmatch(root):
            self._problem(UNKNOWN, key)
        elif root in self.layout.heads:
            self._record(key, "left out", note=f"{self.head} is loaded instead")
        else:
            self._record(key, "left out", note="this model has no such head")

    def _fill(self, key, rule):
        tensor, note, names = self.tensors[key], "", rule.names
        if storage := _unusual_storage(tensor):
            self.excused.update(names)
            self._problem("no dense tensors", f"{key} {storage}")
            return
        wanted = [self.model_tensors[name].shape for name in names]
        if rule.adapt and tensor.dim() == len(wanted[0]):
            tensor, note = rule.adapt(tensor, wanted[0])
        pieces = tensor.chunk(len(names)) if tensor.dim() else (tensor,)
        if [piece.shape for piece in pieces] != wanted:
            self.excused.update(names)  # reported here, so not reported as missing too
            self._problem(self._misfit(key), self._both_shapes(key, names))
            return
        for name, piece in zip(names, pieces, strict=True):
            self._fill_one(key, name, piece)
        action = "split" if len(names) > 1 else "adapted" if note else "loaded"
        self._record(key, action, names, note)
        dtypes = [str(t.dtype).removeprefix("torch.") for t in (self.tensors[key], self.model_tensors[names[0]])]
        if dtypes[0] != dtypes[1]:
            self.conversions[tuple(dtypes)] += 1

    def _fill_one(self, key, name, piece):
        target = self.model_tensors[name]
        if not (piece.is_floating_point() and target.is_floating_point()):
            self._problem("not floating-point", f"{key} {piece.dtype} for {name} {target.dtype}")
        elif name in self.filled:
            self._problem("filled by another key too", f"{name} by {key}")
        else:
            self.filled[name] = piece.to(target.dtype)
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
        if not name.startswith(self.layout.needed) and root not in self._filled_heads():
            return "stays as it is: the file holds no head for this model"
        if child and not any(child in other.split(".") for other in self.filled):
            return "stays as it is: the file holds no such layers"
        return ""

    def _filled_heads(self):
        return {name.partition(".")[0] for name in self.filled if not name.startswith(self.layout.needed)}

    def _layer_problem(self, key, rule):
        """Why the key of an attached layer cannot fill these tensors, or an empty string."""
        layer, attached = rule.layer, self.layout.attached
        rows = {config.row for config in attached} - {None, "class_token"}  # which stands beside any
        if rows and layer.row not in rows:
            return (
                f"layers of another method than is attached: the file's are those of {self._config(key, layer)}, "
                f"the model's of {', '.join(map(str, attached))}"
            )
        if not all(name in self.model_tensors for name in rule.names):
            return f"layers that the model does not have there; attach {self._config(key, layer)} first"
        if not rows:  # the model is a part of the one that knows
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
        shapes = ", ".join(f"{name} {list(self.model_tensors[name].shape)}" for name in names)
        return f"{key} {list(self.tensors[key].shape)} for {shapes}"

    def _record(self, key, action, names=(), note=""):
        self.outcomes.append(KeyOutcome(key, action, names, note))

    def _problem(self, title, entry):
        self.problems.setdefault(title, []).append(entry)


def _ignored(checkpoint, ignore):
    """The keys that are one of the names in `ignore`, or begin with one and a dot."""
    if not isinstance(ignore, list | tuple) or not all(isinstance(entry, str) for entry in ignore):
        raise TypeError(f"ignore must be a list of names, got {ignore!r}")
    name, tensors = checkpoint.name, checkpoint.tensors
    ignored = set()
    for entry in ignore:
        matching = {key for key in tensors if key == entry or key.startswith(f"{entry.removesuffix('.')}.")}
        if not matching:
            raise ValueError(f"ignore={entry!r} matches no key of {name}; it has {listed(list(tensors))}")
        ignored |= matching
    return frozenset(ignored)


def _is_same(tensor, other):
    if _unusual_storage(tensor) or _unusual_storage(other):
        return False
    alike = tensor.shape == other.shape and tensor.dtype == other.dtype
    return alike and torch.allclose(tensor, other, rtol=0, atol=0, equal_nan=True)


def _unusual_storage(tensor):
    """Why the tensor's values cannot be copied as they are, or an empty string."""
    if tensor.is_nested or tensor.is_meta:
        return "nested" if tensor.is_nested else "meta"
    return "" if tensor.layout is torch.strided else str(tensor.layout).removeprefix("torch.")
