"""The depth search inside transformers.Trainer: draws, updates, logs, checkpoints and processes."""

import importlib
import json
import logging
import sys
from pathlib import Path

import pytest
import torch
from tiny_vilt import make_model
from torch.utils.data import DataLoader, Dataset
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback
from two_processes import in_two_processes
from vilt_training import Questions, make_arguments

import petl_ext
from petl_ext.hf import SearchCallback
from petl_ext.hf.batches import EndlessBatches
from petl_ext.search import DepthSearch

LAYERS = 5


def make_search(num_skip=2, **arguments):
    model = make_model(num_hidden_layers=LAYERS)
    petl_ext.attach(model, petl_ext.DASConfig(bottleneck=4), keep=["classifier", "vilt.pooler"])
    return DepthSearch(model, num_skip, **{"interval": 3, "seed": 1, **arguments})


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


def train(folder, search, callback=None, recorders=(), train_size=8, resume=None, **changes):
    model = search.model
    callback = callback or SearchCallback(search, Questions(model, 6, seed=2))
    trainer = Trainer(
        model,
        make_arguments(folder, **changes),
        train_dataset=Questions(model, train_size),
        eval_dataset=Questions(model, 4, seed=3),
        callbacks=[callback, *recorders],
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


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


RESUMED = {"save_strategy": "steps", "save_steps": 4, "max_steps": 16, "gradient_accumulation_steps": 2}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted")
    search = make_search()
    train(folder, search, train_size=12, **RESUMED)
    return folder, search


@pytest.mark.parametrize("restore", [False, True])
@pytest.mark.parametrize("step", [4, 8])
def test_a_resumed_search_is_bit_equal(uninterrupted, step, restore, tmp_path):
    folder, search = uninterrupted
    stored = json.loads((folder / f"checkpoint-{step}" / "trainer_state.json").read_text())
    history = stored["stateful_callbacks"]["SearchCallback"]["attributes"]["search"]["history"]
    assert 0 < len(history) < len(search.history)
    resumed = make_search()
    trainer = train(
        tmp_path,
        resumed,
        train_size=12,
        resume=str(folder / f"checkpoint-{step}"),
        restore_callback_states_from_checkpoint=restore,
        **RESUMED,
    )
    assert sum(isinstance(callback, SearchCallback) for callback in trainer.callback_handler.callbacks) == 1
    assert resumed.state_dict() == search.state_dict()
    assert resumed.attachment.skipped == search.attachment.skipped == search.selection()
    for name, tensor in search.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], tensor), name


def test_other_callbacks_are_restored_beside_it(uninterrupted, tmp_path):
    search = make_search()
    early = {"eval_strategy": "steps", "eval_steps": 4, "load_best_model_at_end": True, "metric_for_best_model": "loss"}
    train(tmp_path, search, recorders=[EarlyStoppingCallback(9)], train_size=12, **RESUMED | early)
    resumed = make_search()
    trainer = train(
        tmp_path,
        resumed,
        recorders=[EarlyStoppingCallback(5)],
        train_size=12,
        resume=str(tmp_path / "checkpoint-8"),
        restore_callback_states_from_checkpoint=True,
        **RESUMED | early,
    )
    restored = next(c for c in trainer.callback_handler.callbacks if isinstance(c, EarlyStoppingCallback))
    assert restored.early_stopping_patience == 9
    assert resumed.state_dict() == search.state_dict()


def test_a_checkpoint_of_another_search_is_refused(uninterrupted, tmp_path):
    folder, _ = uninterrupted
    with pytest.raises(ValueError, match="of another search: expected num_skip 3, found 2"):
        train(tmp_path, make_search(3), train_size=12, resume=str(folder / "checkpoint-8"), **RESUMED)
    search = make_search()
    Trainer(search.model, make_arguments(tmp_path, **RESUMED), train_dataset=Questions(search.model, 12)).train()
    with pytest.raises(ValueError, match="holds the state of one SearchCallback, found none"):
        train(tmp_path, make_search(), train_size=12, resume=str(tmp_path / "checkpoint-8"), **RESUMED)


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


