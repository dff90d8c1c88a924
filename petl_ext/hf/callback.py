"""A search inside transformers.Trainer."""

import logging
import weakref
from collections.abc import Callable
from typing import Any

from accelerate.utils import send_to_device
from torch import nn
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from petl_ext.hf.batches import EndlessBatches, check_data, loader_of, validation_data
from petl_ext.hf.schedule import check_epochs, check_time, set_schedule
from petl_ext.hf.scores import DEFAULTS
from petl_ext.search import Search
from petl_ext.search.comparing import check_callable

logger = logging.getLogger("petl_ext")

_trainings = weakref.WeakKeyDictionary()  # of every search the TrainerState of its latest training


class RestoredCallback(TrainerCallback):
    """Does nothing: what a Trainer makes of the stored state of a `SearchCallback`, whose `__new__` says why."""


class SearchCallback(TrainerCallback, ExportableState):
    """Runs a search while a transformers.Trainer trains, and leaves its selection in the model at the end.

        callback = petl_ext.hf.SearchCallback(petl_ext.DepthSearch(model, num_skip=4))
        trainer = Trainer(model, args, train_dataset=train, eval_dataset=val)
        callback.add_to(trainer)
        trainer.train()

    Every micro-batch has its own draw, as in DAS and KAB-APP. Validation batches advance from update to update and
    begin again when they are used up. Between optimizer steps, so in evaluations and checkpoints, the model has the
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
        # With restore_callback_states_from_checkpoint the Trainer calls SearchCallback(**state()["args"]) and removes
        # its own callback of the result's class. A SearchCallback made so would have no model and no data, which no
        # file holds. Being of another class, the result stands beside the callback, which restores itself (`_restore`).
        return RestoredCallback() if restored else super().__new__(cls)

    def __init__(
        self,
        search: Search,
        validation_dataset: Dataset | DataLoader | None = None,
        compute_loss: Callable | None = None,
        warmup_epochs: float | None = None,
        search_epochs: float | None = None,
        patience: int | None = None,
        stop_training: bool = False,
        log: bool = True,
        compute_score: Callable | None = None,
    ):
        if not isinstance(search, Search):
            raise TypeError(f"SearchCallback: search must be a DepthSearch or a PlacementSearch, got {search!r}")
        check_epochs("warmup", warmup_epochs, search.constants.warmup_steps)
        check_epochs("search", search_epochs, search.constants.search_steps)
        if patience is not None and (type(patience) is not int or patience < 1):
            raise ValueError(f"SearchCallback: patience must be 1 or more, an integer, got {patience!r}")
        _check_compute("loss", compute_loss, search)
        _check_compute("score", compute_score, search)
        if validation_dataset is not None:
            check_data("validation_dataset", validation_dataset)
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

    def add_to(self, trainer: Trainer) -> "SearchCallback":
        """Makes it the first callback of `trainer`, so that its values reach every tracker. A second call changes
        nothing.

        Returns:
            The callback.
        """
        others = [callback for callback in trainer.callback_handler.callbacks if callback is not self]
        trainer.callback_handler.callbacks = [self, *others]
        self._trainer = trainer
        return self

    def state(self) -> dict[str, Any]:
        attributes = {"search": self.search.state_dict(), "validation": dict(self._position)}
        return {"args": {"restored": True}, "attributes": attributes}

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        train_dataloader: DataLoader | None = None,
        **_: Any,
    ) -> None:
        if self.search.model not in set(model.modules()):
            raise ValueError("SearchCallback: the search is not on the model that the Trainer trains")
        if _trainings.get(self.search) is state:
            # It would draw twice for every step.
            raise ValueError("SearchCallback: the Trainer has more than one callback for this search; give it one")
        _trainings[self.search] = state
        self._prepare(args, state, train_dataloader)
        self._batches = self._validation_batches(args, train_dataloader)
        if self.log and self._trainer is None and args.report_to:
            logger.warning(
                "SearchCallback: its values reach the log history, but not %s; add it with add_to(trainer)",
                ", ".join(args.report_to),
            )
        self._bar = _progress_bar(self.search, args.disable_tqdm or not self.log or not state.is_world_process_zero)

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._sample()

    def on_substep_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **_: Any,
    ) -> None:
        self._update(args, model)
        self._sample()

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **_: Any,
    ) -> None:
        self._update(args, model)
        self.search.use_selection()
        if self.stop_training and self.search.finished:
            control.should_training_stop = True
        return control

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        if not self.log or self._logged == len(self.search.history):
            return
        self._logged = len(self.search.history)
        values = _latest_values(self.search)
        logs.update(values)
        # The Trainer has put a copy there already.
        state.log_history[-1].update(values)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._bar.close()
        self._batches = None
        self.search.apply()
        if state.is_world_process_zero:
            logger.info("SearchCallback: %s", self.search.summary())

    def _prepare(self, args, state, train_dataloader):
        constants = self.search.constants
        try:
            if self.search.step == 0:
                set_schedule(self.search, self.warmup_epochs, self.search_epochs, train_dataloader)
            if state.global_step:
                self._restore(state)
            check_time(self.search, args, state)
        except BaseException:
            # Otherwise the schedule that was wrong would stay the search's own.
            if self.search.step == 0:
                self.search.constants = constants
            raise

    def _restore(self, state):
        saved = state.stateful_callbacks.get(type(self).__name__)
        if not isinstance(saved, dict):
            found = "none" if saved is None else len(saved)
            raise ValueError(
                f"SearchCallback: resuming needs a checkpoint that holds the state of one {type(self).__name__}, "
                f"got {found}"
            )
        attributes = saved["attributes"]
        self.search.load_state_dict(attributes["search"])
        self._position.update(attributes["validation"])
        self._logged = len(self.search.history)

    def _validation_batches(self, args, train_dataloader):
        seed, word = self.search.bandit.seed, self.search.choice.options_key
        data = validation_data(self.validation_dataset, self._trainer, train_dataloader, word)
        return EndlessBatches(loader_of(data, seed, args, train_dataloader), seed, self._position)

    def _sample(self):
        self.search.sample()
        self._bar.update(self.search.step - self._bar.n)

    def _update(self, args, model):
        if not self.search.is_due:
            return
        batch = send_to_device(self._batches.next(), args.device)
        self.search.update(lambda: self._measure(model, batch))
        if self.patience is not None and self.search.is_stable(self.patience):
            self.search.finish()
        found = {self.search.choice.verb: self.search.history[-1]["selection"], "entropy": f"{self.search.entropy:.2f}"}
        self._bar.set_postfix(found)

    def _measure(self, model, batch):
        name = self.search.choice.measure_name
        own = {"loss": self.compute_loss, "score": self.compute_score}[name]
        return DEFAULTS[name](model, batch, self._trainer) if own is None else own(model, batch)


def _check_compute(measure, compute, search):
    if compute is None:
        return
    taken = search.choice.measure_name
    if measure != taken:
        raise ValueError(f"SearchCallback: compute_{measure} is given, but a {search.name} takes compute_{taken}")
    check_callable("SearchCallback", f"compute_{measure}", compute)


def _progress_bar(search, disable):
    total = search.constants.search_steps
    return tqdm(desc="search", initial=search.step, total=total, disable=disable, dynamic_ncols=True)


def _latest_values(search):
    """What the latest update has found, for logs."""
    choice, latest = search.choice, search.history[-1]
    measured = [value for value in latest[choice.measures_key] if value is not None]
    values = {
        "search/reward": sum(latest["rewards"]) / len(latest["rewards"]),
        "search/entropy": search.entropy,
        **{f"search/preference/{arm}": value for arm, value in enumerate(latest["preferences"])},
    }
    return values | ({f"search/{choice.measure_name}": sum(measured) / len(measured)} if measured else {})
