"""Changes what is attached as a checkpoint of the authors asks for."""

import dataclasses

from petl_ext.attaching.attach import attach, new_layers
from petl_ext.attaching.methods.class_token import ClassTokenConfig
from petl_ext.attaching.selection import select_places
from petl_ext.composing import HANDLE


def attachments_in(model):
    """The `Attachment`s of the model and of models inside it."""
    return [vars(module)[HANDLE] for module in model.modules() if HANDLE in vars(module)]


def add_class_token(model):
    """A class token beside what is attached to the model or to a model inside it, or alone; all else trains as before.

    Raises:
        ValueError: as `attach`, or something is attached to several models inside.
    """
    attachments = attachments_in(model)
    if len(attachments) > 1:
        raise ValueError(f"{type(model).__name__} holds {len(attachments)} models to which something is attached")
    if attachments:
        (attachment,) = attachments
        config = dataclasses.replace(attachment.config, class_token=True)
        places = select_places(attachment.model, ClassTokenConfig(), attachment.family)
        attachment.add(config, new_layers(attachment.model, config, places))
        return
    required_grad = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    attach(model, ClassTokenConfig())
    for parameter, required in required_grad:
        parameter.requires_grad_(required)


def freeze_scales(model):
    """`train_scale=False` for the APT layers attached to the model or to models inside it."""
    for attachment in attachments_in(model):
        if getattr(attachment.config, "train_scale", False):
            attachment.config = dataclasses.replace(attachment.config, train_scale=False)
            for layer in attachment.installed.layers:
                if hasattr(layer, "log_scale"):
                    layer.log_scale.requires_grad_(False)
