"""Models that Hugging Face transformers lacks."""

try:
    import transformers  # noqa: F401
except ModuleNotFoundError as error:
    if error.name != "transformers":
        raise
    raise ImportError("petl_ext.models needs transformers: pip install transformers") from error

from petl_ext.models.checkpoints import (
    CheckpointReport,
    KeyOutcome,
    load_dvp_checkpoint,
    load_meter_checkpoint,
    load_vilt_checkpoint,
)
from petl_ext.models.clip_classifier import CLIPClassifier
from petl_ext.models.dvp import DVPT5, DVPBert, DVPLlama, DVPModel
from petl_ext.models.meter import (
    MeterConfig,
    MeterForImageAndTextRetrieval,
    MeterForImagesAndTextClassification,
    MeterForQuestionAnswering,
    MeterForVisualEntailment,
    MeterFusionLayer,
    MeterModel,
    MeterModelOutput,
    MeterPreTrainedModel,
    resize_position_embeddings,
)
from petl_ext.models.vilt_retrieval import ViltForImageAndTextRetrieval

__all__ = [
    "DVPT5",
    "CLIPClassifier",
    "CheckpointReport",
    "DVPBert",
    "DVPLlama",
    "DVPModel",
    "KeyOutcome",
    "MeterConfig",
    "MeterForImageAndTextRetrieval",
    "MeterForImagesAndTextClassification",
    "MeterForQuestionAnswering",
    "MeterForVisualEntailment",
    "MeterFusionLayer",
    "MeterModel",
    "MeterModelOutput",
    "MeterPreTrainedModel",
    "ViltForImageAndTextRetrieval",
    "load_dvp_checkpoint",
    "load_meter_checkpoint",
    "load_vilt_checkpoint",
    "resize_position_embeddings",
]
