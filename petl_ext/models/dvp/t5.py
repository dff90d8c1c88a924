"""DVP on T5."""

from functools import partial

from torch import Tensor, nn
from transformers.masking_utils import create_bidirectional_mask, create_causal_mask
from transformers.modeling_outputs import SequenceClassifierOutput

from petl_ext.models.dvp.adapters import AdapterPlan
from petl_ext.models.dvp.base import DVPModel


class DVPT5(DVPModel):
    """DVP on T5: the encoder reads the text alone; the prompt enters the decoder, in front of its one start token,
    whose last state the head reads. The query is the mean of the encoder's output.

    `original=True` computes what the authors' code does, where standard T5 is the default:
    - relative position biases act in the first block of the encoder and of the decoder only, not in all;
    - the decoder is not causal: the prompt sees the start token too;
    - the mean counts padding.

    With use_adapters: on the outputs of all attentions and MLPs, before dropout and residual. All norms train.
    """

    language_model_type = "t5"
    parts = ("shared", "encoder", "decoder")
    norms = (("encoder.", "layer_norm"), ("decoder.", "layer_norm"))
    adapters = AdapterPlan(
        sites=r"(en|de)coder\.block\.\d+\.layer\.\d\.(SelfAttention|EncDecAttention|DenseReluDense)",
        reduction=8,
        activation="relu",
        initialize=partial(nn.init.normal_, std=0.01),
    )

    @property
    def _layers(self):
        return self._base.decoder.block

    def _check_language_model(self, model):
        super()._check_language_model(model)
        if model.config.decoder_start_token_id is None:
            raise self._wrong("language_model must have a config.decoder_start_token_id")

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        pixel_values: Tensor | None = None,
        visual_features: Tensor | None = None,
        visual_mask: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> SequenceClassifierOutput:
        """
        Args:
            input_ids: [B, T], the encoder's.
            attention_mask, pixel_values, visual_features, visual_mask, labels: as in `DVPBert.forward`.

        Returns:
            SequenceClassifierOutput with logits [B, L] and, given labels, the loss.

        Raises:
            ValueError: a shape does not fit, or a sample has no token.
        """
        self._check_text(input_ids, attention_mask)
        visual = self._visual(input_ids, pixel_values, visual_features, visual_mask)
        decoder = self._base.decoder
        text = self._encode(input_ids, attention_mask)
        states = decoder.dropout(decoder.embed_tokens(self._start_tokens(input_ids)))
        states = self._run(self._layers[: self.insert_layer], states, text, attention_mask)
        states = self._insert(states, self._mean(text, attention_mask), visual)
        states = self._run(self._layers[self.insert_layer :], states, text, attention_mask)
        return self._classified(decoder.dropout(decoder.final_layer_norm(states))[:, -1], labels)

    def _encode(self, input_ids, attention_mask):
        encoder = self._base.encoder
        if not self.options["original"]:
            return encoder(input_ids, attention_mask=attention_mask).last_hidden_state
        states = encoder.dropout(encoder.embed_tokens(input_ids))
        mask = create_bidirectional_mask(encoder.config, states, attention_mask)
        for block in encoder.block:  # without biases from the first, the others take zeros
            states = block(states, mask)[0]
        return encoder.dropout(encoder.final_layer_norm(states))

    def _mean(self, text, attention_mask):
        if attention_mask is None or self.options["original"]:
            return text.mean(1)
        takes_part = (attention_mask != 0)[..., None]
        return text.masked_fill(~takes_part, 0).sum(1) / takes_part.sum(1)

    def _start_tokens(self, input_ids):
        return input_ids.new_full((input_ids.size(0), 1), self.language_model.config.decoder_start_token_id)

    def _run(self, blocks, states, text, attention_mask):
        if len(blocks) == 0:
            return states
        config = self._base.decoder.config
        mask, bias = self._self_attention(states)
        text_mask = create_bidirectional_mask(config, states, attention_mask, encoder_hidden_states=text)
        for block in blocks:
            states = block(states, mask, bias, text, text_mask)[0]
        return states

    def _self_attention(self, states):
        """(mask, biases) of the decoder's rows; the first block has the table of the biases."""
        length = states.size(1)
        if self.options["original"]:
            return states.new_zeros(states.size(0), 1, length, length), None
        first = self._layers[0].layer[0].SelfAttention
        mask = create_causal_mask(self._base.decoder.config, states, None, None)
        return mask, first.compute_bias(length, length, device=states.device)
