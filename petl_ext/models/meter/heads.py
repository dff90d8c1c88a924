"""METER for four tasks."""

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import SequenceClassifierOutput
from transformers.utils.generic import can_return_tuple

from petl_ext.models.heads import checked_class_loss, checked_soft_target_loss, mlp_head
from petl_ext.models.meter.config import MeterConfig
from petl_ext.models.meter.given import check_batch, the_one
from petl_ext.models.meter.model import MeterModel, MeterPreTrainedModel


class _MeterClassifier(MeterPreTrainedModel):
    """The head that reads the pooled vector of one text and one image."""

    def __init__(self, config: MeterConfig):
        super().__init__(config)
        self.meter = MeterModel(config)
        self.classifier = mlp_head(2 * config.hidden_size, 2 * config.hidden_size, config.num_labels)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        image_embeds: Tensor | None = None,
    ) -> SequenceClassifierOutput:
        """
        Args:
            input_ids, pixel_values, attention_mask, inputs_embeds, image_embeds: MeterModel's.
            labels: as the class says.

        Returns:
            SequenceClassifierOutput with logits [B, L] and, given labels, the loss.

        Raises:
            ValueError: as MeterModel, or labels are not as the class says.
        """
        text = {"input_ids": input_ids, "attention_mask": attention_mask, "inputs_embeds": inputs_embeds}
        output = self.meter(**text, pixel_values=pixel_values, image_embeds=image_embeds, return_dict=True)
        logits = self.classifier(output.pooler_output)
        return SequenceClassifierOutput(loss=self._loss(logits, labels), logits=logits)

    def _loss(self, logits, labels):
        """None without labels."""
        raise NotImplementedError


class MeterForQuestionAnswering(_MeterClassifier):
    """VQAv2: labels are the answers' scores in [0, 1], [B, L]; the loss is binary cross-entropy, the mean over B and L
    times L, as ViLT and METER have it.
    """

    def _loss(self, logits, labels):
        return checked_soft_target_loss(self, logits, labels)


class MeterForVisualEntailment(_MeterClassifier):
    """SNLI-VE: does the image entail the text. Labels are class indices [B], integers; the loss is cross-entropy. There
    are 3 classes: set the config's num_labels.
    """

    def _loss(self, logits, labels):
        return checked_class_loss(self, logits, labels)


class MeterForImagesAndTextClassification(MeterPreTrainedModel):
    """NLVR2: one text about two images, cross-entropy. Each image meets the text in a pass of its own, as token type 1
    and 2; the head reads both pooled vectors, 4D.

    Raises:
        ValueError: the config has fewer than 3 token types.
    """

    num_images = 2

    def __init__(self, config: MeterConfig):
        super().__init__(config)
        if config.modality_type_vocab_size <= self.num_images:
            raise ValueError(
                f"{type(self).__name__}: modality_type_vocab_size must be at least {self.num_images + 1}, got "
                f"{config.modality_type_vocab_size}; resize_token_types({self.num_images + 1}) prepares a trained METER"
            )
        self.meter = MeterModel(config)
        pooled = 2 * config.hidden_size
        self.classifier = mlp_head(self.num_images * pooled, pooled, config.num_labels)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        image_embeds: Tensor | None = None,
    ) -> SequenceClassifierOutput:
        """
        Args:
            input_ids, attention_mask, inputs_embeds: MeterModel's.
            pixel_values: [B, 2, 3, H, W].
            labels: class indices [B].
            image_embeds: in place of pixel_values, MeterModel's of both images [B, 2, N, the vision config's
                hidden_size].

        Returns:
            SequenceClassifierOutput with logits [B, L] and, given labels, the loss.

        Raises:
            ValueError: as MeterModel, there are not 2 images to a text, or labels are not integers [B].
        """
        images = the_one(self, pixel_values=pixel_values, image_embeds=image_embeds)
        rest = {"pixel_values": ["3", "H", "W"], "image_embeds": ["N", "D"]}[images.name]
        if images.tensor.dim() != 2 + len(rest) or images.tensor.size(1) != self.num_images:
            raise ValueError(
                f"{type(self).__name__}: {images.name} must be [B, {self.num_images}, {', '.join(rest)}], "
                f"{self.num_images} images to a text, got {list(images.tensor.shape)}"
            )
        text = {"input_ids": input_ids, "attention_mask": attention_mask, "inputs_embeds": inputs_embeds}
        pooled = [
            self.meter(**text, **{images.name: image}, image_token_type_idx=i, return_dict=True).pooler_output
            for i, image in enumerate(images.tensor.unbind(1), start=1)
        ]
        logits = self.classifier(torch.cat(pooled, dim=-1))
        return SequenceClassifierOutput(loss=checked_class_loss(self, logits, labels), logits=logits)


class MeterForImageAndTextRetrieval(MeterPreTrainedModel):
    """Flickr30K and COCO retrieval: scores how well texts fit an image; cross-entropy over the texts of one image, of
    which METER takes the right one and 15 random ones.
    """

    def __init__(self, config: MeterConfig):
        super().__init__(config)
        self.meter = MeterModel(config)
        self.rank_output = nn.Linear(2 * config.hidden_size, 1)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        image_embeds: Tensor | None = None,
    ) -> SequenceClassifierOutput:
        """
        Args:
            input_ids: one text to an image [B, T], or K texts [B, K, T].
            pixel_values: [B, 3, H, W]; the vision transformer reads each image once, whatever K.
            attention_mask: [B, T], or [B, K, T].
            labels: with K texts, which of them is the right one [B].
            inputs_embeds: in place of input_ids, MeterModel's, of K texts [B, K, T, the text config's hidden_size].
            image_embeds: MeterModel's.

        Returns:
            SequenceClassifierOutput with logits [B, 1], or [B, K], and, given labels, the loss.

        Raises:
            ValueError: as MeterModel, labels are not integers [B], or come with one text to an image.
        """
        text = the_one(self, input_ids=input_ids, inputs_embeds=inputs_embeds)
        image = the_one(self, pixel_values=pixel_values, image_embeds=image_embeds)
        check_batch(self, text, image)
        if text.tensor.dim() == {"input_ids": 3, "inputs_embeds": 4}[text.name]:
            logits = self._scores_of_many(text, image, attention_mask)
        elif labels is None:
            given = {text.name: text.tensor, image.name: image.tensor, "attention_mask": attention_mask}
            logits = self.rank_output(self.meter(**given, return_dict=True).pooler_output)
        else:
            raise ValueError(
                f"{type(self).__name__}: labels need several texts to an image, input_ids [B, K, T] or inputs_embeds "
                f"[B, K, T, D], got {list(text.tensor.shape)}"
            )
        return SequenceClassifierOutput(loss=checked_class_loss(self, logits, labels), logits=logits)

    def _scores_of_many(self, text, image, attention_mask):
        batch, texts = text.tensor.shape[:2]
        if attention_mask is not None:
            attention_mask = attention_mask.flatten(0, 1)
        image_states = self.meter.encode_image(**{image.name: image.tensor}).repeat_interleave(texts, dim=0)
        each = {text.name: text.tensor.flatten(0, 1), "attention_mask": attention_mask}
        pooled = self.meter.fuse(self.meter.encode_text(**each), image_states, attention_mask).pooler_output
        return self.rank_output(pooled).view(batch, texts)
