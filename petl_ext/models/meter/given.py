"""Tells by which of two arguments a text or an image was given."""

from typing import NamedTuple

import torch


class Given(NamedTuple):
    """The name of an argument and what it holds."""

    name: str
    tensor: torch.Tensor


def the_one(model, **arguments):
    """The one of two arguments that is not None, as a `Given`.

    Raises:
        ValueError: both are, or neither is.
    """
    found = [Given(name, tensor) for name, tensor in arguments.items() if tensor is not None]
    if len(found) != 1:
        raise ValueError(
            f"{type(model).__name__}: give either {' or '.join(arguments)}, got {'both' if found else 'neither'}"
        )
    return found[0]


def check_batch(model, text, image):
    """Raises a ValueError unless the two `Given`s hold as many samples."""
    if text.tensor.size(0) != image.tensor.size(0):
        raise ValueError(
            f"{type(model).__name__}: {text.name} and {image.name} must hold the same number of samples, "
            f"got {list(text.tensor.shape)} and {list(image.tensor.shape)}"
        )
