"""What options are compared by where the user gives no function: the model's loss, or how much of a batch is right."""

from petl_ext.tasks.labels import label_accuracy
from petl_ext.tasks.vqa import vqa_score


def default_loss(model, batch, trainer=None):
    """The Trainer's loss of a batch; without a Trainer the model's own.

    Raises:
        ValueError: the model gives none.
    """
    if trainer is not None:
        # It may take labels out of the batch.
        return trainer.compute_loss(model, dict(batch))
    return _required(_loss_in(model(**batch)), batch, "loss")


def default_score(model, batch, trainer=None):
    """`percent_right` of a batch or, where there is none, 100 * exp(-loss).

    Raises:
        ValueError: the model gives neither.
    """
    if trainer is not None:
        loss, outputs = trainer.compute_loss(model, dict(batch), return_outputs=True)
    else:
        outputs = model(**batch)
        loss = _loss_in(outputs)
    score = percent_right(outputs, batch.get("labels"))
    return 100 * _required(loss, batch, "score").neg().exp() if score is None else score


DEFAULTS = {"loss": default_loss, "score": default_score}


def percent_right(outputs, labels):
    """The mean label of the classes with the largest logits, in percent: for integers, how often they are the label.

    Args:
        outputs: a dict with logits [B, L].
        labels: integers [B] or floating point [B, L].

    Returns:
        A float, or None where logits or labels are missing or of other shapes: not one choice per sample.
    """
    logits = outputs.get("logits") if isinstance(outputs, dict) else None
    if logits is None or labels is None or logits.dim() != 2:
        return None
    labels = labels.to(logits.device)
    if labels.shape == logits.shape and labels.is_floating_point():
        return 100 * vqa_score(logits, labels)
    if labels.shape == logits.shape[:1] and not labels.is_floating_point():
        return 100 * label_accuracy(logits, labels)
    return None


def _loss_in(outputs):
    return outputs.get("loss") if isinstance(outputs, dict) else outputs[0]


def _required(loss, batch, measure):
    if loss is None:
        raise ValueError(f"SearchCallback: the model gave no loss for {', '.join(batch)}; give compute_{measure}=...")
    return loss
