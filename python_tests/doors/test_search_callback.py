"""The depth search inside transformers.Trainer: draws, updates, logs, its end, and processes."""

import logging

import pytest
import torch
from searched_training import LAYERS, make_search, train
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback
from two_processes import in_two_processes
from vilt_training import Questions, make_arguments

from petl_ext.hf import SearchCallback


class Recorder(TrainerCallback):
    """Notes, at every event, which layers are skipped, and all logs that it sees."""

    def __init__(self, search):
        self.search = search
        self.skipped = []
        self.logs = []

    def on_step_begin(self, *_, **__):
        self.skipped.append(("step", self.search.attachment.skipped))

    def on_substep_end(self, *_, **__):
        self.skipped.append(("substep", self.search.attachment.skipped))

    def on_evaluate(self, *_, **__):
        self.skipped.append(("evaluate", self.search.attachment.skipped, self.search.selection()))

    def on_log(self, args, state, control, logs=None, **_):
        self.logs.append(dict(logs))


def forwards_of(model):
    """Fills a list with (training, skipped layers) of every forward pass."""
    seen = []
    model.register_forward_pre_hook(lambda module, _: seen.append((module.training, module.petl_attachment.skipped)))
    return seen


@pytest.mark.parametrize("accumulation", [1, 3])
def test_every_micro_batch_has_its_draw_and_updates_follow_the_warm_up(accumulation, tmp_path):
    search = make_search()
    forwards = forwards_of(search.model)
    # Eight batches of two are an epoch, so the last step of an epoch has two micro-batches where it should have three.
    train(
        tmp_path,
        search,
        train_size=16,
        max_steps=8 if accumulation == 3 else 24,
        gradient_accumulation_steps=accumulation,
    )
    drawn = [skipped for training, skipped in forwards if training]
    twin = make_search()
    assert drawn == [tuple(sorted(twin.bandit.order()[:2])) for _ in range(8)] + drawn[8:]
    assert search.step == len(drawn) == (22 if accumulation == 3 else 24)
    assert search.constants.warmup_steps == 8
    updates = [entry["step"] for entry in search.history]
    assert updates == list(range(9, search.step + 1, 3))
    compared = [list(skipped) for training, skipped in forwards if not training]
    assert compared == [subset for entry in search.history for subset in entry["subsets"]]
    assert search.finished and search.attachment.skipped == search.selection()


def test_the_loss_is_the_models_on_batches_that_advance_and_wrap(tmp_path):
    search = make_search(warmup_steps=0, interval=1)
    data, seen = Questions(search.model, 6, seed=2), []

    def compute_loss(model, batch):
        assert model is search.model and not model.training
        rows = [
            data.columns["pixel_values"].eq(image).flatten(1).all(1).nonzero().item() for image in batch["pixel_values"]
        ]
        seen.append(tuple(rows))
        return model(**batch).loss

    train(tmp_path, search, SearchCallback(search, data, compute_loss), max_steps=7)
    batches = seen[::3]
    assert seen == [batch for batch in batches for _ in range(3)]
    passes = [batches[:3], batches[3:6]]
    assert all(sorted(sum(each, ())) == list(range(6)) for each in passes)
    assert passes[0] != passes[1] and len(batches) == 7
    plain = make_search(warmup_steps=0, interval=1)
    train(tmp_path, plain, SearchCallback(plain, data), max_steps=7)
    assert plain.state_dict() == search.state_dict()


def test_a_dataloader_is_used_as_it_is(tmp_path):
    search = make_search(warmup_steps=0)
    loader = DataLoader(Questions(search.model, 6, seed=2), batch_size=5)
    sizes = []

    def compute_loss(model, batch):
        sizes.append(len(batch["labels"]))
        return model(**batch).loss

    train(tmp_path, search, SearchCallback(search, loader, compute_loss))
    assert sizes == [5] * 3 + [1] * 3 + [5] * 3 + [1] * 3


