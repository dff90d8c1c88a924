"""The validation batches that a search compares on."""

import logging
import random

import torch
from accelerate.data_loader import skip_first_batches
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset

logger = logging.getLogger("petl_ext")


def validation_data(given, trainer, train_dataloader, options):
    """What the callback was given, else the evaluation data of its Trainer, else, with a warning, the training data.

    Args:
        trainer: that of `SearchCallback.add_to`, or None.
        options: what is compared, for the warning.

    Raises:
        ValueError: the Trainer has several evaluation sets.
        TypeError: the training data have no length or indices.
    """
    if given is not None:
        return given
    if trainer is not None and trainer.eval_dataset is not None:
        if isinstance(trainer.eval_dataset, dict):
            raise ValueError("SearchCallback: the Trainer has several evaluation sets; give validation_dataset=...")
        return trainer.get_eval_dataloader()
    logger.warning("SearchCallback: no validation_dataset, so %s are compared on training data", options)
    check_data("the training data, in place of validation_dataset,", train_dataloader.dataset)
    return train_dataloader.dataset


def loader_of(data, seed, args, train_dataloader):
    """A dataset shuffled, shared among the processes and batched as the training data are; a DataLoader as it is."""
    if isinstance(data, DataLoader):
        # Accelerate's loaders take part in the training loop's bookkeeping while they are iterated.
        return getattr(data, "base_dataloader", data)
    return DataLoader(
        data,
        batch_size=args.train_batch_size,
        sampler=DistributedSampler(data, args.world_size, args.process_index, seed=seed),
        collate_fn=train_dataloader.collate_fn,
        num_workers=args.dataloader_num_workers,
    )


def check_data(argument, data):
    """Raises TypeError unless it is a DataLoader, or a dataset with a length and indices."""
    if isinstance(data, DataLoader):
        return
    known = all(hasattr(data, name) for name in ("__len__", "__getitem__"))
    if not known or isinstance(data, dict | str | IterableDataset):
        raise TypeError(
            f"SearchCallback: {argument} must be a dataset with a length and indices, or a DataLoader, got "
            f"{type(data).__name__}"
        )


class EndlessBatches:
    """A loader's batches without end, in an order that depends on the seed and the position only.

    Args:
        position: a dict, kept up to date: passes over the loader that are complete and batches taken of the next.
    """

    def __init__(self, loader, seed, position):
        self.loader = loader
        self.seed = seed
        self.position = position
        self.iterator = None

    def next(self):
        batch = self._next_of_pass()
        if batch is None:
            self.position.update(passes=self.position["passes"] + 1, taken=0)
            self.iterator = None
            batch = self._next_of_pass()
        if batch is None:
            raise ValueError("SearchCallback: the validation data are empty")
        self.position["taken"] += 1
        return batch

    def _next_of_pass(self):
        # Loaders draw from the global generator, whose numbers are the training's.
        with torch.random.fork_rng([]):
            if self.iterator is None:
                self._begin_pass()
            else:
                self._reseed(self.position["taken"])
            return next(self.iterator, None)

    def _begin_pass(self):
        sampler, taken = self.loader.sampler, self.position["taken"]
        if hasattr(sampler, "set_epoch"):
            sampler.set_epoch(self.position["passes"])
        self._reseed()
        can_skip = self.loader.batch_sampler is not None and not isinstance(self.loader.dataset, IterableDataset)
        if not taken or not can_skip:
            self.iterator = iter(self.loader)
            self._take_again(taken)
            return
        rest = skip_first_batches(self.loader, taken)
        # The order is drawn when the first batch is asked for, and only then can that batch have its own seed.
        rest.batch_sampler.batch_sampler = self._reseeding(self.loader.batch_sampler)
        self.iterator = iter(rest)

    def _take_again(self, taken):
        """Data without batches of indices can only be read again, each batch from its own seed."""
        for index in range(taken):
            next(self.iterator, None)
            self._reseed(index + 1)

    def _reseeding(self, batch_sampler):
        for index, indices in enumerate(batch_sampler):
            if index:
                self._reseed(index)
            yield indices

    def _reseed(self, *taken):
        position = (self.position["passes"], *taken)
        torch.default_generator.manual_seed(random.Random(f"{self.seed}/{position}").getrandbits(62))
