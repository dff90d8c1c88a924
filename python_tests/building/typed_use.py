"""Uses every public name as a typed program would. mypy reads it in `make lint`; nothing runs it."""

from pathlib import Path
from typing import Any, assert_type

import torch
from torch import Tensor, nn
from transformers import ViltConfig, ViltForQuestionAnswering

import petl_ext
from petl_ext import counting


def layers(x: Tensor, device: torch.device) -> None:
    apt = petl_ext.APTLayer(32, num_prompts=5, rank=2, activation="softmax", dropout=0.1, device=device)
    apt.freeze(torch.bfloat16, overlap=True)
    assert_type(apt.keys(), Tensor)
    assert_type(apt.forward(x, x, apt.begin(x)), Tensor)
    assert_type(apt.is_frozen, bool)
    adapter = petl_ext.AdapterLayer(32, bottleneck=8, layer_norm=True, scale=4.0, dtype=torch.float16)
    assert_type(adapter.forward(x, residual=x), Tensor)
    pool = petl_ext.VisualPromptLayer(32, num_heads=4, visual_dim=64)
    assert_type(pool.forward(x, x, mask=None), Tensor)


def ops(x: Tensor, weights: Tensor, scale: Tensor) -> None:
    for apt in (petl_ext.ops.apt, petl_ext.ops.apt_reference):
        assert_type(apt(x, x, weights, weights, scale, activation="relu"), Tensor)
    for adapter in (petl_ext.ops.adapter, petl_ext.ops.adapter_reference):
        assert_type(adapter(x, weights, scale, weights, scale, scale=0.5, residual=x), Tensor)
    for pool in (petl_ext.ops.attention_pool, petl_ext.ops.attention_pool_reference):
        assert_type(pool(x, x, mask=None, scale=0.125), Tensor)
    with petl_ext.ops.backend("reference"):
        assert_type(petl_ext.ops.backend(), str)
    assert_type(petl_ext.ops.cpu_path(), str)


def attached(model: nn.Module, inputs: dict[str, Tensor], folder: Path) -> petl_ext.Attachment:
    configs = (
        petl_ext.APTConfig(num_prompts=50, sites="vision"),
        petl_ext.AdapterConfig(kind="parallel", bottleneck=8, sites=[r"layer\.[0-5]\.attention"]),
        petl_ext.ClassTokenConfig(),
        petl_ext.ClassifierOnlyConfig(),
        petl_ext.DeepPromptConfig(num_prompts=3),
        petl_ext.FullTuningConfig(),
        petl_ext.DASConfig(bottleneck=8, skip=[1], permanent=False),
    )
    attachment = petl_ext.attach(model, configs[0], keep=["classifier"])
    assert_type(attachment, petl_ext.Attachment)
    print(attachment.report(inputs=inputs))
    torch.optim.AdamW(attachment.parameter_groups(apt=1e-3), weight_decay=0.0)
    attachment.save(folder)
    with attachment.disable():
        model(**inputs)
    attachment.freeze()
    attachment.thaw()
    attachment.detach()
    if isinstance(attachment, petl_ext.SkippingAttachment):
        attachment.skip([2])
    return petl_ext.load(model, folder)


def searched(model: nn.Module, data: torch.utils.data.Dataset[dict[str, Tensor]], path: Path) -> None:
    search = petl_ext.DepthSearch(model, num_skip=2, seed=0)
    assert_type(search.apply(permanent=True), tuple[int, ...])
    assert_type(petl_ext.DepthSearch.load(path, model), petl_ext.DepthSearch)
    prompt_search = petl_ext.PlacementSearch(model, seed=0)
    prompt_search.plot(path)
    petl_ext.hf.SearchCallback(search, validation_dataset=data)
    petl_ext.hf.EpochCallback()


def patched(model: nn.Module, cls: type[nn.Module]) -> None:
    print(petl_ext.patch(model), petl_ext.patch_class(cls))
    petl_ext.unpatch(model)
    petl_ext.unpatch_class(cls)


def checkpoints(vilt: ViltForQuestionAnswering, bert: nn.Module, file: Path) -> tuple[petl_ext.models.KeyOutcome, ...]:
    print(petl_ext.models.load_vilt_checkpoint(vilt, file, ignore=["head"]))
    return petl_ext.models.load_dvp_checkpoint(bert, file).keys


def models(bert: nn.Module, clip: nn.Module, vision: nn.Module, tokenizer: Any, file: Path) -> None:
    config = petl_ext.models.MeterConfig(hidden_size=64)
    for meter in (
        petl_ext.models.MeterModel(config),
        petl_ext.models.MeterForQuestionAnswering(config),
        petl_ext.models.MeterForVisualEntailment(config),
        petl_ext.models.MeterForImagesAndTextClassification(config),
        petl_ext.models.MeterForImageAndTextRetrieval(config),
    ):
        assert_type(petl_ext.models.load_meter_checkpoint(meter, file), petl_ext.models.CheckpointReport)
        trained: petl_ext.models.MeterPreTrainedModel = meter
        trained.train()
    petl_ext.models.MeterFusionLayer(config)
    petl_ext.models.ViltForImageAndTextRetrieval(ViltConfig())
    petl_ext.models.CLIPClassifier(clip, tokenizer, {"cat": "a photo of a cat"}).freeze()
    petl_ext.models.resize_position_embeddings(torch.zeros(50, 8), grid=3)
    dvps: list[petl_ext.models.DVPModel] = [
        petl_ext.models.DVPBert(bert, vision, insert_layer=3),
        petl_ext.models.DVPT5(bert, vision),
        petl_ext.models.DVPLlama(bert, vision),
    ]
    print(dvps)


def meter_output(output: petl_ext.models.MeterModelOutput) -> Tensor | None:
    return output.pooler_output


def as_peft_methods(model: nn.Module, folder: Path) -> None:
    petl_ext.peft.APTConfig(num_prompts=50, modules_to_save=["classifier"])
    petl_ext.peft.AdapterConfig(target_modules=["attention"])
    petl_ext.peft.save_adapter(model, folder)
    petl_ext.peft.load_adapter(model, folder, adapter_name="second", is_trainable=True)


def peft_parts(
    models: list[petl_ext.peft.APTModel | petl_ext.peft.AdapterModel],
    layers: list[petl_ext.peft.APTTunerLayer | petl_ext.peft.AdapterTunerLayer],
) -> list[list[str]]:
    print(models)
    return [layer.petl_running() for layer in layers]


def counted(model: nn.Module, inputs: dict[str, Tensor]) -> None:
    assert_type(counting.count_macs(model, inputs), counting.MacCount)
    assert_type(counting.count_parameters(model), tuple[int, int])
