"""What is attached takes over what a checkpoint of the authors says of its method."""

import dataclasses

from petl_ext.attach.attach import attach, new_layers
from petl_ext.attach.attachment import HANDLE
from petl_ext.attach.config import ClassTokenConfig
from petl_ext.attach.selection import select_places


def attachment_in(model):
    """The one `Attachment` of the model or of a model inside it; None where there is none.

    Raises:
        ValueError: there are several.
    """
    found = [vars(module)[HANDLE] for module in model.modules() if HANDLE in vars(module)]
    if len(found) > 1:
        raise ValueError(f"{type(model).__name__} holds {len(found)} models to which something is attached")
    return found[0] if found else None


def add_class_token(model):
    """A class token beside what is attached to the model or to one inside it, or alone; all else trains as before.

    Returns:
        The `Attachment`, whose configuration says so.

    Raises:
        ValueError: as `attach`.
    """
    attachment = attachment_in(model)
    if attachment is None:
        required_grad = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
        attachment = attach(model, ClassTokenConfig())
        for parameter, required in required_grad:
            parameter.requires_grad_(required)
        return attachment
    config = dataclasses.replace(attachment.config, class_token=True)
    places = select_places(attachment.model, ClassTokenConfig())
    attachment._extend(config, new_layers(attachment.model, config, places))
    return attachment


def freeze_scales(model):
    """`train_scale=False` for the APT layers attached to the model or to one inside it.

    Returns:
        The `Attachment` that has changed, or None where no attached APT layer trains its scale.
    """
    attachment = attachment_in(model)
    if not getattr(getattr(attachment, "config", None), "train_scale", False):
        return None
    attachment._freeze_scales()
    return attachment
