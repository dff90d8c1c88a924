"""Deep prompts on a pre-norm encoder: learned rows that each block's attention can attend to (the baseline of APT).

With h [N, D] the block's input and T [P, D] its prompts: the prompts follow h, both pass the block's first layer norm
and the key and value projections, only the N rows of h ask, and the mask hides no prompt. So the residual and the MLP
see N rows, as without prompts.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from petl_ext.attaching.methods.config import Config
from petl_ext.attaching.sites.site import Site
from petl_ext.checks import check_positive_integer

# The ViLT baseline initializes as for patches of 16 x 16 RGB pixels, also where the model's are others.
PATCH_INPUTS = 3 * 16 * 16


def deep_prompt_parameters(dim, num_prompts):
    """Of one layer: prompts [P, D]."""
    return num_prompts * dim


def deep_prompt_macs(tokens, dim, num_prompts, projections=2):
    """Of one layer: the prompts' projections, P D^2 each, and N queries' attention to P more rows, 2 N P D.

    Args:
        projections: 2, key and value, is what petl_ext computes. The published total counts 3: it projects the
            prompts to queries as well and drops them.
    """
    return projections * num_prompts * dim**2 + 2 * tokens * num_prompts * dim


class DeepPrompts(nn.Module):
    """Holds one block's `prompts` [P, D], drawn from Uniform(-v, v), v = sqrt(6 / (3 * 16 * 16 + D)).

    Raises:
        ValueError: a size below 1.
    """

    def __init__(self, dim, num_prompts=200, device=None, dtype=None):
        super().__init__()
        check_positive_integer("DeepPrompts: num_prompts", num_prompts)
        self.prompts = nn.Parameter(torch.empty(num_prompts, dim, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self):
        bound = math.sqrt(6 / (PATCH_INPUTS + self.prompts.size(1)))
        nn.init.uniform_(self.prompts, -bound, bound)

    def extra_repr(self):
        num_prompts, dim = self.prompts.shape
        return f"dim={dim}, num_prompts={num_prompts}"


class DeepPromptSelfAttention(Site):
    """What a self-attention with the children query, key, value and dropout becomes: it also attends to prompts.

    `forward(hidden_states [B, N, D], attention_mask, output_attentions)` computes what ViLT's own attention does, in
    the same order of operations; attention_mask is None or is added to the scores, [B, 1, 1 or N, N].
    """

    child = "deep_prompts"
    looked_for = "self-attentions (query, key, value, dropout) in a block with layernorm_before"

    @staticmethod
    def candidates(model):
        found = {}
        for name, block in model.named_modules():
            attention = getattr(getattr(block, "attention", None), "attention", None)
            parts = ("query", "key", "value", "dropout", "num_attention_heads", "attention_head_size")
            if hasattr(block, "layernorm_before") and all(hasattr(attention, part) for part in parts):
                found[f"{name}.attention.attention".lstrip(".")] = attention
        return found

    @staticmethod
    def neighbor(module):
        return module.key

    @classmethod
    def new_layer(cls, config, model, place):
        layer = super().new_layer(config, model, place)
        block = model.get_submodule(place.name.removesuffix("attention.attention").rstrip("."))
        # The norm is the block's, and may be wrapped or replaced there. In a tuple the block is no child of the layer.
        layer.block = (block,)
        return layer

    @staticmethod
    def macs(layer, tokens):
        num_prompts, dim = layer.prompts.shape
        return deep_prompt_macs(tokens, dim, num_prompts)

    @staticmethod
    def counted_macs(place, attached, backbone):
        return attached.of(place.name) - backbone.of(place.name)

    @staticmethod
    def kernel(layer):
        return "none", "deep prompts are plain PyTorch"

    def forward(self, hidden_states, attention_mask=None, output_attentions=False):
        prompts = self.deep_prompts.block[0].layernorm_before(self.deep_prompts.prompts)
        query = self._split_heads(self.query(hidden_states))
        key = self._split_heads(_append(self.key(hidden_states), self.key(prompts)))
        value = self._split_heads(_append(self.value(hidden_states), self.value(prompts)))
        scores = query @ key.mT / math.sqrt(self.attention_head_size)
        if attention_mask is not None:
            scores = scores + F.pad(attention_mask, (0, len(prompts)))
        probabilities = self.dropout(scores.softmax(-1))
        context = (probabilities @ value).transpose(1, 2).flatten(2)
        return (context, probabilities) if output_attentions else (context,)

    def _split_heads(self, rows):
        return rows.unflatten(-1, (self.num_attention_heads, self.attention_head_size)).transpose(1, 2)


@dataclass(frozen=True)
class DeepPromptConfig(Config):
    """Deep prompts: `num_prompts` learned rows that every attention can attend to, new ones in each block."""

    method: ClassVar[str] = "deep_prompts"
    row: ClassVar[str] = "deep_prompts"
    site_classes: ClassVar[dict] = {"deep_prompts": (DeepPromptSelfAttention,)}
    num_prompts: int = 200
    sites: str | Sequence[str] | None = None
    class_token: bool = False

    def __post_init__(self):
        self.new_layer(1, device="meta")
        super().__post_init__()

    def new_layer(self, dim: int, **factory: Any) -> nn.Module:
        return DeepPrompts(dim, self.num_prompts, **factory)


def _append(rows, prompt_rows):
    return torch.cat([rows, prompt_rows.expand(rows.size(0), -1, -1)], dim=1)
