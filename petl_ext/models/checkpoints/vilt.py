"""ViLT under the names of its authors' code base, and of APT's and DAS's."""

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
from petl_ext.models.checkpoints.report import CheckpointReport
from petl_ext.models.checkpoints.rules import rule

VILT = Architecture(
    title="ViLT",
    child="vilt",
    landmark="embeddings.patch_embeddings.projection.weight",
    origin=origins.VILT,
    backbone=(
        rule("text_embeddings.{rest}", "embeddings.text_embeddings.{rest}"),
        rule("transformer.cls_token", "embeddings.cls_token"),
        rule("transformer.pos_embed", "embeddings.position_embeddings", adapt=resized),
        rule("transformer.patch_embed.proj.{t}", "embeddings.patch_embeddings.projection.{t}"),
        rule("transformer.blocks.{i}.norm1.{t}", "encoder.layer.{i}.layernorm_before.{t}"),
        rule(
            "transformer.blocks.{i}.attn.qkv.{t}",
            "encoder.layer.{i}.attention.attention.query.{t}",
            "encoder.layer.{i}.attention.attention.key.{t}",
            "encoder.layer.{i}.attention.attention.value.{t}",
        ),
        rule("transformer.blocks.{i}.attn.proj.{t}", "encoder.layer.{i}.attention.output.dense.{t}"),
        rule("transformer.blocks.{i}.norm2.{t}", "encoder.layer.{i}.layernorm_after.{t}"),
        rule("transformer.blocks.{i}.mlp.fc1.{t}", "encoder.layer.{i}.intermediate.dense.{t}"),
        rule("transformer.blocks.{i}.mlp.fc2.{t}", "encoder.layer.{i}.output.dense.{t}"),
        rule("transformer.norm.{t}", "layernorm.{t}"),
        rule("token_type_embeddings.weight", "embeddings.token_type_embeddings.weight", adapt=with_third_row),
        rule("pooler.dense.{t}", "pooler.dense.{t}", absent="this model has no pooler"),
    ),
    layers=(
        ("transformer.blocks.{i}.attn.APT", "encoder.layer.{i}.attention.output.apt", APT),
        ("transformer.blocks.{i}.adapter0", "encoder.layer.{i}.attention.output.adapter", SEQUENTIAL_ADAPTER),
        ("transformer.blocks.{i}.adapter1", "encoder.layer.{i}.output.adapter", SEQUENTIAL_ADAPTER),
        ("transformer.blocks.{i}.attn.PA", "encoder.layer.{i}.attention.output.adapter", PARALLEL_ADAPTER),
        ("transformer.blocks.{i}.adapter0", "encoder.layer.{i}.adapter", DAS_ADAPTER),
        ("transformer.blocks.{i}.adapter1", "encoder.layer.{i}.output.adapter", DAS_ADAPTER),
        ("adapter_list.{i}.0", "encoder.layer.{i}.bypass", DAS_BYPASS),
    ),
    heads={
        "ViltForQuestionAnswering": ("vqa_classifier", "gqa_classifier", "snli_classifier"),
        "ViltForImagesAndTextClassification": ("nlvr2_classifier",),
        "ViltForImageAndTextRetrieval": ("rank_output", "itm_score"),
        "ViltForMaskedLM": ("mlm_score",),
    },
    left_out={},
    class_token="embeddings.text_embeddings",
    # transformers' configuration has one number for all.
    epsilons={
        "{backbone}embeddings.text_embeddings.LayerNorm": 1e-12,
        "{backbone}encoder.layer.{i}.layernorm_before": 1e-6,
        "{backbone}encoder.layer.{i}.layernorm_after": 1e-6,
        "{backbone}layernorm": 1e-6,
        "mlm_score.transform.LayerNorm": 1e-12,
    },
    trains_scale=True,
)


def load_vilt_checkpoint(
    model: nn.Module, checkpoint: str | Path | Mapping[str, Any], ignore: Iterable[str] = ()
) -> CheckpointReport:
    """Fills a Hugging Face ViLT model with a checkpoint of the authors' ViLT code base, or of APT's or DAS's ViLT.

    The head is picked by the model's class: `vqa_classifier`, `gqa_classifier` or `snli_classifier` for
    ViltForQuestionAnswering, `nlvr2_classifier` for ViltForImagesAndTextClassification, `rank_output` for
    ViltForImageAndTextRetrieval, `mlm_score` for ViltForMaskedLM. A file without that head leaves the model's as it is;
    but a retrieval head then becomes row 1 of the file's `itm_score`, from which the original starts it. Position
    embeddings [1, 1 + g * g, D] of another grid are resized bicubically, and a third token type starts as a copy of the
    second.

    Attach APT or adapters before loading a file that holds them. What the file does not say stays as it was attached:
    activations, and the scale of adapters (4 in APT's parallel ones, 1 in DAS's). Load before layers are removed for
    good.

    Where the file holds a class token (`token4classifier`), without which it computes something else, the model gets
    one too, unless it has it or `ignore` names it: as `class_token=True` of what is attached or, where nothing is, as
    an attached `ClassTokenConfig`, which then freezes nothing.

    The original's norms add 1e-6 to the variance in the blocks and behind them, and 1e-12 in the text embeddings;
    transformers' configuration has one number for all. So the model's norms are set, and the report says so. Of this
    `save_pretrained` keeps nothing: set `eps` again after `from_pretrained`.

    NaN and infinity in the file are loaded, and the report says so. Finite values that the model's dtype cannot hold
    are refused.

    Args:
        model: a ViltModel or a ViltFor... model.
        checkpoint: the path of a Lightning checkpoint, or of its state dict alone, as written by torch.save or by
            safetensors, in which nothing is executed; or one of the two as a mapping.
        ignore: names of the file's keys, or parts that end at a dot: ["token4classifier", "vqa_classifier."].

    Returns:
        A `CheckpointReport`: what became of every key, which of the model's tensors the file has not filled, and what
        else has been set.

    Raises:
        TypeError: the model is no ViLT, the checkpoint neither a path nor a mapping, or ignore no list of names.
        FileNotFoundError: there is no such file.
        ValueError: the file is broken, holds more than data, is of another architecture, or does not fit the model:
            unknown keys, other shapes, layers of another method than is attached, tensors of the backbone that it
            lacks. The model has not changed.
    """
    return load_checkpoint(model, checkpoint, ignore, VILT)
