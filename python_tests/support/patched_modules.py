"""Modules to patch, their inputs, and ways to call them."""

import torch
from original_modules import approximate_prompt
from torch import nn

DIM = 64


def rows(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def stream(seed=0):
    return rows(2, 24, DIM, seed=seed)


def one_query(mask=None, dim=DIM):
    def call(module, dtype):
        visual = rows(8, 25, dim, seed=1).to(dtype)
        return module(visual, visual, rows(8, 1, DIM, seed=2).to(dtype), mask)

    return call


def hidden_tokens():
    """Some of one sample's, all of another's."""
    hidden = torch.zeros(8, 1, 1, 25, dtype=torch.bool)
    hidden[1, ..., 10:], hidden[2] = True, True
    return hidden


def streams(*others, count=1):
    return lambda module, dtype: module(*(stream(i).to(dtype) for i in range(count)), *others)


def prompts(dropout=0.0):
    return approximate_prompt(4, DIM, 4, 20, dropout)


def made(make, seed=0):
    """In a model, and with parameters none of which is zero or one."""
    torch.manual_seed(seed)
    model = nn.Sequential(make())
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model


def changed(module, **attributes):
    for name, value in attributes.items():
        setattr(module, name, value)
    return module
