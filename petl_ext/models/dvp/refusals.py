"""What the DVP models refuse, and how they say it."""

from typing import ClassVar

import torch

from petl_ext.checks import check_positive_integer, check_switch


class Refusals:
    """Comes before nn.Module in a DVP model. Every error is a ValueError that begins with the model's class."""

    language_model_type: ClassVar[str]
    parts: ClassVar[tuple]

    def _check_text(self, input_ids, attention_mask):
        if input_ids.dim() != 2 or input_ids.size(1) == 0:
            raise self._wrong(f"input_ids must be [B, T] with T above zero, got {list(input_ids.shape)}")
        if attention_mask is None:
            return
        if attention_mask.shape != input_ids.shape:
            raise self._wrong(
                f"attention_mask must have the shape of input_ids, {list(input_ids.shape)}, "
                f"got {list(attention_mask.shape)}"
            )
        self._check_rows(attention_mask != 0)

    def _check_rows(self, takes_part):
        self._refuse_samples(~takes_part.any(1), "attention_mask hides all tokens")

    def _refuse_samples(self, wrong, message):
        if not (wrong.is_meta or torch.compiler.is_compiling()) and wrong.any():
            raise self._wrong(f"{message} of sample {wrong.nonzero()[0].item()}")

    def _check_language_model(self, model):
        found = getattr(getattr(model, "config", None), "model_type", None)
        if found != self.language_model_type:
            raise self._wrong(
                f"language_model must be a Hugging Face model of the type {self.language_model_type!r}, "
                f"got {type(model).__name__}"
            )
        missing = [part for part in self.parts if not hasattr(model.base_model, part)]
        if missing:
            raise self._wrong(f"language_model must have {missing[0]!r}, which {type(model).__name__} lacks")

    def _checked_labels(self, num_labels):
        check_positive_integer(f"{type(self).__name__}: num_labels", num_labels)
        return num_labels

    def _checked_visual_dim(self, visual_dim):
        width = getattr(getattr(self.vision_model, "config", None), "hidden_size", None)
        if width is None and visual_dim is None:
            raise self._wrong("visual_dim is needed where no vision_model has a config.hidden_size")
        if width is not None and visual_dim not in (None, width):
            raise self._wrong(f"visual_dim must be the vision_model's hidden_size, {width}, got {visual_dim!r}")
        return width if visual_dim is None else visual_dim

    def _checked_bottleneck(self, bottleneck):
        check_positive_integer(f"{type(self).__name__}: adapter_bottleneck", bottleneck)
        if not self.options["use_adapters"]:
            raise self._wrong(f"adapter_bottleneck needs use_adapters=True, got {bottleneck!r} without")
        return bottleneck

    def _check_switches(self):
        if self.options["candidates"] not in (None, "all"):
            raise self._wrong(f'candidates must be None or "all", got {self.options["candidates"]!r}')
        for name in ("original", "use_adapters"):
            check_switch(f"{type(self).__name__}: {name}", self.options[name])

    def _wrong(self, message):
        return ValueError(f"{type(self).__name__}: {message}")
