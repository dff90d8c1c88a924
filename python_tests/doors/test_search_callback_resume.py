"""A depth search inside transformers.Trainer that resumes from a checkpoint."""

import json

import pytest
import torch
from searched_training import make_search, train
from torch.utils.data import DataLoader, Dataset
from transformers import EarlyStoppingCallback, Trainer
from vilt_training import Questions, make_arguments

from petl_ext.hf import SearchCallback
from petl_ext.hf.batches import EndlessBatches

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
    with pytest.raises(ValueError, match="of another search: its num_skip must be 3, got 2"):
        train(tmp_path, make_search(3), train_size=12, resume=str(folder / "checkpoint-8"), **RESUMED)
    search = make_search()
    Trainer(search.model, make_arguments(tmp_path, **RESUMED), train_dataset=Questions(search.model, 12)).train()
    with pytest.raises(ValueError, match="holds the state of one SearchCallback, got none"):
        train(tmp_path, make_search(), train_size=12, resume=str(tmp_path / "checkpoint-8"), **RESUMED)


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
@pytest.mark.parametrize("order", ["shuffled", "in order", "stream"])
def test_augmented_validation_batches_are_the_same_after_a_resume(order, taken):
    def new_batches(position):
        data = AugmentedStream() if order == "stream" else Augmented()
        return EndlessBatches(DataLoader(data, batch_size=3, shuffle=order == "shuffled"), 5, position)

    whole = new_batches({"passes": 0, "taken": 0})
    before = [whole.next() for _ in range(taken)]
    resumed = new_batches(dict(whole.position))
    torch.manual_seed(taken)
    state = torch.get_rng_state()
    after = [resumed.next() for _ in range(9)]
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(torch.stack([whole.next() for _ in range(9)]), torch.stack(after))
    assert resumed.position == whole.position and len({batch.sum().item() for batch in before + after}) == 9 + taken
