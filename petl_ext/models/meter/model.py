"""The backbone: two encoders and the fusion layers."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from transformers import CLIPVisionModel, PreTrainedModel, RobertaModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import ModelOutput
from transformers.models.bert.modeling_bert import BertAttention, BertIntermediate, BertOutput, BertPooler
from transformers.utils.generic import can_return_tuple

from petl_ext.models.meter.config import MeterConfig
from petl_ext.models.meter.given import check_batch, the_one
from petl_ext.models.meter.positions import resize_position_embeddings


@dataclass
class MeterModelOutput(ModelOutput):
    """
    Attributes:
        text_last_hidden_state: the text stream after the last fusion layer [B, T, D].
        image_last_hidden_state: the image stream [B, N, D]; row 0 is the class token.
        text_pooler_output, image_pooler_output: tanh of a projection of row 0 of each [B, D].
        pooler_output: both, text first [B, 2D].
    """

    text_last_hidden_state: torch.Tensor | None = None
    image_last_hidden_state: torch.Tensor | None = None
    text_pooler_output: torch.Tensor | None = None
    image_pooler_output: torch.Tensor | None = None
    pooler_output: torch.Tensor | None = None


class MeterFusionLayer(GradientCheckpointingLayer):
    """Post-norm BERT layer of one stream: self-attention, attention to the other stream, feed-forward.

    The children `attention.output`, `crossattention.output` and `output` are transformers' BertSelfOutput and
    BertOutput, `forward(hidden_states, input_tensor)`.
    """

    def __init__(self, config: MeterConfig):
        super().__init__()
        self.attention = BertAttention(config)
        self.crossattention = BertAttention(config, is_cross_attention=True)
        self.intermediate = BertIntermediate(config)
        self.output = BertOutput(config)

    def forward(
        self,
        hidden_states: Tensor,
        other_states: Tensor,
        attention_mask: Tensor | None = None,
        other_mask: Tensor | None = None,
    ) -> Tensor:
        """`layer(hidden_states, other_states, attention_mask=None, other_mask=None)` to this stream's new [B, N, D].

        Args:
            hidden_states: this stream [B, N, D].
            other_states: the other stream [B, M, D], from before its own layer of the same index.
            attention_mask: None, or added to the scores among this stream's tokens [B, 1, 1, N].
            other_mask: None, or added to the scores of the other stream's tokens [B, 1, 1, M].

        Returns:
            The plain tensor [B, N, D], no tuple: a module that takes only `hidden_states` can stand in for the layer.
        """
        attended, _ = self.attention(hidden_states, attention_mask=attention_mask)
        attended, _ = self.crossattention(
            attended, encoder_hidden_states=other_states, encoder_attention_mask=other_mask
        )
        return self.output(self.intermediate(attended), attended)


class MeterPreTrainedModel(PreTrainedModel):
    """What all METER models share. METER's own weights start from Normal(0, 0.02), biases 0, norms 1 and 0; the text
    and the vision transformer start as transformers starts them.
    """

    config: MeterConfig
    base_model_prefix = "meter"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _no_split_modules: ClassVar[list] = ["MeterFusionLayer"]

    def resize_images(self, image_size: int) -> None:
        """Makes the model take images of `image_size` x `image_size` pixels; position embeddings are interpolated.

        The position embedding gets a new weight: make optimizers afterwards.

        Raises:
            ValueError: image_size is no positive multiple of the patch size; the model has not changed.
        """
        vision = self.base_model.vit_model
        patch_size = vision.config.patch_size
        if type(image_size) is not int or image_size < 1 or image_size % patch_size:
            raise ValueError(
                f"resize_images: image_size must be a positive multiple of the patch size {patch_size}, "
                f"got {image_size!r}"
            )
        embeddings, table = vision.embeddings, vision.embeddings.position_embedding
        weight = resize_position_embeddings(table.weight.detach(), image_size // patch_size)
        table.weight = nn.Parameter(weight, requires_grad=table.weight.requires_grad)
        table.num_embeddings = embeddings.num_positions = len(weight)
        embeddings.num_patches = len(weight) - 1
        embeddings.position_ids = torch.arange(len(weight), device=weight.device)[None]
        embeddings.image_size = vision.config.image_size = image_size

    def resize_token_types(self, num_types: int) -> None:
        """Makes room for `num_types` token types; new ones start as copies of the last, as METER starts NLVR2's third.

        The token-type embedding gets a new weight: make optimizers afterwards.

        Raises:
            ValueError: num_types is no integer, or fewer than there are; the model has not changed.
        """
        table = self.base_model.token_type_embeddings
        if type(num_types) is not int or num_types < len(table.weight):
            raise ValueError(
                f"resize_token_types: num_types must be an integer of at least {len(table.weight)}, got {num_types!r}"
            )
        rows = torch.arange(num_types, device=table.weight.device).clamp(max=len(table.weight) - 1)
        table.weight = nn.Parameter(table.weight.detach()[rows], requires_grad=table.weight.requires_grad)
        table.num_embeddings = self.base_model.config.modality_type_vocab_size = num_types


class MeterModel(MeterPreTrainedModel):
    """Text and image to two streams of hidden states and one pooled vector of 2D.

    Both streams of a fusion layer read what the other was before that layer. All tokens of the vision transformer,
    patches too, pass its last norm. The text mask hides padded tokens from every attention; no image token is hidden.
    """

    def __init__(self, config: MeterConfig):
        super().__init__(config)
        self.text_transformer = RobertaModel(config.text_config, add_pooling_layer=False)
        self.vit_model = CLIPVisionModel(config.vision_config)
        self.cross_modal_text_transform = nn.Linear(config.text_config.hidden_size, config.hidden_size)
        self.cross_modal_image_transform = nn.Linear(config.vision_config.hidden_size, config.hidden_size)
        self.token_type_embeddings = nn.Embedding(config.modality_type_vocab_size, config.hidden_size)
        layers = range(config.num_fusion_layers)
        self.cross_modal_text_layers = nn.ModuleList(MeterFusionLayer(config) for _ in layers)
        self.cross_modal_image_layers = nn.ModuleList(MeterFusionLayer(config) for _ in layers)
        self.cross_modal_text_pooler = BertPooler(config)
        self.cross_modal_image_pooler = BertPooler(config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.text_transformer.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.text_transformer.set_input_embeddings(value)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_token_type_idx: int = 1,
        inputs_embeds: Tensor | None = None,
        image_embeds: Tensor | None = None,
    ) -> MeterModelOutput:
        """
        Args:
            input_ids: [B, T] of RoBERTa's tokenizer.
            pixel_values: [B, 3, H, W] as CLIP's image processor makes them, H and W the vision config's image_size.
            attention_mask: [B, T], 1 for a token and 0 for padding; None is all 1.
            image_token_type_idx: the image's token type: 1, or 2 for the second image of NLVR2.
            inputs_embeds: in place of input_ids, the words' embeddings before RoBERTa adds positions, [B, T, the text
                config's hidden_size]; padding stands on the right.
            image_embeds: in place of pixel_values, any number of image tokens as `vit_model` gives them in
                last_hidden_state, before its last norm, [B, N, the vision config's hidden_size].

        Returns:
            MeterModelOutput

        Raises:
            ValueError: a shape that does not fit, texts longer than RoBERTa's positions, an unknown token type, or both
                or neither of two arguments that stand for each other.
        """
        text = the_one(self, input_ids=input_ids, inputs_embeds=inputs_embeds)
        check_batch(self, text, the_one(self, pixel_values=pixel_values, image_embeds=image_embeds))
        text_states = self.encode_text(input_ids, attention_mask, inputs_embeds)
        image_states = self.encode_image(pixel_values, image_token_type_idx, image_embeds)
        return self.fuse(text_states, image_states, attention_mask)

    def encode_text(
        self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None, inputs_embeds: Tensor | None = None
    ) -> Tensor:
        """The text stream before the first fusion layer [B, T, D]."""
        self._check_text(the_one(self, input_ids=input_ids, inputs_embeds=inputs_embeds), attention_mask)
        states = self.text_transformer(
            input_ids, attention_mask=attention_mask, inputs_embeds=inputs_embeds, return_dict=True
        ).last_hidden_state
        return self._with_token_type(self.cross_modal_text_transform(states), 0)

    def encode_image(
        self, pixel_values: Tensor | None = None, image_token_type_idx: int = 1, image_embeds: Tensor | None = None
    ) -> Tensor:
        """The image stream before the first fusion layer [B, N, D]."""
        self._check_image(the_one(self, pixel_values=pixel_values, image_embeds=image_embeds), image_token_type_idx)
        if image_embeds is None:
            image_embeds = self.vit_model(pixel_values, return_dict=True).last_hidden_state
        states = self.cross_modal_image_transform(self.vit_model.post_layernorm(image_embeds))
        return self._with_token_type(states, image_token_type_idx)

    def fuse(self, text_states: Tensor, image_states: Tensor, attention_mask: Tensor | None = None) -> MeterModelOutput:
        """What the fusion layers and the poolers make of the two streams, as MeterModelOutput."""
        mask = _added_to_scores(attention_mask, text_states.dtype)
        text, image = text_states, image_states
        for text_layer, image_layer in zip(self.cross_modal_text_layers, self.cross_modal_image_layers, strict=True):
            text, image = text_layer(text, image, mask, None), image_layer(image, text, None, mask)
        text_pooled, image_pooled = self.cross_modal_text_pooler(text), self.cross_modal_image_pooler(image)
        pooled = torch.cat([text_pooled, image_pooled], dim=-1)
        return MeterModelOutput(text, image, text_pooled, image_pooled, pooled)

    def _with_token_type(self, states, token_type):
        return states + self.token_type_embeddings(torch.full((1,), token_type, device=states.device))

    def _check_text(self, text, attention_mask):
        config = self.text_transformer.config
        longest = config.max_position_embeddings - config.pad_token_id - 1  # RoBERTa counts from pad_token_id + 1
        width = [config.hidden_size] if text.name == "inputs_embeds" else []
        shape = list(text.tensor.shape)
        if len(shape) != 2 + len(width) or shape[2:] != width or shape[1] > longest:
            raise ValueError(
                f"MeterModel: {text.name} must be [{', '.join(map(str, ['B', 'T', *width]))}] with at most {longest} "
                f"tokens, got {shape}"
            )
        if attention_mask is not None and list(attention_mask.shape) != shape[:2]:
            raise ValueError(
                f"MeterModel: attention_mask must have the shape of {text.name}, {shape[:2]}, "
                f"got {list(attention_mask.shape)}"
            )

    def _check_image(self, image, image_token_type_idx):
        config, shape = self.vit_model.config, list(image.tensor.shape)
        if image.name == "image_embeds" and (len(shape) != 3 or shape[2] != config.hidden_size):
            raise ValueError(f"MeterModel: image_embeds must be [B, N, {config.hidden_size}], got {shape}")
        expected = [config.num_channels, config.image_size, config.image_size]
        if image.name == "pixel_values" and shape[1:] != expected:
            raise ValueError(
                f"MeterModel: pixel_values must be [B, {', '.join(map(str, expected))}], got "
                f"{shape}; resize_images(image_size) prepares the model for another size"
            )
        types = self.config.modality_type_vocab_size
        if not 1 <= image_token_type_idx < types:
            raise ValueError(
                f"MeterModel: image_token_type_idx must lie in [1, {types - 1}], got {image_token_type_idx}"
            )


def _added_to_scores(attention_mask, dtype):
    """[B, T] of 1 and 0 to [B, 1, 1, T] of 0 and the most negative number."""
    if attention_mask is None:
        return None
    hidden = attention_mask[:, None, None, :] == 0
    return torch.zeros_like(hidden, dtype=dtype).masked_fill(hidden, torch.finfo(dtype).min)
