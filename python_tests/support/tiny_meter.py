"""Small METER models with random weights, and inputs for them."""

import torch

from petl_ext.models import (
    MeterConfig,
    MeterForImageAndTextRetrieval,
    MeterForImagesAndTextClassification,
    MeterForQuestionAnswering,
    MeterForVisualEntailment,
    MeterModel,
)

# Three widths, so that none can be taken for another.
TEXT_DIM, VISION_DIM, DIM = 24, 40, 32
TEXT, IMAGE, PATCH, LAYERS, LABELS = 6, 24, 8, 3, 5
IMAGE_TOKENS = 1 + (IMAGE // PATCH) ** 2

HEADS = (
    MeterForQuestionAnswering,
    MeterForVisualEntailment,
    MeterForImagesAndTextClassification,
    MeterForImageAndTextRetrieval,
)
MODELS = (MeterModel, *HEADS)


def make_config(**changes):
    shared = {"num_hidden_layers": 2, "num_attention_heads": 4, "initializer_range": 0.2}
    text = shared | {"hidden_size": TEXT_DIM, "intermediate_size": 28, "vocab_size": 50, "max_position_embeddings": 12}
    vision = shared | {"hidden_size": VISION_DIM, "intermediate_size": 44, "image_size": IMAGE, "patch_size": PATCH}
    sizes = {
        "text_config": text,
        "vision_config": vision,
        "hidden_size": DIM,
        "num_fusion_layers": LAYERS,
        "num_attention_heads": 4,
        "intermediate_size": 48,
        "initializer_range": 0.2,
        "modality_type_vocab_size": 3,
        "num_labels": LABELS,
    }
    return MeterConfig(**sizes | changes)


def make_model(model_class=MeterForQuestionAnswering, seed=0, **changes):
    torch.manual_seed(seed)
    model = model_class(make_config(**changes)).eval()
    # Biases and norms start at 0 and 1, with which many a mistake would change nothing.
    for parameter in model.parameters():
        if parameter.dim() == 1:
            torch.nn.init.normal_(parameter, mean=parameter[0].item(), std=0.1)
    return model


def make_inputs(model, seed=1, batch=2):
    """The first text of the batch is half padding."""
    generator = torch.Generator().manual_seed(seed)
    images = (2,) if isinstance(model, MeterForImagesAndTextClassification) else ()
    image = model.config.vision_config.image_size
    input_ids = torch.randint(3, 50, (batch, TEXT), generator=generator)
    mask = torch.ones(batch, TEXT, dtype=torch.long)
    mask[0, TEXT // 2 :] = 0
    input_ids[mask == 0] = model.config.text_config.pad_token_id
    return {
        "input_ids": input_ids,
        "attention_mask": mask,
        "pixel_values": torch.randn(batch, *images, 3, image, image, generator=generator),
    }


def run(model, inputs):
    """The logits, or the pooled output where there is no head."""
    output = model(**inputs)
    return output.logits if "logits" in output else output.pooler_output
