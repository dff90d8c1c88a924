"""How the ViLT's demo trains: by each method the same backbone, head and data."""

from dataclasses import dataclass

import torch
from transformers import ViltConfig, ViltForQuestionAnswering, ViltProcessor, set_seed

from petl_ext import attach
from petl_ext.demo.data import Task, read_vqa
from petl_ext.demo.digits import BACKBONE
from petl_ext.demo.training import Run, Size, groups_by_rate
from petl_ext.tasks.vqa import VQACollator

# What every method trains besides its own parameters, as the paper's baselines do.
HEAD = ("classifier", "pooler", "token_type_embeddings")
# An eighth of the model's width, as in the papers.
BOTTLENECK = 16


@dataclass(frozen=True)
class Method:
    """A row of the table. The learning rates are those that did best on the validation split (petl-ext demo --tune).

    Attributes:
        num_skip: how many layers a search chooses first, for `config` to skip.
    """

    name: str
    config: object
    learning_rate: float
    head_learning_rate: float
    pretrained: bool = True
    num_skip: int = 0


@dataclass(frozen=True)
class ViltRun(Run):
    """What all trainings of one command have in common, with the task that they learn."""

    task: Task

    full = Size(
        steps=600,
        search_steps=120,
        batch=32,
        search_batch=32,
        questions_per_scene=2,
        scenes={"train": 5000, "val": 500, "test": 1000},
    )
    quick = Size(
        steps=100,
        search_steps=40,
        batch=32,
        search_batch=32,
        questions_per_scene=2,
        scenes={"train": 1500, "val": 100, "test": 300},
    )
    data_name, formats = "digits", ("vqa",)

    @staticmethod
    def read(folder):
        """The task in `folder`."""
        processor = ViltProcessor.from_pretrained(BACKBONE)
        return read_vqa(folder, processor, VQACollator(processor), cache_images=True)

    def attach(self, method):
        """A new model with the method's layers and head: the attachment."""
        set_seed(self.seed)
        return attach(make_model(method, len(self.task.vocabulary)), method.config, keep=HEAD)

    def trainer(self, attachment, method, **arguments):
        """The Trainer of an attachment of `attach`."""
        return self.quiet_trainer(attachment.model, self.task, groups_of(attachment, method), **arguments)


def make_model(method, num_labels):
    """The backbone of a method, with a head for so many answers."""
    if method.pretrained:
        return ViltForQuestionAnswering.from_pretrained(BACKBONE, num_labels=num_labels)
    return ViltForQuestionAnswering(ViltConfig.from_pretrained(BACKBONE, num_labels=num_labels))


def any_inputs(config):
    """What a ViLT of this configuration takes, with the longest text and the largest image, as zeros."""
    text = torch.zeros(1, config.max_position_embeddings, dtype=torch.long)
    image = torch.zeros(1, config.num_channels, config.image_size, config.image_size)
    return {"input_ids": text, "attention_mask": torch.ones_like(text), "pixel_values": image}


def groups_of(attachment, method):
    """The classifier is new and learns fastest; the rest of the head is pre-trained and takes half its rate."""
    rates = {"classifier": method.head_learning_rate, None: method.learning_rate}

    def rate_of(name):
        part = next((part for part in HEAD if f".{part}." in f".{name}."), None)
        return rates.get(part, method.head_learning_rate / 2)

    return groups_by_rate(attachment.named_parameters(), rate_of)
