"""VisualPromptLayer restated with all the projections of multi-head attention."""

import torch


def with_all_projections(layer, visual, query, mask=None, kept=None):
    """As the authors compute it: every token gets a key and a value. `kept` [B, H, 1, N] multiplies the weights."""

    def heads(rows):
        return rows.unflatten(-1, (layer.num_heads, -1)).transpose(1, 2)

    q, k, v = heads(layer.query(query[:, None])), heads(layer.key(visual)), heads(layer.value(visual))
    scores = q @ k.mT / k.size(-1) ** 0.5
    if mask is not None:
        scores = scores.masked_fill(~mask[:, None, None], -torch.inf)
    weights = scores.softmax(-1) * (1 if kept is None else kept)
    return layer.output((weights @ v).transpose(1, 2).flatten(2))[:, 0]
