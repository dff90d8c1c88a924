"""Putting a method's layers into a model, and the handle that knows how to take them out again.

A site's module is not wrapped or replaced: it becomes an instance of another class (families.SITE_CLASSES) and gets one
more child. So its place, its hooks and its state-dict keys stay, copies and pickles of the model carry the layers with
them, and giving it back its own class restores the backbone exactly.
"""

import logging
from contextlib import contextmanager

import torch
from torch.nn.parallel import DataParallel, DistributedDataParallel

from petl_ext.attach.config import CONFIGS
from petl_ext.attach.families import SITE_CLASSES, family_of
from petl_ext.attach.folder import Saved, read_folder, write_folder
from petl_ext.attach.report import Report, ReportRow
from petl_ext.attach.selection import is_part, select_kept, select_sites
from petl_ext.cost import count_parameters

logger = logging.getLogger("petl_ext")

HANDLE = "petl_attachment"
ADDS_NOTHING = "adds nothing to the model"


def attach(model, config, keep=()):
    """Puts the method's new layers into `model` and freezes everything but them and what `keep` names.

    The layers are made on the device and in the dtype of the module that they join. A model carries one attachment at
    a time; it is also at hand as `model.petl_attachment`, in copies and unpickled models too.

    Attach after `from_pretrained`, which knows nothing of the layers, and before DistributedDataParallel. Reentrant
    gradient checkpointing needs inputs that require gradients; transformers' `gradient_checkpointing_enable` sees to
    that.

    Args:
        model: any nn.Module. One of a family of the table in families.py, unless `config.sites` says where.
        config: an `APTConfig`, `DeepPromptConfig`, `ClassifierOnlyConfig` or `FullTuningConfig`.
        keep: names of the model's own modules or parameters that stay trainable, or parts of such names between
            dots: ["classifier", "vilt.pooler"].

    Returns:
        The `Attachment`.

    Raises:
        TypeError: config or keep is of the wrong type.
        ValueError: something matches nothing, nothing would train, or layers are there already. The model has not
            changed.
    """
    if type(config) not in CONFIGS.values():
        known = ", ".join(known.__name__ for known in CONFIGS.values())
        raise TypeError(f"attach: config must be one of {known}, got {config!r}")
    if not isinstance(keep, list | tuple) or not all(isinstance(entry, str) for entry in keep):
        raise TypeError(f"attach: keep must be a list of names, got {keep!r}")
    keep = tuple(keep)
    _check_free(model)
    sites = select_sites(model, config)
    kept = select_kept(model, config, keep)
    if not sites and not kept:
        raise ValueError(f"attach: {config} adds nothing and keep is empty, so nothing would train")
    # Parameters made in inference mode could never train.
    with torch.inference_mode(False):
        layers = {name: SITE_CLASSES[config.method].new_layer(config, model, name) for name in sites}
    return Attachment(model, config, keep, kept, layers)


def load(model, folder):
    """Fills `model` with what `Attachment.save` wrote, attaching first if nothing is attached yet.

    A tensor saved in another floating-point dtype is converted to the model's; that is logged.

    Returns:
        The model's `Attachment`.

    Raises:
        FileNotFoundError: the folder or one of its files is missing.
        ValueError: a file is broken or does not fit the model or what is attached to it. The model has not changed.
    """
    saved = read_folder(folder)
    family = family_of(model)
    if saved.family != family:
        raise ValueError(
            f"{folder}: saved from a model of the family {saved.family!r}, but {type(model).__name__} is of {family!r}"
        )
    attachment = getattr(model, HANDLE, None)
    if attachment is not None:
        attachment._check_same(saved, folder)
        attachment._fill(saved.tensors, folder)
        return attachment
    attachment = attach(model, saved.config, saved.keep)
    try:
        attachment._fill(saved.tensors, folder)
    except BaseException:
        attachment.detach()
        raise
    return attachment