def test_the_training_does_not_notice_the_validation(tmp_path):
    """Weights and random numbers are those of a loop that only skips the same layers."""

    class Replay(TrainerCallback):
        def __init__(self, attachment, subsets):
            self.attachment, self.subsets = attachment, iter(subsets)

        def on_step_begin(self, *_, **__):
            self.attachment.skip(next(self.subsets))

    search, twin = make_search(warmup_steps=0), make_search()
    forwards = forwards_of(search.model)
    train(tmp_path, search)
    assert len(search.history) == 4
    replay = Replay(twin.attachment, [skipped for training, skipped in forwards if training])
    Trainer(twin.model, make_arguments(tmp_path), train_dataset=Questions(twin.model), callbacks=[replay]).train()
    for name, tensor in twin.model.state_dict().items():
        assert torch.equal(search.model.state_dict()[name], tensor), name


def test_mixed_precision_reaches_the_validation(tmp_path):
    search = make_search(warmup_steps=0)
    seen = []
    search.model.classifier[0].register_forward_hook(
        lambda module, _, output: seen.append((module.training, output.dtype))
    )
    train(tmp_path, search, bf16=True)
    assert seen.count((False, torch.bfloat16)) == 12 and seen.count((True, torch.bfloat16)) == len(seen) - 12


def test_values_reach_the_logs(tmp_path, caplog):
    search = make_search(warmup_steps=0)
    after = Recorder(search)
    trainer = train(tmp_path, search, recorders=[after], logging_strategy="steps", logging_steps=2)
    in_history = [entry for entry in trainer.state.log_history if "search/reward" in entry]
    logged = [logs for logs in after.logs if "search/reward" in logs]
    # Updates at 3, 6, 9, 12: the logs at 4, 6, 10, 12 have news.
    assert [entry["step"] for entry in in_history] == [4, 6, 10, 12] and len(logged) == 4
    for entry, logs, update in zip(in_history, logged, search.history, strict=True):
        assert entry["search/reward"] == logs["search/reward"] == sum(update["rewards"]) / 3
        assert entry["search/loss"] == pytest.approx(sum(update["losses"]) / 3)
        assert [entry[f"search/preference/{layer}"] for layer in range(LAYERS)] == update["preferences"]
        assert 0.9 < entry["search/entropy"] <= 1
        assert all(type(value) is float for name, value in logs.items() if name.startswith("search/"))
    assert caplog.text == ""


def test_add_to_reaches_the_trackers_and_the_trainers_own_loss_and_data(tmp_path):
    class Doubled(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, **_):
            batches.append((model.training, inputs.pop("labels").shape[0]))
            loss = model(**inputs).logits.square().mean() * 2
            return (loss, None) if return_outputs else loss

    class ActiveLoader(TrainerCallback):
        def on_step_begin(self, args, state, control, train_dataloader=None, **_):
            active.append(trainer.accelerator.gradient_state.active_dataloader is train_dataloader)

    search, batches, active = make_search(warmup_steps=0), [], []
    tracker = Recorder(search)
    trainer = Doubled(
        search.model,
        make_arguments(tmp_path, logging_strategy="steps", logging_steps=3, per_device_eval_batch_size=3),
        train_dataset=Questions(search.model),
        eval_dataset=Questions(search.model, 4),
        callbacks=[tracker, ActiveLoader()],
    )
    callback = SearchCallback(search)
    assert callback.add_to(trainer) is callback
    trainer.train()
    assert [logs["search/reward"] for logs in tracker.logs if "search/reward" in logs] == [
        sum(update["rewards"]) / 3 for update in search.history
    ]
    assert [size for training, size in batches if not training] == [3] * 3 + [1] * 3 + [3] * 3 + [1] * 3
    assert active == [True] * 12  # validation does not take the training loader's place in accelerate's state


def test_what_cannot_be_reached_is_said(tmp_path, caplog):
    search = make_search(warmup_steps=0)
    callback = SearchCallback(search)
    trainer = Trainer(
        search.model, make_arguments(tmp_path, max_steps=4), train_dataset=Questions(search.model), callbacks=[callback]
    )
    trainer.args.report_to = ["tensorboard"]
    with caplog.at_level(logging.WARNING, "petl_ext"):
        trainer.train()
    assert "no validation_dataset, so subsets are compared on training data" in caplog.text
    assert "its values reach the log history, but not tensorboard; add it with add_to(trainer)" in caplog.text
    assert len(search.history) == 1


