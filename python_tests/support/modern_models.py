"""Tiny models of the families that people use, with random weights: one entry each, as data.

`TINY` names classes of transformers, diffusers or timm; `lacking` says what the installed versions do not have.
"""

import importlib.util
from importlib import metadata
from typing import NamedTuple

import torch
from modern_image_sizes import DIFFUSION, IMAGES, SEEING, TIMM
from modern_text_sizes import TEXT, WORDS


class Tiny(NamedTuple):
    """How to make one model.

    Attributes:
        library: the module that has the classes: "transformers", "diffusers" or "timm.models".
        config: the class of its configuration; None where the model takes the sizes itself.
        model: its class.
        sizes: keyword arguments of the configuration.
        inputs: {name: what `_tensor` makes of it}.
    """

    library: str
    config: str | None
    model: str
    sizes: dict
    inputs: dict


TINY = {
    name: Tiny(library, *entry)
    for library, table in (
        ("transformers", TEXT | IMAGES | SEEING),
        ("diffusers", {name: (None, *entry) for name, entry in DIFFUSION.items()}),
        ("timm.models", {name: (None, *entry) for name, entry in TIMM.items()}),
    )
    for name, entry in table.items()
}


# {name: versions of its package with which not even the bare model runs}
FAILING = {"llama4": ["5.24.0"]}


def lacking(name):
    """What the installed libraries do not have of a model, in words, or None."""
    tiny = TINY[name]
    package = tiny.library.partition(".")[0]
    if importlib.util.find_spec(package) is None:
        return f"{package} is not installed"
    library = importlib.import_module(tiny.library)
    version = metadata.version(package)
    if version in FAILING.get(name, ()):
        return f"{package} {version} cannot run its own {tiny.model}"
    missing = next((its for its in (tiny.config, tiny.model) if its and not hasattr(library, its)), None)
    return f"{package} {version} has no {missing}" if missing else None


def make(name, **changes):
    """The model in evaluation mode, no parameter requiring gradients; always with the same weights.

    Args:
        changes: of its sizes.
    """
    tiny = TINY[name]
    library = importlib.import_module(tiny.library)
    sizes = tiny.sizes | changes
    torch.manual_seed(0)
    if tiny.config is None:
        model = getattr(library, tiny.model)(**sizes)
    else:
        model = getattr(library, tiny.model)(getattr(library, tiny.config)(**sizes))
    for parameter in model.parameters():
        mean = parameter.flatten()[0].item() if parameter.dim() == 1 and parameter.numel() else 0.0
        torch.nn.init.normal_(parameter, mean=mean, std=0.2)
    return model.eval().requires_grad_(False)


def make_inputs(name):
    generator = torch.Generator().manual_seed(1)
    return {key: _tensor(value, generator) for key, value in TINY[name].inputs.items()}


def run(model, inputs):
    """What the model says: its logits, or the like where it has no head."""
    torch.manual_seed(2)  # ViLT draws which patches it takes
    output = model(**inputs)
    if isinstance(output, torch.Tensor):
        return output
    for name in ("logits", "logits_per_image", "sample", "last_hidden_state", "pooler_output"):
        if getattr(output, name, None) is not None:
            return getattr(output, name)
    return output[0]


def _tensor(value, generator):
    """A tuple is a shape of normal numbers; ("words", rows, tokens, image tokens) are words behind an image's places;
    all else is what the tensor holds."""
    if isinstance(value, tuple) and value[0] == "words":
        _, rows, tokens, image_tokens = value
        words = torch.randint(5, WORDS - 10, (rows, tokens), generator=generator)
        words[:, 1 : 1 + image_tokens] = WORDS - 4
        return words
    return torch.randn(value, generator=generator) if isinstance(value, tuple) else torch.tensor(value)
