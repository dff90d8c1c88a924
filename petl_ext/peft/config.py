"""PEFT's configuration of approximated prompt tuning."""

from dataclasses import dataclass
from pathlib import Path

from peft import PeftConfig, PeftType

from petl_ext.nn import APTLayer

METHOD = "petl_apt"
PEFT_TYPE = METHOD.upper()
MODEL_CARD = """
## Loading

The method of this adapter, approximated prompt tuning, comes with `petl_ext`. Without the first line PEFT raises
`KeyError: 'PETL_APT'`.

```python
import petl_ext.peft
from peft import PeftModel

model = PeftModel.from_pretrained(model, folder)
```
"""


@dataclass
class APTConfig(PeftConfig):
    """Approximated prompt tuning (arXiv 2306.15706): an `APTLayer`, whose documentation explains the sizes and the
    initialization, for every attention that is a target.

    A target is the attention module that ends in its output projection (CLIP, T5, LLaMA, diffusers), or the output
    module `dense -> dropout -> (LayerNorm)` of an attention (ViLT, BERT, RoBERTa, METER).

    Args:
        num_prompts: P.
        rank: r of the map from prompts to keys.
        activation: "relu" or "softmax".
        dropout: on the scores, in training; above 0 the fused kernel does not run there.
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

    num_prompts: int = 200
    rank: int = 4
    activation: str = "relu"
    dropout: float = 0.0
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    modules_to_save: list[str] | None = None

    def __post_init__(self):
        super().__post_init__()
        self.peft_type = PeftType(PEFT_TYPE)
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            setattr(self, name, set(value) if isinstance(value, list | tuple) else value)
        if isinstance(self.target_modules, str) and self.layers_to_transform is not None:
            raise ValueError("APTConfig: layers_to_transform needs target_modules that are a list of names, or None")
        if self.layers_pattern is not None and self.layers_to_transform is None:
            raise ValueError("APTConfig: layers_pattern has no meaning without layers_to_transform")
        self.new_layer(1, device="meta")  # the layer knows which sizes are right

    def new_layer(self, dim, **factory):
        return APTLayer(dim, self.num_prompts, self.rank, self.activation, self.dropout, **factory)

    def save_pretrained(self, save_directory, **kwargs):
        super().save_pretrained(save_directory, **kwargs)
        card = Path(save_directory) / "README.md"
        text = card.read_text(encoding="utf-8") if card.exists() else ""
        if MODEL_CARD.strip() not in text:
            card.write_text(text.rstrip("\n") + "\n" + MODEL_CARD, encoding="utf-8")
