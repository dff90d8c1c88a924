"""The head that METER and DVP share, and the losses of their tasks."""

import torch
from torch import nn

from petl_ext.tasks.labels import label_loss, soft_target_loss


def mlp_head(inputs, hidden, labels, **factory):
    """[..., inputs] to [..., labels]."""
    return nn.Sequential(
        nn.Linear(inputs, hidden, **factory),
        nn.LayerNorm(hidden, **factory),
        nn.GELU(),
        nn.Linear(hidden, labels, **factory),
    )


def checked_soft_target_loss(model, logits, labels):
    """`soft_target_loss` of logits [B, L] with scores [B, L], None without any."""
    if labels is None:
        return None
    if labels.shape != logits.shape:
        raise ValueError(
            f"{type(model).__name__}: labels must be a score for each answer, {list(logits.shape)}, "
            f"got {list(labels.shape)}"
        )
    return soft_target_loss(logits, labels.to(logits.device, logits.dtype))


def checked_class_loss(model, logits, labels):
    """`label_loss` of logits [B, L] with class indices [B], None without any."""
    if labels is None:
        return None
    if labels.shape != logits.shape[:1] or labels.is_floating_point():
        raise ValueError(
            f"{type(model).__name__}: labels must be {len(logits)} class indices, [{len(logits)}], "
            f"got {labels.dtype} {list(labels.shape)}"
        )
    return label_loss(logits, labels.to(logits.device, torch.long))
