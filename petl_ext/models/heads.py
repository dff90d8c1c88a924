"""The head that METER and DVP share, and the losses of their tasks."""

import torch
from torch import nn
from torch.nn import functional


def mlp_head(inputs, hidden, labels, **place):
    return nn.Sequential(
        nn.Linear(inputs, hidden, **place),
        nn.LayerNorm(hidden, **place),
        nn.GELU(),
        nn.Linear(hidden, labels, **place),
    )


def soft_target_loss(model, logits, labels):
    """Binary cross-entropy of logits [B, L] with scores [B, L] in [0, 1]: the mean over B and L, times L."""
    if labels is None:
        return None
    if labels.shape != logits.shape:
        raise ValueError(
            f"{type(model).__name__}: labels must be a score for each answer, {list(logits.shape)}, "
            f"got {list(labels.shape)}"
        )
    targets = labels.to(logits.device, logits.dtype)
    return functional.binary_cross_entropy_with_logits(logits, targets) * labels.size(1)


def class_loss(model, logits, labels):
    """Cross-entropy of logits [B, L] with class indices [B]."""
    if labels is None:
        return None
    if labels.shape != logits.shape[:1] or labels.is_floating_point():
        raise ValueError(
            f"{type(model).__name__}: labels must be {len(logits)} class indices, [{len(logits)}], "
            f"got {labels.dtype} {list(labels.shape)}"
        )
    return functional.cross_entropy(logits, labels.to(logits.device, torch.long))
