"""Questions for a tiny ViLT, and how transformers' Trainer trains it in a few steps."""

import torch
from tiny_vilt import LABELS, make_inputs
from torch.utils.data import Dataset
from transformers import TrainingArguments


class Questions(Dataset):
    def __init__(self, model, size=8, seed=1):
        inputs = make_inputs(model, seed, batch=size)
        self.columns = inputs | {"labels": torch.eye(LABELS)[torch.arange(size) % LABELS]}

    def __len__(self):
        return len(self.columns["labels"])

    def __getitem__(self, index):
        return {name: column[index] for name, column in self.columns.items()}


def make_arguments(folder, **changes):
    defaults = {
        "max_steps": 12,
        "save_strategy": "no",
        "per_device_train_batch_size": 2,
        "learning_rate": 0.01,
        "use_cpu": True,
        "report_to": [],
        "disable_tqdm": True,
        "logging_strategy": "no",
    }
    return TrainingArguments(str(folder), **defaults | changes)