def test_a_callback_runs_its_search_once(tmp_path):
    search, twin = make_search(warmup_steps=0), make_search(warmup_steps=0)
    data = Questions(search.model)
    callback = SearchCallback(search, data)
    trainer = Trainer(search.model, make_arguments(tmp_path), train_dataset=data, callbacks=[callback])
    callback.add_to(trainer)
    assert callback.add_to(trainer) is trainer.callback_handler.callbacks[0]
    trainer.train()
    SearchCallback(twin, data).add_to(
        other := Trainer(twin.model, make_arguments(tmp_path), train_dataset=data)
    ).add_to(other)
    other.train()
    assert search.step == 12 and search.state_dict() == twin.state_dict()


def test_two_callbacks_for_a_search_are_refused(tmp_path):
    search = make_search(warmup_steps=0)
    data = Questions(search.model)
    callback = SearchCallback(search, data)
    twice = Trainer(search.model, make_arguments(tmp_path), train_dataset=data, callbacks=[callback, callback])
    with pytest.raises(ValueError, match="more than one callback for this search"):
        twice.train()
    both = Trainer(search.model, make_arguments(tmp_path), train_dataset=data, callbacks=[SearchCallback(search)])
    both.add_callback(callback)
    with pytest.raises(ValueError, match="more than one callback for this search"):
        both.train()
    callback.add_to(both)
    with pytest.raises(ValueError, match="more than one callback for this search"):
        both.train()
    assert search.step == 0


@pytest.mark.parametrize(
    ("constants", "epochs", "message"),
    [
        ({}, {}, "training ends at micro-batch 4, but the first update comes with micro-batch 5 .*more epochs"),
        ({}, {"warmup_epochs": 3}, r"with micro-batch 13 \(warmup_steps=12, interval=3\).*smaller warmup_epochs"),
        ({"interval": 9}, {"warmup_epochs": 0}, "with micro-batch 9 "),
        ({}, {"search_epochs": 1}, r"change warmup_epochs \(now None\) or search_epochs \(now 1\)"),
    ],
)
def test_a_training_too_short_for_an_update_is_refused(constants, epochs, message, tmp_path):
    search = make_search(**constants)
    data = Questions(search.model)
    with pytest.raises(ValueError, match=message):
        train(tmp_path, search, SearchCallback(search, data, **epochs), max_steps=2, gradient_accumulation_steps=2)
    assert search.step == 0 and search.constants.warmup_steps is None
    search = make_search(interval=1)
    callback = SearchCallback(search, data, warmup_epochs=0.25)
    train(tmp_path, search, callback, max_steps=2)
    assert [entry["step"] for entry in search.history] == [2]


class Augmented(Dataset):
    """Numbers with noise from torch's generator, which depends on when they are read."""

    def __len__(self):
        return 12

    def __getitem__(self, index):
        return index + torch.rand(())


class AugmentedStream(torch.utils.data.IterableDataset):
    def __iter__(self):
        return (index + torch.rand(()) for index in range(12))


@pytest.mark.parametrize("taken", range(13))
@pytest.mark.parametrize("kind", ["shuffled", "in order", "stream"])
def test_augmented_validation_batches_are_the_same_after_a_resume(kind, taken):
    def new_batches(position):
        data = AugmentedStream() if kind == "stream" else Augmented()
        return EndlessBatches(DataLoader(data, batch_size=3, shuffle=kind == "shuffled"), 5, position)

    whole = new_batches({"passes": 0, "taken": 0})
    before = [whole.next() for _ in range(taken)]
    resumed = new_batches(dict(whole.position))
    torch.manual_seed(taken)
    state = torch.get_rng_state()
    after = [resumed.next() for _ in range(9)]
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(torch.stack([whole.next() for _ in range(9)]), torch.stack(after))
    assert resumed.position == whole.position and len({batch.sum().item() for batch in before + after}) == 9 + taken


