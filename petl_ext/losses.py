"""The losses of tasks whose answers are classes, and of those whose answers have scores."""

from torch.nn import functional

IGNORED = -100  # the label of an answer that no label stands for, as torch's cross_entropy has it


def class_loss(logits, labels):
    """Cross-entropy of logits [B, L] and labels [B], the mean of those that are not `IGNORED`.

    Zero, with zero gradients, where all are ignored: torch's own mean would be NaN.
    """
    total = functional.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum")
    return total / (labels != IGNORED).sum().clamp(min=1)


def soft_target_loss(logits, targets):
    """Binary cross-entropy of logits [B, L] with scores [B, L] in [0, 1], summed over L, the mean over B."""
    return functional.binary_cross_entropy_with_logits(logits, targets) * targets.shape[1]
