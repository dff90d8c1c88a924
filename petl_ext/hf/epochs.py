"""Training data whose items differ from epoch to epoch."""

from typing import Any

from torch.utils.data import DataLoader
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class EpochCallback(TrainerCallback):
    """Calls `set_epoch` of the training data at the start of each epoch.

    A Trainer does so itself only where one process trains and does not resume in the middle of an epoch: elsewhere
    accelerate tells the sampler alone, and a `RetrievalDataset` would draw the captions of epoch 0 again.
    """

    def on_epoch_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        train_dataloader: DataLoader | None = None,
        **_: Any,
    ) -> None:
        """Raises ValueError if workers live on, which would go on with the epoch they began with; AttributeError if
        the training data have no `set_epoch`."""
        if train_dataloader.persistent_workers:
            raise ValueError("dataloader_persistent_workers must be False, or no worker learns of the epoch, got True")
        train_dataloader.dataset.set_epoch(int(state.epoch))
