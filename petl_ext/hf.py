"""petl_ext inside transformers.Trainer."""

import logging
import random

import torch
from accelerate.data_loader import skip_first_batches
from accelerate.utils import send_to_device
from torch.utils.data import DataLoader, DistributedSampler
from tqdm.auto import tqdm
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from petl_ext.tasks.labels import label_accuracy
from petl_ext.tasks.vqa import vqa_score

logger = logging.getLogger("petl_ext")


class SearchCallback(TrainerCallback, ExportableState):
    """Runs a search while a transformers.Trainer trains, and leaves its selection in the model at the end.

        callback = petl_ext.hf.SearchCallback(petl_ext.DepthSearch(model, num_skip=4))
        trainer = Trainer(model, args, train_dataset=train, eval_dataset=val)
        callback.add_to(trainer)
        trainer.train()

    Every micro-batch has its own draw, as in DAS and KAB-APP. Validation batches advance from update to update and
    begin again when they are used up. Between optimiser steps, so in evaluations and checkpoints, the model has the
    present selection. A run that resumes from a checkpoint resumes its search too, from trainer_state.json, whether or
    not `restore_callback_states_from_checkpoint` is set.

    `Trainer(callbacks=[callback])` works as well, but such a callback comes after those of `report_to`, so that its
    values reach the log history and the progress bar but no tracker, and it sees nothing of the Trainer: neither its
    evaluation data nor a loss of its own.

    Args:
        search: a `DepthSearch` or a `PlacementSearch` on the Trainer's model.
        validation_dataset: what layers are compared on. A dataset is shuffled, shared among the processes and batched
            as the training data are; a DataLoader is used as it is, on each process its own. None: the evaluation
            data of the Trainer that `add_to` was given, or where there are none, with a warning, the training data.
        compute_loss: for a DepthSearch, (model, batch on the model's device) -> loss. None: as the Trainer of `add_to`
            does, otherwise the model's own loss; under the Trainer's mixed precision in both cases.
        warmup_epochs: epochs before the first update. None: the search's warmup_steps or, where it has none, 1 for a
            DepthSearch and 0 for a PlacementSearch, as their authors do.
        search_epochs: epochs after which the selection is fixed. None: the search's search_steps or, where it has none,
            the end of training.
        patience: also fix the selection when this many updates have left it as it was.
        stop_training: whether training stops when the selection is fixed.
        log: whether reward, loss or score, entropy (1 at the start, 0 when nothing is open; for a DepthSearch bits per
            layer) and preferences of the latest update go to the Trainer's logs, and progress to a bar unless
            disable_tqdm is set.
        compute_score: for a PlacementSearch, (model, batch on the model's device) -> score, larger for better. None:
            what the authors score, in percent. With class labels, integers [B], the accuracy; with soft ones, [B, L],
            the mean label of the class with the largest logit; otherwise 100 * exp(-loss), as for ScienceQA. Computed
            as the loss is, so under the Trainer's mixed precision; the authors score without it.

    Raises:
        ValueError: warm-up or end are given here and in the search, patience is below 1, or compute_loss or
            compute_score is given for a search that does not take it.
    """

    def __new__(cls, *arguments, restored=False, **named):
        return _Stored() if restored else super().__new__(cls)

    def __init__(
        self,
        search,
        validation_dataset=None,
        compute_loss=None,
        warmup_epochs=None,
        search_epochs=None,
        patience=None,
        stop_training=False,
        log=True,
        compute_score=None,
    ):
        for name, epochs, steps in (
            ("warmup", warmup_epochs, search.constants.warmup_steps),
            ("search", search_epochs, search.constants.search_steps),
        ):
            if epochs is not None and steps is not None:
                raise ValueError(f"SearchCallback: {name}_epochs={epochs}, but the search has {name}_steps={steps}")
        if patience is not None and patience < 1:
            raise ValueError(f"SearchCallback: patience must be 1 or more, got {patience!r}")
        for measure, compute in (("loss", compute_loss), ("score", compute_score)):
            if compute is not None and measure != search.measure:
                raise ValueError(
                    f"SearchCallback: compute_{measure} is given, but a {type(search).__name__} takes "
                    f"compute_{search.measure}"
                )
        self.search = search
        self.validation_dataset = validation_dataset
        self.compute_loss = compute_loss
        self.compute_score = compute_score
        self.warmup_epochs = warmup_epochs
        self.search_epochs = search_epochs
        self.patience = patience
        self.stop_training = stop_training
        self.log = log
        self._trainer = None
        self._batches = None
        self._position = {"passes": 0, "taken": 0}
        self._logged = len(search.history)
        self._bar = None

    def add_to(self, trainer):
        """Makes it the first callback of `trainer`, so that its values reach every tracker of `report_to`.

        Returns:
            The callback.
        """
        trainer.callback_handler.callbacks.insert(0, self)
        self._trainer = trainer
        return self

    def state(self):
        attributes = {"search": self.search.state_dict(), "validation": dict(self._position)}
        return {"args": {"restored": True}, "attributes": attributes}

    def on_train_begin(self, args, state, control, model=None, train_dataloader=None, **_):
        if self.search.model not in set(model.modules()):
            raise ValueError("SearchCallback: the search is not on the model that the Trainer trains")
        if self.search.step == 0:
            self._schedule(train_dataloader)
        if state.global_step:
            self._restore(state)
        self._batches = _Batches(self._loader(args, train_dataloader), self.search.bandit.seed, self._position)
        if self.log and self._trainer is None and args.report_to:
            logger.warning(
                "SearchCallback: its values reach the log history, but not %s; add it with add_to(trainer)",
                ", ".join(args.report_to),
            )
        self._bar = tqdm(
            desc="search",
            initial=self.search.step,
            total=self.search.constants.search_steps,
            disable=args.disable_tqdm or not self.log or not state.is_world_process_zero,
            dynamic_ncols=True,
        )

    def on_step_begin(self, args, state, control, **_):
        self._sample()

    def on_substep_end(self, args, state, control, model=None, **_):
        self._update(args, model)
        self._sample()

    def on_step_end(self, args, state, control, model=None, **_):
        self._update(args, model)
        self.search.use_selection()
        if self.stop_training and self.search.finished:
            control.should_training_stop = True
        return control

    def on_log(self, args, state, control, logs=None, **_):
        if not self.log or self._logged == len(self.search.history):
            return
        self._logged = len(self.search.history)
        values = self._values()
        logs.update(values)
        # The Trainer has put a copy there already.
        state.log_history[-1].update(values)

    def on_train_end(self, args, state, control, **_):
        self._bar.close()
        self._batches = None
        self.search.apply()
        if state.is_world_process_zero:
            logger.info("SearchCallback: %s", self.search.summary())

    def _schedule(self, train_dataloader):
        constants = self.search.constants
        warmup, end = constants.warmup_steps, constants.search_steps
        if warmup is None:
            epochs = self.search.warmup_epochs if self.warmup_epochs is None else self.warmup_epochs
            warmup = self._micro_batches(epochs, train_dataloader, "warmup")
        if self.search_epochs is not None:
            end = self._micro_batches(self.search_epochs, train_dataloader, "search")
        self.search.schedule(warmup, end)

    def _micro_batches(self, epochs, train_dataloader, what):
        try:
            return round(epochs * len(train_dataloader)) if epochs else 0
        except TypeError as error:
            raise ValueError(
                f"SearchCallback: the training data have no length, so {what}_epochs has no meaning; "
                f"give {type(self.search).__name__}({what}_steps=...)"
            ) from error

    def _restore(self, state):
        saved = state.stateful_callbacks.get(type(self).__name__)
        if not isinstance(saved, dict):
            found = "none" if saved is None else len(saved)
            raise ValueError(
                f"SearchCallback: resuming needs a checkpoint that holds the state of one {type(self).__name__}, "
                f"found {found}"
            )
        attributes = saved["attributes"]
        self.search.load_state_dict(attributes["search"])
        self._position.update(attributes["validation"])
        self._logged = len(self.search.history)

    def _loader(self, args, train_dataloader):
        data = self.validation_dataset
        if data is None and self._trainer is not None and self._trainer.eval_dataset is not None:
            if isinstance(self._trainer.eval_dataset, dict):
                raise ValueError("SearchCallback: the Trainer has several evaluation sets; give validation_dataset=...")
            data = self._trainer.get_eval_dataloader()
        if data is None:
            logger.warning(
                "SearchCallback: no validation_dataset, so %s are compared on training data", self.search.drawn
            )
            data = train_dataloader.dataset
        if isinstance(data, DataLoader):
            # Accelerate's loaders take part in the training loop's bookkeeping while they are iterated.
            return getattr(data, "base_dataloader", data)
        return DataLoader(
            data,
            batch_size=args.train_batch_size,
            sampler=DistributedSampler(data, args.world_size, args.process_index, seed=self.search.bandit.seed),
            collate_fn=train_dataloader.collate_fn,
            num_workers=args.dataloader_num_workers,
        )

    def _sample(self):
        self.search.sample()
        self._bar.update(self.search.step - self._bar.n)

    def _update(self, args, model):
        if not self.search.is_due:
            return
        batch = send_to_device(self._batches.next(), args.device)
        compute = {"loss": self._loss, "score": self._score}[self.search.measure]
        self.search.update(lambda: compute(model, batch))
        if self.patience is not None and self.search.is_stable(self.patience):
            self.search.finish()
        found = {self.search.verb: self.search.history[-1]["selection"], "entropy": f"{self.search.entropy:.2f}"}
        self._bar.set_postfix(found)

    def _loss(self, model, batch):
        if self.compute_loss is not None:
            return self.compute_loss(model, batch)
        if self._trainer is not None:
            # It may take labels out of the batch.
            return self._trainer.compute_loss(model, dict(batch))
        return self._checked(_loss_of(model(**batch)), batch)

    def _score(self, model, batch):
        if self.compute_score is not None:
            return self.compute_score(model, batch)
        if self._trainer is not None:
            loss, outputs = self._trainer.compute_loss(model, dict(batch), return_outputs=True)
        else:
            outputs = model(**batch)
            loss = _loss_of(outputs)
        score = _percent_right(outputs, batch.get("labels"))
        return 100 * self._checked(loss, batch).neg().exp() if score is None else score

    def _checked(self, loss, batch):
        if loss is None:
            raise ValueError(
                f"SearchCallback: the model gave no loss for {', '.join(batch)}; give compute_{self.search.measure}=..."
            )
        return loss

    def _values(self):
        latest = self.search.history[-1]
        measured = [value for value in latest[self.search.measures] if value is not None]
        values = {
            "search/reward": sum(latest["rewards"]) / len(latest["rewards"]),
            "search/entropy": self.search.entropy,
            **{f"search/preference/{layer}": value for layer, value in enumerate(latest["preferences"])},
        }
        return values | ({f"search/{self.search.measure}": sum(measured) / len(measured)} if measured else {})


