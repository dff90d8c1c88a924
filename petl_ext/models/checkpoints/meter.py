"""METER under the names of its authors' code base, and of APT's and DAS's."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from petl_ext.models.checkpoints import origins
from petl_ext.models.checkpoints.adapt import resized, with_third_row
from petl_ext.models.checkpoints.backbones import (
    APT,
    DAS_ADAPTER,
    DAS_BYPASS,
    PARALLEL_ADAPTER,
    SEQUENTIAL_ADAPTER,
    Architecture,
    load_checkpoint,
)
from petl_ext.models.checkpoints.clip import CLIP_PROJ, CLIP_TEXT, visual_rules
from petl_ext.models.checkpoints.report import CheckpointReport
from petl_ext.models.checkpoints.rules import rule

METER_APT = APT._replace(config="APTConfig(num_prompts={num_prompts}, rank={rank}, train_scale=False)")
_FUSION = "cross_modal_{stream}_layers.{i}"

METER = Architecture(
    title="METER",
    child="meter",
    landmark="vit_model.embeddings.patch_embedding.weight",
    origin=origins.METER,
    backbone=(
        rule(
            "text_transformer.pooler.{rest}", "text_transformer.pooler.{rest}", absent="METER does not use this pooler"
        ),
        rule("text_transformer.{rest}", "text_transformer.{rest}"),
        *visual_rules("vit_model.visual", "vit_model", resized),
        rule("token_type_embeddings.weight", "token_type_embeddings.weight", adapt=with_third_row),
        rule("cross_modal_{rest}", "cross_modal_{rest}"),
    ),
    layers=(
        (f"{_FUSION}.{{attention}}.output.APT", f"{_FUSION}.{{attention}}.output.apt", METER_APT),
        (f"{_FUSION}.{{attention}}.output.adapter", f"{_FUSION}.{{attention}}.output.adapter", SEQUENTIAL_ADAPTER),
        (f"{_FUSION}.output.adapter", f"{_FUSION}.output.adapter", SEQUENTIAL_ADAPTER),
        (f"{_FUSION}.{{attention}}.output.PA", f"{_FUSION}.{{attention}}.output.adapter", PARALLEL_ADAPTER),
        (f"{_FUSION}.{{attention}}.output.adapter", f"{_FUSION}.{{attention}}.output.adapter", DAS_ADAPTER),
        (f"{_FUSION}.adapter", f"{_FUSION}.output.adapter", DAS_ADAPTER),
        ("adapter_list_l.{i}.0", "cross_modal_text_layers.{i}.bypass", DAS_BYPASS),
        ("adapter_list_v.{i}.0", "cross_modal_image_layers.{i}.bypass", DAS_BYPASS),
    ),
    heads={
        "MeterForQuestionAnswering": ("vqa_classifier", "gqa_classifier"),
        "MeterForVisualEntailment": ("snli_classifier",),
        "MeterForImagesAndTextClassification": ("nlvr2_classifier",),
        "MeterForImageAndTextRetrieval": ("rank_output", "itm_score"),
    },
    left_out={
        "vit_model.visual.proj": CLIP_PROJ,
        "vit_model.{clip_text}": CLIP_TEXT,
        "vit_model.{clip_text}.{rest}": CLIP_TEXT,
    },
    class_token="cross_modal_text_transform",
    epsilons={},
    trains_scale=False,
)


def load_meter_checkpoint(
    model: nn.Module, checkpoint: str | Path | Mapping[str, Any], ignore: Iterable[str] = ()
) -> CheckpointReport:
    """Fills our METER with a checkpoint of the authors' METER code base (CLIP and RoBERTa), or of APT's or DAS's METER.

    As `load_vilt_checkpoint`. The head is `vqa_classifier` or `gqa_classifier` for MeterForQuestionAnswering,
    `snli_classifier` for MeterForVisualEntailment, `nlvr2_classifier` for MeterForImagesAndTextClassification,
    `rank_output` for MeterForImageAndTextRetrieval. Position embeddings [1 + g * g, D] are resized bicubically to the
    model's image size, as the original does. What the file holds of CLIP's text tower and of RoBERTa's pooler is left
    out. The scales of the file's APT layers do not train, as in the authors' METER: what is attached becomes an
    `APTConfig(train_scale=False)`.

    Args:
        model: a MeterModel or a MeterFor... model.
        checkpoint, ignore: those of `load_vilt_checkpoint`.

    Returns:
        A `CheckpointReport`.

    Raises:
        TypeError, FileNotFoundError, ValueError: as `load_vilt_checkpoint`.
    """
    return load_checkpoint(model, checkpoint, ignore, METER)
