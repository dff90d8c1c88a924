"""DVP under the names of its authors' code base, on BERT, T5 and LLaMA."""

import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from petl_ext.composing import unchanged_on_error
from petl_ext.models.checkpoints import origins
from petl_ext.models.checkpoints.backbones import SEQUENTIAL_ADAPTER
from petl_ext.models.checkpoints.clip import CLIP_PROJ, visual_rules
from petl_ext.models.checkpoints.plan import Layout, attached_configs, fill, opened, tensors_of
from petl_ext.models.checkpoints.report import CheckpointReport
from petl_ext.models.checkpoints.rules import rule
from petl_ext.models.dvp import DVPModel

PROMPT_LAYER = {"linear_q": "query", "linear_k": "key", "linear_v": "value", "linear_merge": "output"}
CLASSIFIERS = ("vqa_classifier", "gqa_classifier", "snli_ve_classifier")
NEEDS_ADAPTERS = "adapters that the model does not have: make it with use_adapters=True"


class Adapters(NamedTuple):
    """A list of adapters in the file, which counts them through all layers of one stack.

    Attributes:
        key: of the list.
        stack: where the language model keeps the layers.
        sites: of one layer, the modules that its adapters stand behind, in their order.
    """

    key: str
    stack: str
    sites: tuple


class LanguageModel(NamedTuple):
    """How the files of one language model name it.

    Attributes:
        key: its own.
        copies: {another key of a part: the part}.
        adapters: the `Adapters`.
        unused: the part that DVP does not run, which language models with a head of their own lack; or "".
    """

    key: str
    copies: dict
    adapters: tuple
    unused: str = ""


LANGUAGE_MODELS = {
    "bert": LanguageModel(
        "bert_model",
        {"bert_embeddings": "embeddings", "bert_encoder": "encoder"},
        (Adapters("adapter_modules", "encoder.layer", ("attention.output.dropout", "output.dropout")),),
        unused="pooler",
    ),
    "t5": LanguageModel(
        "t5_model",
        {"t5_encoder": "encoder", "t5_decoder": "decoder"},
        (
            Adapters("encoder_adapter", "encoder.block", ("layer.0.SelfAttention", "layer.1.DenseReluDense")),
            Adapters(
                "decoder_adapter",
                "decoder.block",
                ("layer.0.SelfAttention", "layer.1.EncDecAttention", "layer.2.DenseReluDense"),
            ),
        ),
    ),
    "llama": LanguageModel(
        "llama_model",
        {"embed_tokens": "embed_tokens", "layers": "layers", "norm": "norm"},
        (Adapters("adapter_modules", "layers", ("self_attn", "mlp")),),
    ),
}
ALPHAS = "layer_alphas"
LEFT_OUT = {
    "{rest}.position_ids": "a buffer that the model makes itself",
    "{rest}.rotary_emb.inv_freq": "a buffer that the model makes itself",
    ALPHAS: "the preferences of the search, of which the largest says where the prompt enters: insert_layer",
    "visumodel.proj": CLIP_PROJ,
}
ONE_PROMPT = "the prompt layer of a model without a search: make the model with candidates=None"
PROMPTS_OF_SEARCH = 'the prompt layers of a search: make the model with candidates="all"'


def load_dvp_checkpoint(
    model: nn.Module, checkpoint: str | Path | Mapping[str, Any], ignore: Iterable[str] = ()
) -> CheckpointReport:
    """Fills a DVPBert, DVPT5 or DVPLlama with a checkpoint of the authors' DVP code base.

    Such a file holds all weights: language model, CLIP's vision transformer, prompt layer, type embeddings, head and,
    of DVP_adp, adapters. So language and vision model may be made from their configurations alone, the vision model as
    transformers' CLIPVisionModel; without a vision_model CLIP's weights are left out. Most tensors of the language
    model are there twice; the copies must be equal.

    Make the model as the file's was: use_adapters=True for DVP_adp, candidates="all" for a file of a search. The head
    is the file's `vqa_classifier`, `gqa_classifier` or `snli_ve_classifier`; a file without one leaves the model's as
    it is. Adapters of another width than the model's give it new ones: make optimizers afterwards. insert_layer becomes
    the one that the search of the file prefers, as the original evaluates it; a file without a search leaves it.
    What the file does not say stays as it was: num_heads and `original`, with which the model computes what the weights
    were trained for.

    Args:
        model: a DVPBert, DVPT5 or DVPLlama.
        checkpoint, ignore: those of `load_vilt_checkpoint`; with "layer_alphas" in ignore, insert_layer stays.

    Returns:
        A `CheckpointReport`.

    Raises:
        TypeError: the model is no DVP, or as `load_vilt_checkpoint`.
        FileNotFoundError: there is no such file.
        ValueError: as `load_vilt_checkpoint`, and where copies of one tensor differ, or the search's preferences are
            not one finite number for each layer. The model has not changed.
    """
    tensors_of(model, "DVP")
    if not isinstance(model, DVPModel):
        raise TypeError(f"model must be a DVPBert, DVPT5 or DVPLlama, got {type(model).__name__}")
    checkpoint = opened(checkpoint, ignore, origins.DVP[model.language_model_type])
    before = _settings_of(model)
    with unchanged_on_error(model):
        _fit_adapters(model, checkpoint)
        _set_insert_layer(model, checkpoint)
        report = fill(model, checkpoint, _layout(model))
    after = _settings_of(model)
    changed = {name: f"{after[name]}, was {before[name]}" for name in after if after[name] != before[name]}
    return dataclasses.replace(report, settings=changed)


