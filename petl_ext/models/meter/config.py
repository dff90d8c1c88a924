"""The sizes of a METER."""

from typing import ClassVar

from huggingface_hub.dataclasses import strict
from transformers import CLIPVisionConfig, PreTrainedConfig, RobertaConfig

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
    is_decoder: ClassVar[bool] = False  # transformers' attention reads it

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
        for name, config_class in self.sub_configs.items():
            part = getattr(self, name)
            if not isinstance(part, config_class):
                raise TypeError(
                    f"MeterConfig: {name} must be a {config_class.__name__} or a dict, got {type(part).__name__}"
                )
        for name, least in (("num_fusion_layers", 1), ("modality_type_vocab_size", 2)):
            if getattr(self, name) < least:
                raise ValueError(f"MeterConfig: {name} must be at least {least}, got {getattr(self, name)}")
