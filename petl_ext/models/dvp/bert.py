"""DVP on BERT."""

from functools import partial

from torch import Tensor, nn
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_outputs import SequenceClassifierOutput

from petl_ext.models.dvp.adapters import AdapterPlan
from petl_ext.models.dvp.base import DVPModel, with_prompt


class DVPBert(DVPModel):
    """DVP on BERT: the query is the state of [CLS], whose last state the head reads. All rows see each other.

    Text and prompt get a row of a type table of their own where they meet; the prompt gets no position. At K = 0 the
    prompt does not depend on the text. `original=True` changes nothing here.

    With use_adapters: behind the dropout of every attention and MLP, before the residual and the LayerNorm, whereas
    `AdapterConfig` puts them before the dropout. The LayerNorms of the encoder train, not that of the embeddings.
    """

    language_model_type = "bert"
    parts = ("embeddings", "encoder")
    norms = (("encoder.", "LayerNorm"),)
    adapters = AdapterPlan(
        sites=r"encoder\.layer\.\d+\.(attention\.)?output\.dropout",
        reduction=8,
        activation="relu",
        initialize=partial(nn.init.normal_, std=0.01),
    )

    @property
    def _layers(self):
        return self._base.encoder.layer

    def _check_language_model(self, model):
        super()._check_language_model(model)
        if model.config.is_decoder:
            raise self._wrong("language_model must be an encoder, but its config.is_decoder is True")

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        visual_features: Tensor | None = None,
        visual_mask: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> SequenceClassifierOutput:
        """
        Args:
            input_ids: [B, T], [CLS] first.
            attention_mask: [B, T], 1 for a token and 0 for padding; None is all 1.
            token_type_ids: [B, T], BERT's; None is all 0.
            pixel_values: what the vision model takes.
            visual_features: in their place, what it would return, [B, N, Dv].
            visual_mask: [B, N], 0 for visual tokens that are hidden; None hides none.
            labels: scores of the answers [B, L] for binary cross-entropy, or class indices [B] for cross-entropy.

        Returns:
            SequenceClassifierOutput with logits [B, L] and, given labels, the loss.

        Raises:
            ValueError: a shape does not fit, or a sample has no token.
        """
        self._check_text(input_ids, attention_mask)
        visual = self._visual(input_ids, pixel_values, visual_features, visual_mask)
        states = self._base.embeddings(input_ids=input_ids, token_type_ids=token_type_ids)
        states = self._run(self._layers[: self.insert_layer], states, attention_mask)
        states = self._insert(states, states[:, 0], visual)
        states = self._run(self._layers[self.insert_layer :], states, with_prompt(attention_mask))
        return self._classified(states[:, 1], labels)

    def _run(self, layers, states, attention_mask):
        mask = create_bidirectional_mask(self._base.config, states, attention_mask)
        for layer in layers:
            states = layer(states, mask)
        return states

    def _check_rows(self, takes_part):
        super()._check_rows(takes_part)
        self._refuse_samples(~takes_part[:, 0], "attention_mask hides the first token, [CLS],")
