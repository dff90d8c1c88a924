"""petl_ext inside transformers.Trainer."""

import logging
import math
import random
import weakref

try:
    import accelerate  # noqa: F401
    import transformers  # noqa: F401
except ModuleNotFoundError as error:
    if error.name not in ("accelerate", "transformers"):
        raise
    raise ImportError(f"petl_ext.hf needs {error.name}: pip install {error.name}") from error

import torch
from accelerate.data_loader import skip_first_batches
from accelerate.utils import send_to_device
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset
from tqdm.auto import tqdm
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from petl_ext.search import Search
from petl_ext.search.comparing import check_callable
from petl_ext.tasks.labels import label_accuracy
from petl_ext.tasks.vqa import vqa_score

logger = logging.getLogger("petl_ext")

_trainings = weakref.WeakKeyDictionary()  # of every search the TrainerState of its latest training


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
            What a dataset draws from torch's generator is repeated by a run that resumes, but not in worker processes.
        compute_loss: for a DepthSearch, (model, batch on the model's device) -> loss. None: as the Trainer of `add_to`
            does, otherwise the model's own loss; under the Trainer's mixed precision in both cases.
        warmup_epochs: epochs before the first update. None: the search's warmup_steps or, where it has none, 1 for a
            DepthSearch and 0 for a PlacementSearch, as their authors do.
        search_epochs: epochs after which the selection is fixed. None: the search's search_steps or, where it has none,
            the end of training.
        patience: also fix the selection when this many updates have left it as it was.
        stop_training: whether training stops when the selection is fixed.
        log: whether reward, loss or score, the search's `entropy` (0 when nothing is open) and preferences of the
            latest update go to the Trainer's logs, and progress to a bar unless disable_tqdm is set.
        compute_score: for a PlacementSearch, (model, batch on the model's device) -> score, larger for better. None:
            what the authors score, in percent. With class labels, integers [B], the accuracy; with soft ones, [B, L],
            the mean label of the class with the largest logit; otherwise 100 * exp(-loss), as for ScienceQA. Computed
            as the loss is, so under the Trainer's mixed precision; the authors score without it.

    Raises:
        ValueError: warm-up or end are given here and in the search, a number is out of its range, or compute_loss or
            compute_score is given for a search that does not take it. When training begins: no update can take place
            before it ends, the search is on another model, or two callbacks run it.
        TypeError: search, validation_dataset, compute_loss or compute_score is no such thing.
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
        if not isinstance(search, Search):
            raise TypeError(f"SearchCallback: search must be a DepthSearch or a PlacementSearch, got {search!r}")
        _check_epochs("warmup", warmup_epochs, search.constants.warmup_steps)
        _check_epochs("search", search_epochs, search.constants.search_steps)
        if patience is not None and (type(patience) is not int or patience < 1):
            raise ValueError(f"SearchCallback: patience must be 1 or more, an integer, got {patience!r}")
        _check_compute("loss", compute_loss, search)
        _check_compute("score", compute_score, search)
        if validation_dataset is not None:
            _check_data("validation_dataset", validation_dataset)
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

        It is there once, also where the Trainer has it already.

        Returns:
            The callback.
        """
        others = [callback for callback in trainer.callback_handler.callbacks if callback is not self]
        trainer.callback_handler.callbacks = [self, *others]
        self._trainer = trainer
        return self

    def state(self):
        attributes = {"search": self.search.state_dict(), "validation": dict(self._position)}
        return {"args": {"restored": True}, "attributes": attributes}

    def on_train_begin(self, args, state, control, model=None, train_dataloader=None, **_):
        if self.search.model not in set(model.modules()):
            raise ValueError("SearchCallback: the search is not on the model that the Trainer trains")
        if _trainings.get(self.search) is state:
            # It would draw twice for every step.
            raise ValueError("SearchCallback: the Trainer has more than one callback for this search; give it one")
        _trainings[self.search] = state
        self._prepare(args, state, train_dataloader)
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

    def _prepare(self, args, state, train_dataloader):
        constants = self.search.constants
        try:
            if self.search.step == 0:
                self._schedule(train_dataloader)
            if state.global_step:
                self._restore(state)
            self._check_time(args, state)
        except BaseException:
            # Otherwise the schedule that was wrong would stay the search's own.
            if self.search.step == 0:
                self.search.constants = constants
            raise

    def _schedule(self, train_dataloader):
        constants = self.search.constants
        warmup, end = constants.warmup_steps, constants.search_steps
        if warmup is None:
            epochs = constants.default_warmup_epochs if self.warmup_epochs is None else self.warmup_epochs
            warmup = self._micro_batches(epochs, train_dataloader, "warmup")
        if self.search_epochs is not None:
            end = self._micro_batches(self.search_epochs, train_dataloader, "search")
        try:
            self.search.schedule(warmup, end)
        except ValueError as error:
            raise ValueError(
                f"SearchCallback: {error}; change warmup_epochs (now {self.warmup_epochs!r}) or search_epochs (now "
                f"{self.search_epochs!r}), or those constants of the search"
            ) from error

    def _check_time(self, args, state):
        if self.search.finished or self.search.history:
            return
        constants = self.search.constants
        # At most: the last optimiser step of an epoch may have fewer micro-batches.
        end = self.search.step + (state.max_steps - state.global_step) * args.gradient_accumulation_steps
        if end < constants.first_update:
            raise ValueError(
                f"SearchCallback: training ends at micro-batch {end}, but the first update comes with micro-batch "
                f"{constants.first_update} (warmup_steps={constants.warmup_steps}, interval={constants.interval}), so "
                "nothing would be found; train for more epochs, or give a smaller warmup_epochs or interval"
            )

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
                "SearchCallback: no validation_dataset, so %s are compared on training data",
                self.search.choice.options_key,
            )
            data = train_dataloader.dataset
            _check_data("the training data, in place of validation_dataset,", data)
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
        compute = {"loss": self._loss, "score": self._score}[self.search.choice.measure_name]
        self.search.update(lambda: compute(model, batch))
        if self.patience is not None and self.search.is_stable(self.patience):
            self.search.finish()
        found = {self.search.choice.verb: self.search.history[-1]["selection"], "entropy": f"{self.search.entropy:.2f}"}
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
                f"SearchCallback: the model gave no loss for {', '.join(batch)}; give "
                f"compute_{self.search.choice.measure_name}=..."
            )
        return loss

    def _values(self):
        latest = self.search.history[-1]
        measured = [value for value in latest[self.search.choice.measures_key] if value is not None]
        values = {
            "search/reward": sum(latest["rewards"]) / len(latest["rewards"]),
            "search/entropy": self.search.entropy,
            **{f"search/preference/{layer}": value for layer, value in enumerate(latest["preferences"])},
        }
        name = f"search/{self.search.choice.measure_name}"
        return values | ({name: sum(measured) / len(measured)} if measured else {})


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


def _check_epochs(name, epochs, steps):
    if epochs is None:
        return
    if type(epochs) not in (int, float) or not 0 <= epochs < math.inf:
        raise ValueError(f"SearchCallback: {name}_epochs must be a number of 0 or more, got {epochs!r}")
    if steps is not None:
        raise ValueError(f"SearchCallback: {name}_epochs={epochs}, but the search has {name}_steps={steps}")


def _check_compute(measure, compute, search):
    if compute is None:
        return
    if measure != search.choice.measure_name:
        raise ValueError(
            f"SearchCallback: compute_{measure} is given, but a {type(search).__name__} takes "
            f"compute_{search.choice.measure_name}"
        )
    check_callable("SearchCallback", f"compute_{measure}", compute)


def _check_data(argument, data):
    if isinstance(data, DataLoader):
        return
    known = all(hasattr(data, name) for name in ("__len__", "__getitem__"))
    if not known or isinstance(data, dict | str | IterableDataset):
        raise TypeError(
            f"SearchCallback: {argument} must be a dataset with a length and indices, or a DataLoader, got "
            f"{type(data).__name__}"
        )


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