class Attachment:
    """What `attach` put into a model. Made by `attach` and `load`.

    Attributes:
        model: the model.
        config: the configuration that was attached.
        keep: the entries given to `attach`.
        sites: dotted names of the modules that carry a layer.
    """

    def __init__(self, model, config, keep, kept, layers):
        self.model = model
        self.config = config
        self.keep = keep
        self.sites = tuple(layers)
        self._kept = kept
        self._disabled = 0  # how many `disable` contexts are open
        self._required_grad = {
            name: parameter.requires_grad for name, parameter in model.named_parameters(remove_duplicate=False)
        }
        self._site_class = SITE_CLASSES.get(config.method)
        self._backbone_classes = [type(site) for site in self._site_modules()]
        try:
            self._install(layers)
        except BaseException:
            self._restore()
            raise
        setattr(model, HANDLE, self)

    def named_parameters(self):
        """(name in the model, parameter) of all that trains: the new layers' and the kept ones, each once."""
        self._check_attached()
        seen = set()
        for name, parameter in self.model.named_parameters(remove_duplicate=False):
            if self._owns(name) and id(parameter) not in seen:
                seen.add(id(parameter))
                yield name, parameter

    def parameters(self):
        """The parameters of `named_parameters`, as an optimiser takes them."""
        return (parameter for _, parameter in self.named_parameters())

    def report(self, tokens=None):
        """A `Report`: every site, its parameters, the MACs that it adds, which kernel runs there and, if none, why.

        Args:
            tokens: rows N of the sequence that the encoder sees (ViLT: text, image class token and patches), for
                which MACs are counted.
        """
        self._check_attached()
        rows = [self._site_row(name, tokens) for name in self.sites]
        rows += [self._kept_row(entry) for entry in self.keep]
        if self.config.trains_all:
            rows = [ReportRow("the whole model", "its own", count_parameters(self.model)[0], 0, "none", ADDS_NOTHING)]
        title = f"{self.config} on {type(self.model).__name__}"
        return Report(title, rows, *count_parameters(self.model), tokens)

    def save(self, folder):
        """Writes the new layers and the kept modules, nothing else of the model, and how to attach them.

        The folder is complete or, after an error, as it was. With several processes, call it in one. The model's own
        `save_pretrained` would write the layers too, but `from_pretrained` would leave them out: use `load`.
        """
        self._check_attached()
        write_folder(folder, Saved(self.config, family_of(self.model), self.keep, self._tensors()))

    @contextmanager
    def disable(self):
        """Inside the `with`, the model computes what it would without the new layers, bit for bit.

        Kept modules keep what they have learned. Parameters, their names and requires_grad stay as they are.
        """
        self._check_attached()
        self._disabled += 1
        for site, backbone_class in zip(self._site_modules(), self._backbone_classes, strict=True):
            site.__class__ = backbone_class
        try:
            yield self
        finally:
            self._disabled -= 1
            if self._is_attached() and not self._disabled:
                for site in self._site_modules():
                    site.__class__ = self._site_class

    def detach(self):
        """Takes the new layers out for good and gives every parameter the requires_grad that it had before `attach`.

        Kept modules keep what they have learned.
        """
        self._check_attached()
        self._restore()
        delattr(self.model, HANDLE)

    def __repr__(self):
        return f"Attachment({self.config} on {type(self.model).__name__}, {len(self.sites)} sites, keep={self.keep})"

    def _install(self, layers):
        self.model.requires_grad_(False)
        for name, parameter in self.model.named_parameters(remove_duplicate=False):
            if name in self._kept:
                parameter.requires_grad_(True)
        for site, layer in zip(self._site_modules(), layers.values(), strict=True):
            site.add_module(self._site_class.child, layer.train(site.training))
            site.__class__ = self._site_class

    def _restore(self):
        for site, backbone_class in zip(self._site_modules(), self._backbone_classes, strict=True):
            site.__class__ = backbone_class
            site._modules.pop(self._site_class.child, None)
        for name, parameter in self.model.named_parameters(remove_duplicate=False):
            parameter.requires_grad_(self._required_grad.get(name, parameter.requires_grad))

    def _site_modules(self):
        return [self.model.get_submodule(name) for name in self.sites]

    def _is_attached(self):
        return getattr(self.model, HANDLE, None) is self

    def _check_attached(self):
        if not self._is_attached():
            raise RuntimeError(f"{self.config} has been detached from {type(self.model).__name__}")

    def _owns(self, name):
        return name in self._kept or any(name.startswith(f"{site}.{self._site_class.child}.") for site in self.sites)

    def _tensors(self):
        """What is saved, by state-dict name: new layers and kept modules, buffers too."""
        return {name: tensor for name, tensor in self.model.state_dict().items() if self._owns(name)}

    def _site_row(self, name, tokens):
        site = self.model.get_submodule(name)
        layer = getattr(site, self._site_class.child)
        macs = None if tokens is None else self._site_class.macs(layer, tokens)
        disabled = type(site) is not self._site_class
        kernel, reason = ("none", "disabled") if disabled else self._site_class.kernel(layer)
        size = sum(parameter.numel() for parameter in layer.parameters())
        return ReportRow(name, type(layer).__name__, size, macs, kernel, reason)

    def _kept_row(self, entry):
        size = sum(parameter.numel() for name, parameter in self.named_parameters() if is_part(entry, name))
        return ReportRow(entry, "kept", size, 0, "none", ADDS_NOTHING)

    def _check_same(self, saved, folder):
        for what, ours, theirs in (("config", self.config, saved.config), ("keep", self.keep, saved.keep)):
            if ours != theirs:
                raise ValueError(f"{folder}: expected the {what} that is attached, {ours}, found {theirs}")

    def _fill(self, tensors, folder):
        ours = self._tensors()
        _check_fit(ours, tensors, folder)
        converted = sorted({f"{tensors[n].dtype} to {t.dtype}" for n, t in ours.items() if tensors[n].dtype != t.dtype})
        if converted:
            logger.warning("%s: converted from %s", folder, ", ".join(converted))
        with torch.no_grad():
            for name, tensor in ours.items():
                tensor.copy_(tensors[name])


def _check_fit(expected, found, folder):
    problems = [f"{name}: missing" for name in expected if name not in found]
    problems += [f"{name}: unexpected" for name in found if name not in expected]
    for name in expected.keys() & found.keys():
        ours, theirs = expected[name], found[name]
        if ours.shape != theirs.shape:
            problems.append(f"{name}: expected the shape {tuple(ours.shape)}, found {tuple(theirs.shape)}")
        elif ours.is_floating_point() != theirs.is_floating_point():
            problems.append(f"{name}: expected {ours.dtype}, found {theirs.dtype}")
    if problems:
        shown = "; ".join(sorted(problems)[:8])
        raise ValueError(f"{folder} does not fit the model, {len(problems)} differences: {shown}")


def _check_free(model):
    if isinstance(model, DataParallel | DistributedDataParallel):
        raise ValueError(f"attach: got a {type(model).__name__}; attach to the model first, then wrap it")
    for name, module in model.named_modules():
        if HANDLE in vars(module):
            place = name or "the model"
            raise ValueError(
                f"attach: {getattr(module, HANDLE).config} is already attached to {place}; detach() it first"
            )
