"""What SearchCallback refuses: second uses, too short trainings, other models, data that do not fit."""

import importlib
import sys
from pathlib import Path

import pytest
import torch
from searched_training import make_search, train
from transformers import Trainer
from vilt_training import Questions, make_arguments

from petl_ext.hf import SearchCallback


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


@pytest.mark.parametrize("package", ["accelerate", "transformers"])
def test_a_missing_package_is_named(package, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(sys.modules, "petl_ext.hf")
    with pytest.raises(ImportError, match=rf"petl_ext\.hf needs {package}: pip install {package}"):
        importlib.import_module("petl_ext.hf")


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
    data.__class__ = type("Unlabeled", (Questions,), {"__len__": lambda self: 8})
    with pytest.raises(ValueError, match=r"the model gave no loss for input_ids, .*give compute_loss="):
        train(tmp_path, search, SearchCallback(search, data))
