"""CLIP as an image classifier."""

import copy
from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_outputs import ImageClassifierOutput

from petl_ext.nn.frozen import Frozen
from petl_ext.printing import listed
from petl_ext.tasks.labels import label_loss

_PLAIN = (bool, int, float, str, type(None))
_CONTAINERS = (list, tuple, set)
_OF_EVERY_MODULE = vars(nn.Module()).keys()


class CLIPClassifier(nn.Module):
    """CLIP with the features of class prompts as its classifier: zero-shot as it is, few-shot after `attach` to `clip`.

    Logits are CLIP's own: exp(logit_scale) times the cosines of an image's features and each prompt's. Each forward
    computes the prompts' features; where the text encoder does not change, `freeze` has them computed once.

    Attach to `clip` rather than to the classifier: what `Attachment.save` writes then fits any CLIPModel.

    Args:
        clip: a `transformers.CLIPModel`.
        tokenizer: CLIP's.
        prompts: {class: text}, as `class_prompts` makes them.

    Attributes:
        classes: those that are told apart now, at first all of `prompts`; a class's label is its index.

    Raises TypeError for several prompts of a class, ValueError for fewer than two classes, or a prompt that is longer
    than the text encoder's positions.
    """

    def __init__(self, clip: nn.Module, tokenizer: Any, prompts: Mapping[str, str]):
        super().__init__()
        self.clip = clip
        wrong = next((prompt for prompt in prompts.values() if not isinstance(prompt, str)), None)
        if wrong is not None:  # the tokenizer would join two into one
            raise TypeError(f"prompts must be one text per class, got {wrong!r}")
        self._row = {name: row for row, name in enumerate(prompts)}
        tokens = tokenizer(list(prompts.values()), padding=True, return_tensors="pt")
        longest = clip.config.text_config.max_position_embeddings
        lengths = tokens["attention_mask"].sum(dim=1).tolist()
        for prompt, length in zip(prompts.values(), lengths, strict=True):
            if length > longest:
                raise ValueError(f"prompts must have at most {longest} tokens, got {length} in {prompt!r}")
        for name in ("input_ids", "attention_mask"):
            self.register_buffer(name, tokens[name].to(clip.logit_scale.device), persistent=False)
        self._frozen = self._frozen_settings = None
        self.set_classes(prompts)

    def set_classes(self, classes: Iterable[str]) -> None:
        """Tells these classes apart from now on; no weight changes, and labels are indices into `classes`.

        Raises ValueError for fewer than two classes, one that comes twice, or one that has no prompt.
        """
        classes = tuple(classes)
        unknown = [name for name in classes if name not in self._row]
        if unknown:
            raise ValueError(f"classes must be some of {listed(self._row)}, which have prompts, got {unknown}")
        if len(classes) < 2 or len(set(classes)) < len(classes):
            raise ValueError(f"classes must be at least two different ones, got {classes}")
        self.classes = classes
        self.thaw()

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> ImageClassifierOutput:
        """`logits` [batch, classes] of `pixel_values` [batch, 3, height, width]; with `labels` [batch] also `loss`.

        The loss is the cross-entropy.
        """
        images = F.normalize(self.clip.get_image_features(pixel_values).pooler_output, dim=-1)
        logits = self.clip.logit_scale.exp() * images @ self.text_features().T
        return ImageClassifierOutput(loss=None if labels is None else label_loss(logits, labels), logits=logits)

    def text_features(self) -> Tensor:
        """The prompts' features, each of length 1: [classes, projection]."""
        return self._frozen.read("CLIPClassifier: frozen features") if self.is_frozen else self._compute_text_features()

    def freeze(self) -> None:
        """Computes the prompts' features once, for serving, or for training while the text encoder does not change.

        Undone by `thaw`, `set_classes`, loading, a move or a cast, and every change of the text encoder that can be
        seen: layers put in, taken out, disabled or set, autocast, and changes of parameters that torch counts. It does
        not count those through `parameter.data`, by collectives or by a fused optimizer.

        Raises:
            RuntimeError: dropout makes the features vary, in training mode.
        """
        if self._text_varies():
            raise RuntimeError("CLIPClassifier: freeze needs features that dropout does not vary; call eval()")
        self._frozen_settings = self._text_settings()
        self._frozen = Frozen(self._text_weights(), self._compute_text_features)

    def thaw(self) -> None:
        """Undoes `freeze`."""
        self._frozen = None

    @property
    def is_frozen(self) -> bool:
        if self._frozen is None or self._text_varies() or not self._frozen.holds_for(self._text_weights()):
            return False
        return torch.compiler.is_compiling() or self._frozen_settings == self._text_settings()

    def _compute_text_features(self) -> Tensor:
        rows = [self._row[name] for name in self.classes]
        output = self.clip.get_text_features(self.input_ids[rows], self.attention_mask[rows])
        return F.normalize(output.pooler_output, dim=-1)

    def _text_parts(self) -> tuple[nn.Module, nn.Module]:
        return self.clip.text_model, self.clip.text_projection

    def _text_varies(self) -> bool:
        if self.clip.text_model.training and self.clip.config.text_config.attention_dropout > 0:
            return True
        modules = (module for part in self._text_parts() for module in part.modules())
        return any(isinstance(module, nn.Dropout) and module.training and module.p > 0 for module in modules)

    def _text_weights(self) -> list[nn.Parameter]:
        return [weight for part in self._text_parts() for weight in part.parameters()]

    def _text_settings(self) -> tuple:
        """What the prompts' features depend on besides weights: the prompts, and the settings of the modules."""
        device = self.input_ids.device.type
        dtype = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device)
        return self.classes, dtype, [(type(m), _settings(m)) for part in self._text_parts() for m in part.modules()]

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.thaw()
        super()._load_from_state_dict(*args, **kwargs)

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_frozen": None}


def _settings(module: nn.Module) -> dict[str, Any]:
    """Attributes that are plain values or hold only such: with these PEFT switches its layers off and scales them."""
    settings = {}
    for name in vars(module).keys() - _OF_EVERY_MODULE:
        value = vars(module)[name]
        held = value.values() if isinstance(value, dict) else value if isinstance(value, _CONTAINERS) else [value]
        if all(isinstance(item, _PLAIN) for item in held):
            settings[name] = copy.copy(value)
    return settings
