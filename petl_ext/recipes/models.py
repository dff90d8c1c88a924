"""The families of models that recipes train: a model class for each task, and what reads texts and images for it."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    AutoTokenizer,
    BertModel,
    CLIPVisionModel,
    LlamaModel,
    T5Model,
    ViltConfig,
    ViltForImagesAndTextClassification,
    ViltForQuestionAnswering,
    ViltModel,
    ViltProcessor,
)

from petl_ext.models import (
    DVPT5,
    DVPBert,
    DVPLlama,
    MeterConfig,
    MeterForImageAndTextRetrieval,
    MeterForImagesAndTextClassification,
    MeterForQuestionAnswering,
    MeterForVisualEntailment,
    MeterModel,
    ViltForImageAndTextRetrieval,
    load_dvp_checkpoint,
    load_meter_checkpoint,
    load_vilt_checkpoint,
)
from petl_ext.tasks.inputs import TextAndImage

PAIR_TYPES = 3  # token types of NLVR2: text and two images
METER_IMAGE_SIZE = 384


@dataclass(frozen=True)
class Family:
    """One family.

    Attributes:
        tasks: {task: class of the model}.
        make: (the recipe's model, class, labels, method, whether layers are searched) -> a model.
        processor: (the recipe's model) -> the processor.
        is_dvp: whether its method is DVP.
    """

    tasks: dict[str, type[nn.Module]]
    make: Callable[[Any, type, int, Any, bool], nn.Module]
    processor: Callable[[Any], Any]
    is_dvp: bool = False


def _make_vilt(given, cls, num_labels, method, searching):
    sizes = {"num_labels": num_labels}
    is_pair = cls is ViltForImagesAndTextClassification
    if is_pair:
        sizes |= {"num_images": 2, "modality_type_vocab_size": PAIR_TYPES}
    if given.checkpoint is not None:
        config = ViltConfig(**sizes) if given.name is None else ViltConfig.from_pretrained(given.name, **sizes)
        model = cls(config)
        load_vilt_checkpoint(model, given.checkpoint)
        return model
    model = cls.from_pretrained(given.name, **sizes, ignore_mismatched_sizes=is_pair)
    if is_pair:
        before = ViltModel.from_pretrained(given.name).embeddings.token_type_embeddings
        _fill_types(model.vilt.embeddings.token_type_embeddings, before)
    return model


def _make_meter(given, cls, num_labels, method, searching):
    sizes = {"num_labels": num_labels}
    is_pair = cls is MeterForImagesAndTextClassification
    if is_pair:
        sizes["modality_type_vocab_size"] = PAIR_TYPES
    if given.checkpoint is not None:
        vision = {} if given.image_size is None else {"image_size": given.image_size}
        published = MeterConfig(vision_config=vision, **sizes)
        model = cls(published if given.name is None else MeterConfig.from_pretrained(given.name, **sizes))
        load_meter_checkpoint(model, given.checkpoint)
        return model
    model = cls.from_pretrained(given.name, **sizes, ignore_mismatched_sizes=is_pair)
    if is_pair:
        _fill_types(model.meter.token_type_embeddings, MeterModel.from_pretrained(given.name).token_type_embeddings)
    if given.image_size is not None:
        model.resize_images(given.image_size)
    return model


def _fill_types(types, before):
    """The type of a second image begins as that of the first, as in ViLT and METER."""
    rows = [min(row, before.num_embeddings - 1) for row in range(types.num_embeddings)]
    with torch.no_grad():
        types.weight.copy_(before.weight[rows])


def _make_image(given, cls, num_labels, method, searching):
    for name in ("checkpoint", "image_size"):
        if getattr(given, name) is not None:
            raise ValueError(f"model.{name} must be null for the family image, got {getattr(given, name)}")
    return cls.from_pretrained(given.name, num_labels=num_labels, ignore_mismatched_sizes=True)


def _image_processor(given):
    return TextAndImage(None, AutoImageProcessor.from_pretrained(given.image_processor or given.name))


def _make_dvp(language_class, given, cls, num_labels, method, searching):
    options = {name: getattr(method, name) for name in ("insert_layer", "use_adapters", "dropout", "original")}
    if method.adapter_bottleneck is not None:
        options["adapter_bottleneck"] = method.adapter_bottleneck
    if given.name is None or given.vision_model is None:
        raise ValueError(
            f"model of a {cls.__name__} must have the keys name and vision_model, got {given.name} and "
            f"{given.vision_model}"
        )
    language_model, vision_model = (
        language_class.from_pretrained(given.name),
        CLIPVisionModel.from_pretrained(given.vision_model),
    )
    candidates = "all" if searching else None
    model = cls(language_model, vision_model, num_labels=num_labels, candidates=candidates, **options)
    if given.checkpoint is not None:
        load_dvp_checkpoint(model, given.checkpoint)
    return model


def _vilt_processor(given):
    processor = ViltProcessor.from_pretrained(given.name)
    if given.image_size is not None:
        processor.image_processor.size = {"shortest_edge": given.image_size}
    return processor


def _meter_processor(given):
    size = given.image_size or METER_IMAGE_SIZE
    square = {"height": size, "width": size}
    images = AutoImageProcessor.from_pretrained(
        given.image_processor or given.name, size=square, do_resize=True, do_center_crop=False
    )
    tokenizer = _tokenizer(given)
    tokenizer.model_input_names = ["input_ids", "attention_mask"]  # METER has no types of text
    return TextAndImage(tokenizer, images)


def _dvp_processor(given):
    return TextAndImage(
        _tokenizer(given), AutoImageProcessor.from_pretrained(given.image_processor or given.vision_model)
    )


def _tokenizer(given):
    tokenizer = AutoTokenizer.from_pretrained(given.tokenizer or given.name)
    if tokenizer.pad_token is None:  # LLaMA's
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _dvp(cls, language_class):
    tasks = dict.fromkeys(("vqa", "gqa", "snli_ve", "scienceqa"), cls)
    return Family(tasks, partial(_make_dvp, language_class), _dvp_processor, is_dvp=True)


FAMILIES = {
    "vilt": Family(
        {
            **dict.fromkeys(("vqa", "gqa", "snli_ve", "scienceqa"), ViltForQuestionAnswering),
            "nlvr2": ViltForImagesAndTextClassification,
            "retrieval": ViltForImageAndTextRetrieval,
        },
        _make_vilt,
        _vilt_processor,
    ),
    "meter": Family(
        {
            "vqa": MeterForQuestionAnswering,
            **dict.fromkeys(("gqa", "snli_ve", "scienceqa"), MeterForVisualEntailment),
            "nlvr2": MeterForImagesAndTextClassification,
            "retrieval": MeterForImageAndTextRetrieval,
        },
        _make_meter,
        _meter_processor,
    ),
    "image": Family({"image_classification": AutoModelForImageClassification}, _make_image, _image_processor),
    "dvp-bert": _dvp(DVPBert, BertModel),
    "dvp-t5": _dvp(DVPT5, T5Model),
    "dvp-llama": _dvp(DVPLlama, LlamaModel),
}
