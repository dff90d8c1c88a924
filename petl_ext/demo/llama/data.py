"""The text: the topics of Python's reference manual that its `help` shows, as every Python has them."""

from dataclasses import dataclass
from pydoc_data.topics import topics

import torch
from torch import Tensor

EVERY, VALIDATION, TEST = 5, 3, 4  # of every five topics, by name, one is for validation and one for the test


@dataclass(frozen=True)
class Manual:
    """The tokens of three parts of the manual, which share no topic, in blocks.

    Attributes:
        train, val, test: [blocks, length].
        prompt: the beginning of a topic of the test part.
    """

    train: Tensor
    val: Tensor
    test: Tensor
    prompt: str

    @classmethod
    def read(cls, tokenizer, length, held_out):
        """
        Args:
            length: of a block, in tokens.
            held_out: blocks of val and of test; train has all that there are.
        """
        names = sorted(topics)
        parts = {"train": [], "val": [], "test": []}
        for index, name in enumerate(names):
            part = {VALIDATION: "val", TEST: "test"}.get(index % EVERY, "train")
            parts[part].append(topics[name])
        blocks = {part: _blocks(tokenizer, texts, length) for part, texts in parts.items()}
        return cls(blocks["train"], _spread(blocks["val"], held_out), _spread(blocks["test"], held_out), _prompt(parts))


def _blocks(tokenizer, texts, length):
    tokens = tokenizer("\n".join(texts), return_tensors="pt", verbose=False)["input_ids"][0]
    return tokens[: len(tokens) // length * length].view(-1, length)


def _spread(blocks, count):
    """As many blocks, from all over the part."""
    return blocks[torch.linspace(0, len(blocks) - 1, min(count, len(blocks))).long()]


def _prompt(parts):
    """The headline of the first statement's topic among those of the test part."""
    statement = next(text for text in parts["test"] if text.split("\n", 1)[0].endswith("statement"))
    title, underline = statement.split("\n")[:2]
    return f"{title}\n{underline}\n\n"