def _settings_of(model):
    return {"insert_layer": model.insert_layer, "adapter_bottleneck": model.options["adapter_bottleneck"]}


def _fit_adapters(model, checkpoint):
    """Gives the model adapters as wide as the file's, where both have any."""
    for adapters in LANGUAGE_MODELS[model.language_model_type].adapters:
        down = checkpoint.wanted(f"{adapters.key}.0.down_sampler.weight")
        if down is None or down.dim() != 2 or not model.options["use_adapters"]:
            continue
        if len(down) not in (0, model.options["adapter_bottleneck"]):
            model.resize_adapters(len(down))


def _set_insert_layer(model, checkpoint):
    """Lets the prompt enter at the layer that the search of the file prefers."""
    alphas = checkpoint.wanted(ALPHAS)
    if alphas is None:
        return
    if list(alphas.shape) != [model.num_layers] or not alphas.isfinite().all():
        raise ValueError(
            f"{checkpoint.name}: {ALPHAS} must be a finite number for each of the {model.num_layers} layers of "
            f"{type(model).__name__}, got {list(alphas.shape)}; name it in ignore to do without"
        )
    model.insert_layer = alphas.argmax().item()


def _layout(model):
    names = LANGUAGE_MODELS[model.language_model_type]
    base = next(name for name, module in model.named_modules() if module is model.language_model.base_model)
    searched = model.options["candidates"] is not None
    parts = [f"{base}.{part}." for part in (*model.parts, names.unused) if part]
    return Layout(
        model_tensors=tensors_of(model, "DVP"),
        rules=(
            *_adapter_rules(model, names, base),
            *_language_rules(names, base),
            *_prompt_rules(searched),
            *_vision_rules(model),
        ),
        needed=(*parts, "vision_model.", "visual_prompts.", "type_embeddings."),
        heads={} if model.classifier is None else {root: _head_rules(root) for root in CLASSIFIERS},
        left_out=LEFT_OUT,
        refused=_refused_prompts(searched),
        attached=attached_configs(model),
    )


def _language_rules(names, base):
    if names.unused:
        yield rule(
            f"{names.key}.{names.unused}.{{rest}}",
            f"{base}.{names.unused}.{{rest}}",
            absent=f"DVP does not use this {names.unused}",
        )
    yield rule(f"{names.key}.{{rest}}", f"{base}.{{rest}}")
    for key, part in names.copies.items():
        yield rule(f"{key}.{{rest}}", f"{base}.{part}.{{rest}}", twin=f"{names.key}.{part}.{{rest}}")


def _adapter_rules(model, names, base):
    for adapters in names.adapters:
        layers = model.get_submodule(f"{base}.{adapters.stack}")
        sites = [f"{base}.{adapters.stack}.{i}.{site}" for i in range(len(layers)) for site in adapters.sites]
        for index, site in enumerate(sites):
            for theirs, ours in SEQUENTIAL_ADAPTER.parts.items():
                yield rule(f"{adapters.key}.{index}.{theirs}", f"{site}.adapter.{ours}", needs=NEEDS_ADAPTERS)


def _prompt_rules(searched):
    options, index = ("_options.{i}", "{i}") if searched else ("", "0")
    for theirs, ours in PROMPT_LAYER.items():
        yield rule(f"cross_attn{options}.{theirs}.{{t}}", f"visual_prompts.{index}.{ours}.{{t}}")
    yield rule(f"token_type_embeddings{options}.weight", f"type_embeddings.{index}.weight")


def _refused_prompts(searched):
    """{key: why it is refused}."""
    options, reason = ("", ONE_PROMPT) if searched else ("_options", PROMPTS_OF_SEARCH)
    return {f"{name}{options}.{{rest}}": reason for name in ("cross_attn", "token_type_embeddings")}


def _vision_rules(model):
    rules = visual_rules("visumodel", "vision_model")
    if model.vision_model is None:
        return [each._replace(absent="this model has no vision_model") for each in rules]
    return rules


def _head_rules(root):
    return (rule(f"{root}.{{i}}.{{t}}", "classifier.{i}.{t}"),)
