"""Small models with APT as a method of PEFT, and what its tests compare."""

import torch
from peft import get_peft_model
from tiny_families import make_model, run

from petl_ext.peft import APTConfig

LAYERS = 2
SIZES = {"num_prompts": 5, "rank": 2}


def make(family="vilt", **changes):
    return get_peft_model(make_model(family, LAYERS), APTConfig(**SIZES, **changes))


def randomize(model, seed=3):
    """Makes the adapters differ from their initial values by much, as training does."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "petl_apt_" in name:
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator)


def outputs(model, inputs):
    with torch.no_grad():
        return run(model.eval(), inputs)


def state(model):
    """Names, classes and flags of all that injection may change, and the tensors themselves, to compare with ==."""
    return (
        {name: (type(module), module.training) for name, module in model.named_modules()},
        {name: (id(p), p.requires_grad) for name, p in model.named_parameters()},
        sorted(getattr(model, "peft_config", {})),
    )


def close(a, b):
    """The same but for the rounding of matrix products of tensors at other addresses."""
    return (a - b).abs().max() <= 1e-5 * b.abs().max()
