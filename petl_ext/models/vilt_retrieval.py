"""ViLT for retrieval as it is trained: several texts to an image."""

import torch
import transformers
from torch import Tensor
from transformers.modeling_outputs import SequenceClassifierOutput
from transformers.utils.generic import can_return_tuple

from petl_ext.models.heads import checked_class_loss


class ViltForImageAndTextRetrieval(transformers.ViltForImageAndTextRetrieval):
    """Flickr30K and COCO retrieval: transformers' class, with its parameters and keys, which also takes K texts to an
    image and has the loss that it lacks: cross-entropy over the texts of one image, of which ViLT takes the right one
    and 15 random ones.
    """

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        pixel_mask: Tensor | None = None,
        labels: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        image_embeds: Tensor | None = None,
    ) -> SequenceClassifierOutput:
        """
        Args:
            input_ids, attention_mask, token_type_ids: one text to an image [B, T], or K texts [B, K, T].
            pixel_values, pixel_mask: [B, 3, H, W] and [B, H, W]; an image's patches are embedded once, whatever K.
            labels: with K texts, which of them is the right one [B].
            inputs_embeds, image_embeds: with one text to an image, transformers'.

        Returns:
            SequenceClassifierOutput with logits [B, 1], or [B, K], and, given labels, the loss.

        Raises:
            ValueError: labels are not integers [B], or come with one text to an image; K texts come with
                embeddings, or for another number of images.
        """
        texts = {"input_ids": input_ids, "attention_mask": attention_mask, "token_type_ids": token_type_ids}
        embeds = {"inputs_embeds": inputs_embeds, "image_embeds": image_embeds}
        if input_ids is None or input_ids.dim() == 2:
            if labels is not None:
                got = None if input_ids is None else list(input_ids.shape)
                raise ValueError(
                    f"{type(self).__name__}: labels need several texts to an image, input_ids [B, K, T], got {got}"
                )
            images = {"pixel_values": pixel_values, "pixel_mask": pixel_mask}
            return super().forward(**texts, **images, **embeds, return_dict=True)
        given = [name for name, tensor in embeds.items() if tensor is not None]
        if given or pixel_values is None or len(pixel_values) != len(input_ids):
            images = None if pixel_values is None else list(pixel_values.shape)
            raise ValueError(
                f"{type(self).__name__}: input_ids [B, K, T] need pixel_values [B, 3, H, W] and no embeddings, got "
                f"{list(input_ids.shape)}, {images} and {given}"
            )
        logits = self._scores_of_many(texts, pixel_values, pixel_mask)
        return SequenceClassifierOutput(loss=checked_class_loss(self, logits, labels), logits=logits)

    def _scores_of_many(self, texts, pixel_values, pixel_mask):
        batch, count = texts["input_ids"].shape[:2]
        if pixel_mask is None:
            pixel_mask = torch.ones_like(pixel_values[:, 0], dtype=torch.long)
        patches, mask, _ = self.vilt.embeddings.visual_embed(pixel_values, pixel_mask, self.config.max_image_length)
        each = {name: tensor.flatten(0, 1) for name, tensor in texts.items() if tensor is not None}
        output = self.vilt(
            **each,
            image_embeds=patches.repeat_interleave(count, dim=0),
            pixel_mask=mask.repeat_interleave(count, dim=0),
            return_dict=True,
        )
        return self.rank_output(output.pooler_output).view(batch, count)