class _Stored(TrainerCallback):
    """What a Trainer that restores callbacks makes of a stored SearchCallback.

    It would put that in the place of the callback of the same class, but the stored one has neither model nor data.
    Being of another class, it only stands beside the callback, which restores itself.
    """


class _Batches:
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
                torch.default_generator.manual_seed(self._seed_of(self.position["passes"]))
                self.iterator = self._begin_pass()
            else:
                torch.default_generator.manual_seed(self._seed_of(*self.position.values()))
            return next(self.iterator, None)

    def _begin_pass(self):
        sampler = self.loader.sampler
        if hasattr(sampler, "set_epoch"):
            sampler.set_epoch(self.position["passes"])
        taken = self.position["taken"]
        return iter(skip_first_batches(self.loader, taken) if taken else self.loader)

    def _seed_of(self, *position):
        return random.Random(f"{self.seed}/{position}").getrandbits(62)


def _loss_of(outputs):
    return outputs.get("loss") if isinstance(outputs, dict) else outputs[0]


def _percent_right(outputs, labels):
    """How much of the labels the largest logits hit, in percent, or None where these are not one choice per sample."""
    logits = outputs.get("logits") if isinstance(outputs, dict) else None
    if logits is None or labels is None or logits.dim() != 2:
        return None
    labels = labels.to(logits.device)
    if labels.shape == logits.shape and labels.is_floating_point():
        return 100 * vqa_score(logits, labels)
    if labels.shape == logits.shape[:1] and not labels.is_floating_point():
        return 100 * label_accuracy(logits, labels)
    return None