@pytest.mark.parametrize("package", ["accelerate", "transformers"])
def test_a_missing_package_is_named(package, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(sys.modules, "petl_ext.hf")
    with pytest.raises(ImportError, match=rf"petl_ext\.hf needs {package}: pip install {package}"):
        importlib.import_module("petl_ext.hf")


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


@pytest.mark.parametrize(
    ("constants", "arguments", "message"),
    [
        ({"warmup_steps": 5}, {"warmup_epochs": 1}, "warmup_epochs=1, but the search has warmup_steps=5"),
        ({"search_steps": 5}, {"search_epochs": 2}, "search_epochs=2, but the search has search_steps=5"),
        ({}, {"patience": 0}, "patience must be 1 or more, an integer, got 0"),
        ({}, {"patience": 1.5}, "patience must be .*got 1.5"),
        ({}, {"patience": "3"}, "patience must be .*got '3'"),
        ({}, {"warmup_epochs": "1"}, "warmup_epochs must be a number of 0 or more, got '1'"),
        ({}, {"search_epochs": -1}, "search_epochs must be a number of 0 or more, got -1"),
    ],
)
def test_wrong_arguments_are_named(constants, arguments, message):
    with pytest.raises(ValueError, match=message):
        SearchCallback(make_search(**constants), **arguments)


def test_things_of_a_wrong_kind_are_named():
    search = make_search()
    with pytest.raises(TypeError, match="search must be a DepthSearch or a PlacementSearch, got None"):
        SearchCallback(None)
    with pytest.raises(TypeError, match=r"compute_loss must be a function, got 0\.5"):
        SearchCallback(search, compute_loss=0.5)
    for data in ({"val": Questions(search.model)}, "val.json", Path("val"), Stream([]), 3):
        with pytest.raises(
            TypeError, match="validation_dataset must be a dataset with a length and indices, or a Data"
        ):
            SearchCallback(search, data)


def test_a_search_on_another_model_is_refused(tmp_path):
    search, other = make_search(), make_search()
    with pytest.raises(ValueError, match="not on the model that the Trainer trains"):
        train(tmp_path, search, SearchCallback(other, Questions(search.model)))


class Stream(torch.utils.data.IterableDataset):
    def __init__(self, data):
        self.data = data

    def __iter__(self):
        return iter(self.data[index] for index in range(len(self.data)))


def test_data_without_length_need_steps(tmp_path):
    search = make_search()
    stream = Stream(Questions(search.model, 40))
    callback = SearchCallback(search, Questions(search.model))
    trainer = Trainer(search.model, make_arguments(tmp_path), train_dataset=stream, callbacks=[callback])
    with pytest.raises(ValueError, match=r"warmup_epochs has no meaning; give DepthSearch\(warmup_steps=\.\.\.\)"):
        trainer.train()
    search = make_search(warmup_steps=4)
    callback = SearchCallback(search, Questions(search.model))
    Trainer(search.model, make_arguments(tmp_path), train_dataset=stream, callbacks=[callback]).train()
    assert [entry["step"] for entry in search.history] == [5, 8, 11]
    search = make_search(warmup_steps=4)
    trainer = Trainer(search.model, make_arguments(tmp_path), train_dataset=stream, callbacks=[SearchCallback(search)])
    with pytest.raises(TypeError, match=r"training data, in place of validation_dataset, must be .*got Stream"):
        trainer.train()


def test_a_model_without_a_loss_is_named(tmp_path):
    search = make_search(warmup_steps=0)
    data = Questions(search.model)
    del data.columns["labels"]
    data.__class__ = type("Unlabelled", (Questions,), {"__len__": lambda self: 8})
    with pytest.raises(ValueError, match=r"the model gave no loss for input_ids, .*give compute_loss="):
        train(tmp_path, search, SearchCallback(search, data))


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
