"""METER (arXiv 2111.02387): RoBERTa reads the text, CLIP's vision transformer the image, and two stacks of fusion
layers let each attend to the other. Module names are those of the original, github.com/zdou0830/METER.

B samples, T text tokens, N image tokens (a class token and the patches), D the fusion width, L labels.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from huggingface_hub.dataclasses import strict
from torch import nn
from torch.nn import functional
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    PreTrainedConfig,
    PreTrainedModel,
    RobertaConfig,
    RobertaModel,
)
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import ModelOutput, SequenceClassifierOutput
from transformers.models.bert.modeling_bert import BertAttention, BertIntermediate, BertOutput, BertPooler
from transformers.utils.generic import can_return_tuple

from petl_ext.models.heads import checked_class_loss, checked_soft_target_loss, mlp_head

# What published METER has other than the defaults of transformers' config classes: roberta-base, and ViT-B/16 of CLIP
# without its last block, which METER leaves out.
PUBLISHED_TEXT = {"max_position_embeddings": 514, "type_vocab_size": 1, "layer_norm_eps": 1e-5}
PUBLISHED_VISION = {"image_size": 384, "patch_size": 16, "num_hidden_layers": 11}


@strict
class MeterConfig(PreTrainedConfig):
    """The sizes of a METER. The defaults are the published ones, for VQA at 384 pixels.

    Args:
        text_config: a RobertaConfig, or a dict of what differs from roberta-base.
        vision_config: a CLIPVisionConfig, or a dict of what differs from METER's ViT-B/16: 384 pixels and 11 blocks.
            METER drops the last of CLIP's 12 blocks, which a config read from a CLIP checkpoint still counts.
        hidden_size: the width D of the fusion layers.
        num_fusion_layers: of each of the two streams, at least 1.
        modality_type_vocab_size: token types: text, image and, for NLVR2, which needs 3, the second image.
        num_labels: PreTrainedConfig's: 3129 for VQAv2, 2 for NLVR2, 3 for SNLI-VE.

    Raises:
        TypeError: text_config or vision_config is the config of another model.
        ValueError: there are fewer fusion layers or token types than a METER needs.
    """

    model_type = "meter"
    sub_configs: ClassVar[dict] = {"text_config": RobertaConfig, "vision_config": CLIPVisionConfig}
    is_decoder: ClassVar[bool] = False  # transformers' attention asks

    text_config: dict | PreTrainedConfig | None = None
    vision_config: dict | PreTrainedConfig | None = None
    hidden_size: int = 768
    num_fusion_layers: int = 6
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    hidden_dropout_prob: float | int = 0.1
    attention_probs_dropout_prob: float | int = 0.1
    layer_norm_eps: float = 1e-12
    initializer_range: float = 0.02
    modality_type_vocab_size: int = 2

    def __post_init__(self, **kwargs):
        if not isinstance(self.text_config, PreTrainedConfig):
            self.text_config = RobertaConfig(**PUBLISHED_TEXT | (self.text_config or {}))
        if not isinstance(self.vision_config, PreTrainedConfig):
            self.vision_config = CLIPVisionConfig(**PUBLISHED_VISION | (self.vision_config or {}))
        self._check_parts()
        super().__post_init__(**kwargs)

    def _check_parts(self):
        for name, kind in self.sub_configs.items():
            part = getattr(self, name)
            if not isinstance(part, kind):
                raise TypeError(f"MeterConfig: {name} must be a {kind.__name__} or a dict, got {type(part).__name__}")
        for name, least in (("num_fusion_layers", 1), ("modality_type_vocab_size", 2)):
            if getattr(self, name) < least:
                raise ValueError(f"MeterConfig: {name} must be at least {least}, got {getattr(self, name)}")


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


def resize_position_embeddings(weight, grid):
    """CLIP's position embeddings for another number of patches, as METER resizes them when it loads a checkpoint.

    The class token's row stays; the others are interpolated bicubically over the square of patches.

    Args:
        weight: [1 + g * g, D] for g patches to a side.
        grid: the new number of patches to a side.

    Returns:
        [1 + grid * grid, D] in weight's dtype; `weight` itself where g is already `grid`.

    Raises:
        ValueError: weight has no such shape, or grid is no positive integer.
    """
    if type(grid) is not int or grid < 1:
        raise ValueError(f"resize_position_embeddings: grid must be a positive integer, got {grid!r}")
    old = grid_side(weight.size(0)) if weight.dim() == 2 else 0
    if old == 0:
        raise ValueError(
            "resize_position_embeddings: weight must be [1 + g * g, D], a class token and a square of patches, "
            f"got {list(weight.shape)}"
        )
    if grid == old:
        return weight
    patches = weight[1:].unflatten(0, (old, old)).permute(2, 0, 1).to(torch.promote_types(weight.dtype, torch.float32))
    patches = functional.interpolate(patches[None], size=(grid, grid), mode="bicubic")[0]
    return torch.cat([weight[:1], patches.flatten(1).mT.to(weight.dtype)])


def grid_side(rows):
    """Patches to a side, where rows are a class token and a square of patches; 0 where they are not."""
    side = math.isqrt(max(rows - 1, 0))
    return side if side * side + 1 == rows else 0


class MeterFusionLayer(GradientCheckpointingLayer):
    """Post-norm BERT layer of one stream: self-attention, attention to the other stream, feed-forward.

    The children `attention.output`, `crossattention.output` and `output` are transformers' BertSelfOutput and
    BertOutput, `forward(hidden_states, input_tensor)`.
    """

    def __init__(self, config):
        super().__init__()
        self.attention = BertAttention(config)
        self.crossattention = BertAttention(config, is_cross_attention=True)
        self.intermediate = BertIntermediate(config)
        self.output = BertOutput(config)

    def forward(self, hidden_states, other_states, attention_mask=None, other_mask=None):
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

    def resize_images(self, image_size):
        """Makes the model take images of `image_size` x `image_size` pixels; position embeddings are interpolated.

        The position embedding gets a new weight: make optimisers afterwards.

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

    def resize_token_types(self, num_types):
        """Makes room for `num_types` token types; new ones start as copies of the last, as METER starts NLVR2's third.

        The token-type embedding gets a new weight: make optimisers afterwards.

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

    def __init__(self, config):
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

    def get_input_embeddings(self):
        return self.text_transformer.get_input_embeddings()

    def set_input_embeddings(self, value):
        self.text_transformer.set_input_embeddings(value)

    @can_return_tuple
    def forward(self, input_ids, pixel_values, attention_mask=None, image_token_type_idx=1):
        """
        Args:
            input_ids: [B, T] of RoBERTa's tokenizer.
            pixel_values: [B, 3, H, W] as CLIP's image processor makes them, H and W the vision config's image_size.
            attention_mask: [B, T], 1 for a token and 0 for padding; None is all 1.
            image_token_type_idx: the image's token type: 1, or 2 for the second image of NLVR2.

        Returns:
            MeterModelOutput

        Raises:
            ValueError: a shape that does not fit, texts longer than RoBERTa's positions, or an unknown token type.
        """
        _check_batch(self, input_ids, pixel_values)
        text_states = self.encode_text(input_ids, attention_mask)
        image_states = self.encode_image(pixel_values, image_token_type_idx)
        return self.fuse(text_states, image_states, attention_mask)

    def encode_text(self, input_ids, attention_mask=None):
        """The text stream before the first fusion layer [B, T, D]."""
        self._check_text(input_ids, attention_mask)
        states = self.text_transformer(input_ids, attention_mask=attention_mask, return_dict=True).last_hidden_state
        return self._with_token_type(self.cross_modal_text_transform(states), 0)

    def encode_image(self, pixel_values, image_token_type_idx=1):
        """The image stream before the first fusion layer [B, N, D]."""
        self._check_image(pixel_values, image_token_type_idx)
        states = self.vit_model(pixel_values, return_dict=True).last_hidden_state
        states = self.cross_modal_image_transform(self.vit_model.post_layernorm(states))
        return self._with_token_type(states, image_token_type_idx)

    def fuse(self, text_states, image_states, attention_mask=None):
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

    def _check_text(self, input_ids, attention_mask):
        config = self.text_transformer.config
        longest = config.max_position_embeddings - config.pad_token_id - 1  # RoBERTa counts from pad_token_id + 1
        if input_ids.dim() != 2 or input_ids.size(1) > longest:
            raise ValueError(
                f"MeterModel: input_ids must be [B, T] with at most {longest} tokens, got {list(input_ids.shape)}"
            )
        if attention_mask is not None and attention_mask.shape != input_ids.shape:
            raise ValueError(
                f"MeterModel: attention_mask must have the shape of input_ids, {list(input_ids.shape)}, "
                f"got {list(attention_mask.shape)}"
            )

    def _check_image(self, pixel_values, image_token_type_idx):
        config = self.vit_model.config
        expected = [config.num_channels, config.image_size, config.image_size]
        if list(pixel_values.shape[1:]) != expected:
            raise ValueError(
                f"MeterModel: pixel_values must be [B, {', '.join(map(str, expected))}], got "
                f"{list(pixel_values.shape)}; resize_images(image_size) prepares the model for another size"
            )
        types = self.config.modality_type_vocab_size
        if not 1 <= image_token_type_idx < types:
            raise ValueError(
                f"MeterModel: image_token_type_idx must lie in [1, {types - 1}], got {image_token_type_idx}"
            )


class _MeterClassifier(MeterPreTrainedModel):
    """The head that reads the pooled vector of one text and one image."""

    def __init__(self, config):
        super().__init__(config)
        self.meter = MeterModel(config)
        self.classifier = mlp_head(2 * config.hidden_size, 2 * config.hidden_size, config.num_labels)
        self.post_init()

    @can_return_tuple
    def forward(self, input_ids, pixel_values, attention_mask=None, labels=None):
        """
        Args:
            input_ids, pixel_values, attention_mask: MeterModel's.
            labels: as the class says.

        Returns:
            SequenceClassifierOutput with logits [B, L] and, given labels, the loss.

        Raises:
            ValueError: as MeterModel, or labels are not as the class says.
        """
        output = self.meter(input_ids, pixel_values, attention_mask, return_dict=True)
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

    def __init__(self, config):
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
    def forward(self, input_ids, pixel_values, attention_mask=None, labels=None):
        """
        Args:
            input_ids, attention_mask: MeterModel's.
            pixel_values: [B, 2, 3, H, W].
            labels: class indices [B].

        Returns:
            SequenceClassifierOutput with logits [B, L] and, given labels, the loss.

        Raises:
            ValueError: as MeterModel, there are not 2 images to a text, or labels are not integers [B].
        """
        if pixel_values.dim() != 5 or pixel_values.size(1) != self.num_images:
            raise ValueError(
                f"{type(self).__name__}: pixel_values must be [B, {self.num_images}, 3, H, W], "
                f"{self.num_images} images to a text, got {list(pixel_values.shape)}"
            )
        pooled = [
            self.meter(input_ids, image, attention_mask, image_token_type_idx=i, return_dict=True).pooler_output
            for i, image in enumerate(pixel_values.unbind(1), start=1)
        ]
        logits = self.classifier(torch.cat(pooled, dim=-1))
        return SequenceClassifierOutput(loss=checked_class_loss(self, logits, labels), logits=logits)


class MeterForImageAndTextRetrieval(MeterPreTrainedModel):
    """Flickr30K and COCO retrieval: scores how well texts fit an image; cross-entropy over the texts of one image, of
    which METER takes the right one and 15 random ones.
    """

    def __init__(self, config):
        super().__init__(config)
        self.meter = MeterModel(config)
        self.rank_output = nn.Linear(2 * config.hidden_size, 1)
        self.post_init()

    @can_return_tuple
    def forward(self, input_ids, pixel_values, attention_mask=None, labels=None):
        """
        Args:
            input_ids: one text to an image [B, T], or K texts [B, K, T].
            pixel_values: [B, 3, H, W]; the vision transformer reads each image once, whatever K.
            attention_mask: of input_ids' shape.
            labels: with K texts, which of them is the right one [B].

        Returns:
            SequenceClassifierOutput with logits [B, 1], or [B, K], and, given labels, the loss.

        Raises:
            ValueError: as MeterModel, labels are not integers [B], or come with one text to an image.
        """
        if input_ids.dim() == 3:
            logits = self._scores_of_many(input_ids, pixel_values, attention_mask)
        elif labels is None:
            output = self.meter(input_ids, pixel_values, attention_mask, return_dict=True)
            logits = self.rank_output(output.pooler_output)
        else:
            raise ValueError(
                f"{type(self).__name__}: labels need several texts to an image, input_ids [B, K, T], "
                f"got {list(input_ids.shape)}"
            )
        return SequenceClassifierOutput(loss=checked_class_loss(self, logits, labels), logits=logits)

    def _scores_of_many(self, input_ids, pixel_values, attention_mask):
        _check_batch(self, input_ids, pixel_values)
        batch, texts, _ = input_ids.shape
        if attention_mask is not None:
            attention_mask = attention_mask.flatten(0, 1)
        image_states = self.meter.encode_image(pixel_values).repeat_interleave(texts, dim=0)
        text_states = self.meter.encode_text(input_ids.flatten(0, 1), attention_mask)
        pooled = self.meter.fuse(text_states, image_states, attention_mask).pooler_output
        return self.rank_output(pooled).view(batch, texts)


def _check_batch(model, input_ids, pixel_values):
    if input_ids.size(0) != pixel_values.size(0):
        raise ValueError(
            f"{type(model).__name__}: input_ids and pixel_values must hold the same number of samples, "
            f"got {list(input_ids.shape)} and {list(pixel_values.shape)}"
        )


def _added_to_scores(attention_mask, dtype):
    """[B, T] of 1 and 0 to [B, 1, 1, T] of 0 and the most negative number."""
    if attention_mask is None:
        return None
    hidden = attention_mask[:, None, None, :] == 0
    return torch.zeros_like(hidden, dtype=dtype).masked_fill(hidden, torch.finfo(dtype).min)
