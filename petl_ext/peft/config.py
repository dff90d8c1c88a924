"""PEFT's configurations of approximated prompt tuning and of bottleneck adapters."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from peft import PeftConfig, PeftType

from petl_ext.attaching.methods.adapter import KINDS, adapter_options
from petl_ext.nn import AdapterLayer, APTLayer

MODEL_CARD = """
## Loading

The method of this adapter, {described}, comes with `petl_ext`. Without the first line PEFT raises
`KeyError: '{peft_type}'`.

```python
import petl_ext.peft
from peft import PeftModel

model = PeftModel.from_pretrained(model, folder)
```
"""


@dataclass
class MethodConfig(PeftConfig):
    """What the configurations of all methods have in common.

    Attributes:
        method: the method's name in PEFT; its capitals are the `PeftType`.
        described: the method in words.
        row: the method's row in the families' records of sites.
    """

    method: ClassVar[str]
    described: ClassVar[str]
    row: ClassVar[str]

    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    modules_to_save: list[str] | None = None

    def __post_init__(self):
        super().__post_init__()
        self.peft_type = PeftType(self.method.upper())
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            setattr(self, name, set(value) if isinstance(value, list | tuple) else value)
        name = type(self).__name__
        if isinstance(self.target_modules, str) and self.layers_to_transform is not None:
            raise ValueError(f"{name}: layers_to_transform needs target_modules that are a list of names, or None")
        if self.layers_pattern is not None and self.layers_to_transform is None:
            raise ValueError(f"{name}: layers_pattern has no meaning without layers_to_transform")
        self.new_layer(1, device="meta")  # the layer knows which sizes are right

    def new_layer(self, dim, **factory):
        raise NotImplementedError

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> None:
        super().save_pretrained(save_directory, **kwargs)
        card = Path(save_directory) / "README.md"
        text = card.read_text(encoding="utf-8") if card.exists() else ""
        ours = MODEL_CARD.format(described=self.described, peft_type=self.method.upper())
        if ours.strip() not in text:
            card.write_text(text.rstrip("\n") + "\n" + ours, encoding="utf-8")


@dataclass
class APTConfig(MethodConfig):
    """Approximated prompt tuning (arXiv 2306.15706): an `APTLayer`, whose documentation explains the sizes and the
    initialization, for every attention that is a target.

    A target is the attention module that ends in its output projection (CLIP, T5, LLaMA, diffusers), or the output
    module `dense -> dropout -> (LayerNorm)` of an attention (ViLT, BERT, RoBERTa, METER).

    Args:
        num_prompts: P.
        rank: r of the map from prompts to keys.
        activation: "relu" or "softmax".
        dropout: on the scores, in training.
        target_modules: the ends of the targets' dotted names, or one regular expression for whole names. None stands
            for what `petl_ext.attach` takes in a model of this family.
        exclude_modules: the same, of modules that are no targets.
        layers_to_transform: the indices of the layers whose targets count; None stands for all.
        layers_pattern: the name before the index, where there are several lists of layers.
        modules_to_save: names of the model's own modules that train and are saved too, such as "classifier".

    Raises:
        ValueError: a size, the activation or the dropout is not one of an `APTLayer`, or layers are named without a
            list of targets.
    """

    method: ClassVar[str] = "petl_apt"
    described: ClassVar[str] = "approximated prompt tuning"
    row: ClassVar[str] = "apt"

    num_prompts: int = 200
    rank: int = 4
    activation: str = "relu"
    dropout: float = 0.0

    def new_layer(self, dim: int, **factory: Any) -> APTLayer:
        return APTLayer(dim, self.num_prompts, self.rank, self.activation, self.dropout, **factory)


@dataclass
class AdapterConfig(MethodConfig):
    """Bottleneck adapters: an `AdapterLayer`, whose documentation explains the sizes and the initialization, for every
    attention or MLP that is a target.

    A target is as for `APTConfig`, or an MLP of the same two forms. The defaults are those of `petl_ext.AdapterConfig`:
    "sequential" goes behind every attention and every MLP, before the residual, "parallel" beside every attention.

    Args:
        kind: "sequential" (arXiv 1902.00751) or "parallel" (arXiv 2110.04366). All adapters of one target are of one.
        bottleneck: B.
        activation: "relu", "gelu" or "silu".
        layer_norm, scale: None stands for the kind's own: no norm and 1.0, a norm and 4.0.
        dropout: on the hidden units, in training.
        trainable_scale: whether the scale is a parameter.
        zero_init: whether the adapter starts as its residual.
        target_modules, exclude_modules, layers_to_transform, layers_pattern, modules_to_save: as of `APTConfig`.

    Raises:
        ValueError: the kind, a size, the activation, the scale or the dropout is not one of an `AdapterLayer`, or
            layers are named without a list of targets.
    """

    method: ClassVar[str] = "petl_adapter"
    described: ClassVar[str] = "bottleneck adapters"

    kind: str = "sequential"
    bottleneck: int = 96
    activation: str = "relu"
    layer_norm: bool | None = None
    scale: float | None = None
    dropout: float = 0.0
    trainable_scale: bool = False
    zero_init: bool = False

    def __post_init__(self):
        if self.kind not in KINDS:
            raise ValueError(f'AdapterConfig: kind must be "sequential" or "parallel", got {self.kind!r}')
        super().__post_init__()

    @property
    def row(self) -> str:
        return f"{self.kind}_adapter"

    def new_layer(self, dim: int, **factory: Any) -> AdapterLayer:
        return AdapterLayer(dim, **adapter_options(self), **factory)
