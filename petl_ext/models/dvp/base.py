"""What DVP's models have in common: their parts, what trains, the prompt, files."""

from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from torch import nn
from transformers.modeling_outputs import SequenceClassifierOutput

from petl_ext.composing import unchanged_on_error
from petl_ext.models.dvp.adapters import AdapterPlan, add_adapters, replace_adapters
from petl_ext.models.dvp.refusals import Refusals
from petl_ext.models.heads import checked_class_loss, checked_soft_target_loss, mlp_head
from petl_ext.nn import VisualPromptLayer
from petl_ext.saving import check_keys, check_sizes, fill, read_files, write_files

HEAD_STD = 0.02
# Folders saved by older versions lack these; their defaults hold there.
LATER_OPTIONS = ("adapter_bottleneck",)


class Visual(NamedTuple):
    """An image's tokens [B, N, Dv] and which of them take part, bool [B, N], or None for all."""

    features: torch.Tensor
    mask: torch.Tensor | None


class DVPModel(Refusals, nn.Module):
    """What DVPBert, DVPT5 and DVPLlama have in common.

    The model takes the language model over: it freezes what does not train, and with use_adapters puts adapters into
    it. It runs the vision encoder without gradients and always in eval mode. New layers are made on the device and in
    the dtype of the language model's embeddings.

    Args:
        language_model: a Hugging Face model of the class's type, with a head of its own or without.
        vision_model: frozen; a module that, given pixel_values, returns an output with last_hidden_state [B, N, Dv],
            class token included, such as CLIPVisionModel. None where `forward` is given visual_features.
        insert_layer: K. It can be changed at any time: `model.insert_layer = 3`.
        num_labels: L. The papers' tasks: 3129 for VQAv2, 1843 for GQA, 3 for SNLI-VE.
        num_heads: of the VisualPromptLayer; None is the authors' choice.
        visual_dim: Dv; None is the vision model's hidden_size.
        inner_dim: the VisualPromptLayer's; None is the authors' choice.
        dropout: on the VisualPromptLayer's attention weights, in training.
        candidates: None for one VisualPromptLayer, whatever K is, or "all" for one for each K, as the search for K
            trains them. DistributedDataParallel then needs find_unused_parameters.
        original: computes what the authors' code does where that seems to be a mistake; each class says what it is.
        use_adapters: DVP_adp, which freezes the language model but for its norms and trains adapters in it. Without,
            all of the language model that runs is trained.
        adapter_bottleneck: the width of these adapters; None is the authors' choice, D / 8 for BERT and T5, D / 64 for
            LLaMA.

    Attributes:
        options: the arguments but insert_layer, as they were understood.
        num_layers: how many layers the prompt can enter; insert_layer lies in [0, num_layers).
        visual_prompts: a ModuleList of one VisualPromptLayer or, with candidates, of one for each layer.
        type_embeddings: likewise of tables [2, D], added to text and prompt where they meet; empty for LLaMA.
        classifier: the head, or None.

    Raises:
        ValueError: a wrong argument. The language model has not changed.
    """

    language_model_type: ClassVar[str]
    parts: ClassVar[tuple]  # of the base model that run
    norms: ClassVar[tuple]  # (part, what else is in the names of the parameters that train beside adapters)
    adapters: ClassVar[AdapterPlan]
    num_token_types: ClassVar[int] = 2
    default_sizes: ClassVar[dict] = {"num_heads": 12, "inner_dim": None}

    def __init__(
        self,
        language_model: nn.Module,
        vision_model: nn.Module | None = None,
        *,
        insert_layer: int = 0,
        num_labels: int | None = None,
        num_heads: int | None = None,
        visual_dim: int | None = None,
        inner_dim: int | None = None,
        dropout: float = 0.1,
        candidates: str | None = None,
        original: bool = False,
        use_adapters: bool = False,
        adapter_bottleneck: int | None = None,
    ):
        super().__init__()
        self._check_language_model(language_model)
        self.language_model = language_model
        self.vision_model = vision_model
        self.options = {
            "num_labels": self._checked_labels(num_labels),
            "num_heads": self.default_sizes["num_heads"] if num_heads is None else num_heads,
            "visual_dim": self._checked_visual_dim(visual_dim),
            "inner_dim": self.default_sizes["inner_dim"] if inner_dim is None else inner_dim,
            "dropout": dropout,
            "candidates": candidates,
            "original": original,
            "use_adapters": use_adapters,
            "adapter_bottleneck": None,
        }
        self._check_switches()
        if adapter_bottleneck is None and use_adapters:
            adapter_bottleneck = self.adapters.default_bottleneck(self._dim)
        if adapter_bottleneck is not None:
            self.options["adapter_bottleneck"] = self._checked_bottleneck(adapter_bottleneck)
        self.insert_layer = insert_layer
        self._add_layers()
        if use_adapters:
            add_adapters(self._base, self.adapters, self._new_adapter)
        self._freeze()
        self.train(language_model.training)
        self.register_state_dict_post_hook(_leave_out_twins)
        self.register_load_state_dict_pre_hook(_fill_in_twins)

    @property
    def insert_layer(self) -> int:
        return self._insert_layer

    @insert_layer.setter
    def insert_layer(self, layer: int):
        if type(layer) is not int or not 0 <= layer < self.num_layers:
            raise self._wrong(f"insert_layer must be an integer in [0, {self.num_layers - 1}], got {layer!r}")
        self._insert_layer = layer

    @property
    def num_layers(self) -> int:
        return len(self._layers)

    def train(self, mode: bool = True) -> "DVPModel":
        super().train(mode)
        if self.vision_model is not None:
            self.vision_model.eval()
        return self

    def activation_checkpointing_enable(self, **options: Any) -> None:
        """Of the language model; transformers' Trainer asks for it here."""
        self.language_model.activation_checkpointing_enable(**options)

    def gradient_checkpointing_enable(self, **options: Any) -> None:
        """The same under the name that transformers gave it before 5.23."""
        self.language_model.gradient_checkpointing_enable(**options)

    def resize_adapters(self, bottleneck: int) -> None:
        """New adapters of another width in place of those that the model has. Make optimizers afterwards.

        Raises:
            ValueError: the model has no adapters, or bottleneck is no positive integer.
        """
        self.options["adapter_bottleneck"] = self._checked_bottleneck(bottleneck)
        replace_adapters(self._base, self._new_adapter)

    def save(self, folder: str | Path) -> None:
        """Writes what trains, parameters that require gradients, and how the model was made.

        The folder is complete or, after an error, as it was. With several processes, call it in one.
        """
        options = {**self.options, "insert_layer": self.insert_layer}
        write_files(folder, {"model": type(self).__name__, "options": options}, self._trained())

    @classmethod
    def load(cls, folder: str | Path, language_model: nn.Module, vision_model: nn.Module | None = None) -> "DVPModel":
        """A model as it was saved: made from the same language model and vision encoder, and filled.

        Raises:
            FileNotFoundError: the folder or one of its files is missing.
            ValueError: a file is broken or does not fit the class or the language model, which has not changed then.
        """
        options, tensors = read_files(folder, cls._parse)
        check_sizes(options, tensors, folder)
        with unchanged_on_error(language_model):
            model = cls(language_model, vision_model, **options)
            fill(model._trained(), tensors, folder)
        return model

    @property
    def _base(self):
        """The language model without its head."""
        return self.language_model.base_model

    @classmethod
    def _parse(cls, description):
        if "config" in description:
            raise ValueError("saved by Attachment.save, which petl_ext.load reads")
        check_keys(description, ["model", "options"])
        if description["model"] != cls.__name__:
            raise ValueError(f"saved from a {description['model']}, not a {cls.__name__}")
        check_keys(description["options"], cls.__init__.__kwdefaults__, LATER_OPTIONS)
        return description["options"]

    def _trained(self):
        return {name: parameter for name, parameter in self.named_parameters() if parameter.requires_grad}

    @property
    def _dim(self):
        return self.language_model.get_input_embeddings().weight.size(1)

    def _factory(self):
        """The device and dtype of new layers."""
        weight = self.language_model.get_input_embeddings().weight
        return {"device": weight.device, "dtype": weight.dtype}

    def _new_adapter(self):
        return self.adapters.new_layer(self._dim, self.options["adapter_bottleneck"], **self._factory())

    def _add_layers(self):
        dim, factory, options = self._dim, self._factory(), self.options
        count = self.num_layers if options["candidates"] else 1
        sizes = {name: options[name] for name in ("num_heads", "visual_dim", "inner_dim", "dropout")}
        self.visual_prompts = nn.ModuleList(VisualPromptLayer(dim, **sizes, **factory) for _ in range(count))
        # Normal(0, 1), as the authors start it, far beyond the states to which it is added.
        self.type_embeddings = nn.ModuleList(
            nn.Embedding(self.num_token_types, dim, **factory) for _ in range(count if self.num_token_types else 0)
        )
        self.classifier = None
        if options["num_labels"] is not None:
            self.classifier = mlp_head(dim, self._head_width(dim), options["num_labels"], **factory)
            for layer in (self.classifier[0], self.classifier[-1]):
                nn.init.normal_(layer.weight, std=HEAD_STD)
                nn.init.zeros_(layer.bias)

    def _freeze(self):
        """Makes trainable: the new layers and, of the language model, adapters and norms, or all that runs."""
        self.language_model.requires_grad_(False)
        if self.vision_model is not None:
            self.vision_model.requires_grad_(False)
        for part in self.parts:
            for name, parameter in getattr(self._base, part).named_parameters(prefix=part):
                parameter.requires_grad_(not self.options["use_adapters"] or self._trains_beside_adapters(name))

    def _trains_beside_adapters(self, name):
        return ".adapter." in name or any(name.startswith(part) and rest in name for part, rest in self.norms)

    def _visual(self, input_ids, pixel_values, visual_features, visual_mask):
        """The `Visual` of `forward`'s arguments."""
        if (pixel_values is None) == (visual_features is None):
            raise self._wrong("give either pixel_values or visual_features")
        if pixel_values is not None:
            visual_features = self._see(pixel_values)
        width = self.options["visual_dim"]
        if visual_features.dim() != 3 or visual_features.size(2) != width:
            raise self._wrong(f"visual_features must be [B, N, {width}], got {list(visual_features.shape)}")
        if visual_features.size(0) != input_ids.size(0):
            raise self._wrong(
                f"images and texts must be as many, got {len(visual_features)} and input_ids {list(input_ids.shape)}"
            )
        return Visual(visual_features, None if visual_mask is None else visual_mask != 0)

    def _see(self, pixel_values):
        if self.vision_model is None:
            raise self._wrong("pixel_values need a vision_model; without one, give visual_features")
        with torch.no_grad():
            return self.vision_model(pixel_values=pixel_values).last_hidden_state

    def _insert(self, states, query, visual):
        """states [B, T, D] and the query [B, D] to [B, 1 + T, D]."""
        index = self.insert_layer if self.options["candidates"] else 0
        layer = self.visual_prompts[index]
        dtype = _dtype_of(layer)
        prompt = layer(visual.features.to(dtype), query.to(dtype), visual.mask).to(states.dtype)
        if self.type_embeddings:
            types = torch.arange(self.num_token_types, device=states.device)
            of_text, of_prompt = self.type_embeddings[index](types).to(states.dtype)
            states, prompt = states + of_text, prompt + of_prompt
        return torch.cat([prompt[:, None], states], dim=1)

    def _classified(self, features, labels):
        """The output of the head, with the loss that fits the kind of labels."""
        logits = self.classifier(features.to(_dtype_of(self.classifier)))
        soft = labels is not None and labels.is_floating_point()
        return SequenceClassifierOutput(
            loss=(checked_soft_target_loss if soft else checked_class_loss)(self, logits, labels), logits=logits
        )

    @staticmethod
    def _head_width(dim):
        return 2 * dim


def with_prompt(attention_mask):
    """[B, T] to [B, 1 + T], the prompt visible."""
    if attention_mask is None:
        return None
    return torch.cat([attention_mask.new_ones(attention_mask.size(0), 1), attention_mask], dim=1)


def _dtype_of(module):
    """The dtype that a module computes in. Quantized weights are integers, or no parameters at all, and compute in
    float32."""
    dtypes = (parameter.dtype for parameter in module.parameters() if parameter.is_floating_point())
    return next(dtypes, torch.float32)


def _twins(model):
    """{name: the first name of the same tied parameter}."""
    names = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(parameter, []).append(name)
    return {twin: first for first, *twins in names.values() for twin in twins}


def _leave_out_twins(model, state, prefix, _):
    """Tied weights stand once in a state dict: safetensors, which transformers' Trainer writes, refuses them twice."""
    for twin in _twins(model):
        state.pop(prefix + twin, None)


def _fill_in_twins(model, state, prefix, *_):
    for twin, first in _twins(model).items():
        if prefix + first in state:
            state.setdefault(prefix + twin, state[prefix + first])