def test_evaluations_and_checkpoints_see_the_selection(tmp_path):
    search = make_search(warmup_steps=0, interval=2)
    recorder = Recorder(search)
    train(tmp_path, search, recorders=[recorder], eval_strategy="steps", eval_steps=3)
    evaluations = [entry[1:] for entry in recorder.skipped if entry[0] == "evaluate"]
    assert len(evaluations) == 4 and all(skipped == selection for skipped, selection in evaluations)


@pytest.mark.parametrize("stop_training", [False, True])
def test_a_stable_selection_ends_the_search(stop_training, tmp_path):
    search = make_search(1, warmup_steps=0, interval=2)

    def compute_loss(model, batch):
        return 0.0 if search.attachment.skipped == (3,) else 5.0

    callback = SearchCallback(search, Questions(search.model), compute_loss, patience=3, stop_training=stop_training)
    trainer = train(tmp_path, search, callback, max_steps=40)
    assert search.finished and search.selection() == (3,) and search.is_stable(3)
    assert 8 <= search.step < 40
    assert trainer.state.global_step == (search.step if stop_training else 40)


def test_the_search_ends_after_search_epochs(tmp_path):
    search = make_search()
    callback = SearchCallback(search, Questions(search.model), warmup_epochs=0.5, search_epochs=2)
    trainer = train(tmp_path, search, callback, max_steps=16)
    assert (search.constants.warmup_steps, search.constants.search_steps, search.step) == (2, 8, 8)
    assert [entry["step"] for entry in search.history] == [3, 6] and trainer.state.global_step == 16
    again = train(tmp_path, search, callback, max_steps=2)
    assert search.step == 8 and again.state.global_step == 2


def test_progress_is_shown_where_it_is_wanted(tmp_path, capfd):
    train(tmp_path, make_search(warmup_steps=0))
    assert "search" not in capfd.readouterr().err
    train(tmp_path, make_search(warmup_steps=0), disable_tqdm=False)
    shown = capfd.readouterr().err
    assert "search: 12it" in shown and "entropy=" in shown and "skip=[" in shown


def test_the_end_is_logged(tmp_path, caplog):
    search = make_search()
    with caplog.at_level(logging.INFO, "petl_ext"):
        train(tmp_path, search)
    names = ", ".join(f"vilt.encoder.layer.{index}" for index in search.selection())
    assert f"skips layers {list(search.selection())} after {len(search.history)} updates: {names}" in caplog.text


def test_processes_agree(tmp_path):
    ranks = in_two_processes(trained_in_two, tmp_path)
    assert ranks[0]["search"] == ranks[1]["search"] and len(ranks[0]["search"]["history"]) == 4
    assert ranks[0]["drawn"] == ranks[1]["drawn"] and len(ranks[0]["drawn"]) == 12
    # A pass over the data is shared: of the eight samples, each process has compared on four.
    first_pass = [set(rank["validated"][:12]) for rank in ranks]
    assert len(first_pass[0]) == len(first_pass[1]) == 4 and first_pass[0].isdisjoint(first_pass[1])
    for name, tensor in ranks[0]["weights"].items():
        assert torch.equal(ranks[1]["weights"][name], tensor), name


def trained_in_two(rank, folder):
    search, validated = make_search(warmup_steps=0), []

    def compute_loss(model, batch):
        validated.extend(batch["pixel_values"].flatten(1).sum(1).tolist())
        return model(**batch).loss

    forwards = forwards_of(search.model)
    callback = SearchCallback(search, Questions(search.model, 8, seed=2), compute_loss)
    train(
        folder / str(rank),
        search,
        callback,
        train_size=16,
        max_steps=6,
        gradient_accumulation_steps=2,
        ddp_backend="gloo",
    )
    return {
        "search": search.state_dict(),
        "drawn": [skipped for training, skipped in forwards if training],
        "validated": validated,
        "weights": search.model.state_dict(),
    }
