"""The class token: a trained vector in place of the first text token of every sample.

APT's code, all its baselines and DAS's METER train one beside their layers (`token4classifier`; arXiv 2306.15706). It
takes the place of what the text embeddings of a ViLT, or the text transform of a METER, have made of [CLS] or <s>,
whether these were given tokens or embeddings.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from petl_ext.attaching.methods.config import Config
from petl_ext.attaching.sites.site import Site, location_beside, width_of

INITIAL_STD = 0.02
EMBEDDINGS = ("word_embeddings", "position_embeddings", "token_type_embeddings", "LayerNorm")


class ClassToken(nn.Module):
    """Holds `vector` [1, 1, D], drawn from Normal(0, 0.02), and puts it in the place of row 0."""

    def __init__(self, dim, device=None, dtype=None):
        super().__init__()
        self.vector = nn.Parameter(torch.empty(1, 1, dim, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self):
        nn.init.normal_(self.vector, std=INITIAL_STD)

    def forward(self, states):
        """states [B, T, D] to the same with another row 0, in their dtype."""
        # Neither len(states) nor a row less: torch.export would make a constant of it, or a bound.
        vector = self.vector.to(states.dtype).expand(states.size(0), -1, -1)
        return states.slice_scatter(vector, dim=1, end=1)

    def extra_repr(self):
        return f"dim={self.vector.size(-1)}"


class EmbeddedClassToken(Site):
    """What text embeddings become so that their first row is replaced: ViLT.

    The vector starts as the embedding of `first_token` at the first position, as the authors' does, except that theirs
    has passed a dropout of 0.1. Where the vocabulary holds no such token, or the embeddings have another width, it
    starts as `ClassToken` says.

    Attributes:
        first_token: [CLS] of BERT's vocabulary, ViLT's.
    """

    child = "class_token"
    looked_for = f"text embeddings ({', '.join(EMBEDDINGS)})"
    first_token = 101

    @staticmethod
    def candidates(model):
        return {name: module for name, module in model.named_modules() if _are_text_embeddings(module)}

    @staticmethod
    def neighbor(module):
        return module.LayerNorm

    @classmethod
    def new_layer(cls, config, model, place):
        neighbor = cls.neighbor(model.get_submodule(place.name))
        layer = ClassToken(width_of(neighbor), **location_beside(neighbor, model))
        start = _first_embedding(cls.embeddings(model, place), cls.first_token)
        if start is not None and start.shape == layer.vector.shape:
            with torch.no_grad():
                layer.vector.copy_(start)
        return layer

    @staticmethod
    def embeddings(model, place):
        """The text embeddings from which the vector starts, or None."""
        return model.get_submodule(place.name)

    @staticmethod
    def macs(layer, tokens):
        return 0

    @staticmethod
    def kernel(layer):
        return "none", "a row is replaced, which multiplies nothing"

    def forward(self, *arguments, **named):
        return self.class_token(super().forward(*arguments, **named))


class TransformedClassToken(EmbeddedClassToken):
    """What the linear layer behind a text encoder becomes so that the first row of its output is replaced: METER.

    The vector starts as RoBERTa's input embedding of <s>, as the authors' does.
    """

    looked_for = "linear layers"
    first_token = 0

    @staticmethod
    def candidates(model):
        return {name: module for name, module in model.named_modules() if hasattr(module, "out_features")}

    @staticmethod
    def neighbor(module):
        return module

    @staticmethod
    def embeddings(model, place):
        around = model.get_submodule(place.name.rpartition(".")[0])
        return getattr(getattr(around, "text_transformer", None), "embeddings", None)


@dataclass(frozen=True)
class ClassTokenConfig(Config):
    """A class token alone: a trained vector in place of the first text token of every sample.

    It takes the place of the first row of what ViLT's text embeddings, METER's text transform or, by `sites`, other
    text embeddings or linear layers give. Beside the layers of another method, `class_token=True` of that one's
    configuration does the same.
    """

    method: ClassVar[str] = "class_token"
    row: ClassVar[str] = "class_token"
    site_classes: ClassVar[dict] = {"class_token": (EmbeddedClassToken, TransformedClassToken)}
    sites: str | Sequence[str] | None = None


def _are_text_embeddings(module):
    return all(isinstance(getattr(module, part, None), nn.Module) for part in EMBEDDINGS)


def _first_embedding(embeddings, token):
    """[1, 1, D], what BERT's or RoBERTa's embeddings make of `token` at the first position without dropout, or None."""
    if not _are_text_embeddings(embeddings) or token >= getattr(embeddings.word_embeddings, "num_embeddings", 0):
        return None
    tokens = torch.tensor([[token]], device=embeddings.word_embeddings.weight.device)
    padding = embeddings.position_embeddings.padding_idx  # RoBERTa's first position is the row behind that of padding
    position = torch.full_like(tokens, 0 if padding is None else padding + 1)
    with torch.no_grad():
        embedded = embeddings.word_embeddings(tokens) + embeddings.token_type_embeddings(torch.zeros_like(tokens))
        return embeddings.LayerNorm(embedded + embeddings.position_embeddings(position))
