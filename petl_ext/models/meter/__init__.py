"""METER (arXiv 2111.02387): RoBERTa reads the text, CLIP's vision transformer the image, and two stacks of fusion
layers let each attend to the other. Module names are those of the original, github.com/zdou0830/METER.

B samples, T text tokens, N image tokens (a class token and the patches), D the fusion width, L labels.
"""

from petl_ext.models.meter.config import MeterConfig
from petl_ext.models.meter.heads import (
    MeterForImageAndTextRetrieval,
    MeterForImagesAndTextClassification,
    MeterForQuestionAnswering,
    MeterForVisualEntailment,
)
from petl_ext.models.meter.model import MeterFusionLayer, MeterModel, MeterModelOutput, MeterPreTrainedModel
from petl_ext.models.meter.positions import resize_position_embeddings

__all__ = [
    "MeterConfig",
    "MeterForImageAndTextRetrieval",
    "MeterForImagesAndTextClassification",
    "MeterForQuestionAnswering",
    "MeterForVisualEntailment",
    "MeterFusionLayer",
    "MeterModel",
    "MeterModelOutput",
    "MeterPreTrainedModel",
    "resize_position_embeddings",
]
