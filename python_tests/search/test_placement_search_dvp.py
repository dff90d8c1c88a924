"""The search for the prompt's layer on DVP models, and in transformers' Trainer."""

import copy
import logging
import math

import pytest
import torch
from placement_searches import make_search
from tiny_dvp import LABELS, make_inputs, make_language_model, make_model, restated
from transformers import Trainer, TrainingArguments

from petl_ext import PlacementSearch
from petl_ext.hf import SearchCallback


@pytest.mark.parametrize("family", ["bert", "t5", "llama"])
@pytest.mark.parametrize("candidates", [None, "all"])
def test_dvp_trains_the_candidates_that_were_drawn(candidates, family):
    model = make_model(family, candidates=candidates).train()
    inputs, labels = make_inputs(model), torch.arange(3) % LABELS
    before = copy.deepcopy(model.visual_prompts)
    search, drawn = PlacementSearch(model, seed=2), []
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
    while len(set(drawn)) < 2:
        drawn.append(search.sample())
        model(**inputs, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        search.update(lambda: -model(**inputs, labels=labels).loss)
    moved = {
        index
        for index, (layer, old) in enumerate(zip(model.visual_prompts, before, strict=True))
        if not torch.equal(layer.query.weight, old.query.weight)
    }
    assert moved == (set(drawn) if candidates else {0})  # weight decay leaves the others alone
    assert search.apply() == model.insert_layer and any(search.bandit.preferences)


@pytest.mark.parametrize("family", ["t5", "llama"])
def test_a_found_layer_is_trained_on_and_kept(family, tmp_path):
    model = make_model(family, candidates="all", use_adapters=True)
    inputs, labels = make_inputs(model), torch.arange(3) % LABELS
    search = PlacementSearch(model, seed=1, step_size=0.1)
    while search.selection() != 2:
        search.sample()
        search.update(lambda: 100.0 * (model.insert_layer == 2))
        assert search.step < 50
    assert search.apply() == search.sample() == model.insert_layer == 2
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    losses = []
    for _ in range(8):
        losses.append(model(**inputs, labels=labels).loss)
        losses[-1].backward()
        assert (
            model.visual_prompts[2].query.weight.grad is not None and model.visual_prompts[1].query.weight.grad is None
        )
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0]
    model.save(tmp_path / "found")
    again = type(model).load(tmp_path / "found", make_language_model(family).double()).eval()
    with torch.no_grad():
        found = again(**inputs).logits
        assert again.insert_layer == 2 and torch.equal(found, model(**inputs).logits)
        torch.testing.assert_close(found, restated(model, **inputs), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_llama_continues_texts_while_layers_are_compared():
    """The score is of generated tokens, and every layer's cache is its own."""
    model = make_model("llama", num_labels=None, candidates="all")
    inputs, answers = make_inputs(model), []
    for layer in range(model.num_layers):
        model.insert_layer = layer
        answers.append(model.generate(**inputs, max_new_tokens=3))
    search, scored = PlacementSearch(model, seed=1, step_size=0.1), {}

    def percent_right():
        found = model.generate(**inputs, max_new_tokens=3)
        scored[model.insert_layer] = torch.equal(found, answers[model.insert_layer])
        return 100 * (found[:, :1] == answers[1][:, :1]).float().mean()

    for _ in range(6):
        search.sample()
        search.update(percent_right)
    assert all(scored.values()) and len(scored) == model.num_layers
    assert search.apply() == model.insert_layer
    assert torch.equal(model.generate(**inputs, max_new_tokens=3), answers[search.selection()])


@pytest.fixture
def trained(tmp_path):
    """Trains a DVP with the callback, which is given these arguments, and returns search and trainer."""

    def run(labels, callback=None, resume=None, added=True, family="bert", **arguments):
        model = make_model(family, candidates="all").float()
        inputs = make_inputs(model, batch=len(labels))
        data = [{name: t[i] for name, t in inputs.items()} | {"labels": labels[i]} for i in range(len(labels))]
        search = PlacementSearch(model, seed=1)
        defaults = {"max_steps": 6, "per_device_train_batch_size": 2, "per_device_eval_batch_size": 3}
        quiet = {"use_cpu": True, "report_to": [], "disable_tqdm": True, "learning_rate": 0.01}
        trainer = Trainer(
            model,
            TrainingArguments(tmp_path, **{**defaults, **quiet, "save_strategy": "no", **arguments}),
            train_dataset=data,
            eval_dataset=data,
        )
        search_callback = SearchCallback(search, None if added else data, **callback or {})
        if added:
            search_callback.add_to(trainer)
        else:
            trainer.add_callback(search_callback)
        trainer.train(resume)
        return search, trainer

    return run


CLASSES = torch.arange(8) % 5
SOFT = torch.rand(8, 5, generator=torch.Generator().manual_seed(0))


def test_the_trainer_searches_and_resumes_bit_equal(trained, tmp_path, caplog):
    options = {"save_strategy": "steps", "save_steps": 2, "gradient_accumulation_steps": 2, "max_steps": 6}
    with caplog.at_level(logging.INFO, "petl_ext"):
        search, trainer = trained(SOFT, **options, logging_steps=1)
    assert [entry["step"] for entry in search.history] == list(range(1, 13))  # every micro-batch, from the first on
    assert search.finished and search.model.insert_layer == search.selection()
    assert f"SearchCallback: {search.summary()}" in caplog.text
    logs = [entry for entry in trainer.state.log_history if "search/score" in entry]
    assert len(logs) == 6 and 0 <= logs[0]["search/score"] <= 100 and 0 < logs[0]["search/entropy"] <= 1
    assert logs[-1]["search/preference/2"] == search.bandit.preferences[2]
    resumed, _ = trained(SOFT, resume=str(tmp_path / "checkpoint-4"), **options)
    assert resumed.state_dict() == search.state_dict() and resumed.model.insert_layer == search.selection()
    for name, tensor in search.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], tensor), name


@pytest.mark.parametrize("family", ["t5", "llama"])
def test_the_trainer_searches_on_other_language_models(trained, family):
    score = {"compute_score": lambda model, batch: 100 * math.exp(-model(**batch).loss)}
    search, trainer = trained(CLASSES, score, family=family)
    assert search.finished and search.model.insert_layer == search.selection() and any(search.bandit.preferences)
    scores = {score for entry in search.history for score in entry["scores"]}
    assert len(scores) > len(search.history) and all(0 < score < 100 for score in scores)
    assert trainer.evaluate()["eval_loss"] > 0


def expected_score(model, batch):
    """In percent, written anew."""
    hit = model(**batch).logits.tolist()
    hit = [row.index(max(row)) for row in hit]
    labels = batch["labels"]
    right = [label[i].item() if labels.dim() == 2 else float(label == i) for label, i in zip(labels, hit, strict=True)]
    return 100 * sum(right) / len(right)


@pytest.mark.parametrize("added", [False, True])
@pytest.mark.parametrize("labels", [CLASSES, SOFT], ids=["classes", "soft"])
def test_the_default_score_is_the_percentage_that_is_right(trained, labels, added):
    search, _ = trained(labels, added=added)
    twin, _ = trained(labels, {"compute_score": expected_score}, added=added)
    assert search.history[0]["layers"] == twin.history[0]["layers"]
    for ours, expected in zip(search.history, twin.history, strict=True):
        assert ours["scores"] == pytest.approx(expected["scores"], rel=1e-5)
    assert len({score for entry in search.history for score in entry["scores"]}) > 1


@pytest.mark.parametrize("added", [False, True])
def test_without_a_class_per_sample_the_score_is_of_the_loss(trained, added, monkeypatch):
    """As language models have it, whose labels are tokens."""
    monkeypatch.setattr("petl_ext.hf.scores.percent_right", lambda outputs, labels: None)
    search, _ = trained(CLASSES, added=added)
    twin, _ = trained(
        CLASSES, {"compute_score": lambda model, batch: 100 * math.exp(-model(**batch).loss)}, added=added
    )
    assert search.history[0]["scores"] == pytest.approx(twin.history[0]["scores"], rel=1e-5)
    assert search.bandit.preferences == pytest.approx(twin.bandit.preferences, rel=1e-3, abs=1e-7)


def test_what_is_no_choice_per_sample_has_no_percentage():
    from petl_ext.hf.scores import percent_right

    logits = torch.eye(3)
    assert percent_right({"logits": logits}, torch.tensor([0, 1, 0])) == pytest.approx(200 / 3)
    assert percent_right({"logits": logits}, torch.full((3, 3), 0.3)) == pytest.approx(30)
    assert percent_right({"logits": logits}, None) is percent_right((logits,), torch.tensor([0, 1, 0])) is None
    assert percent_right({"logits": logits}, torch.rand(3)) is None
    assert percent_right({"logits": torch.zeros(3, 2, 4)}, torch.zeros(3, 2, dtype=torch.long)) is None


def test_patience_ends_the_search_in_a_trainer(trained):
    best = {"compute_score": lambda model, batch: 100.0 * (model.insert_layer == 2), "patience": 3}
    search, trainer = trained(CLASSES, {**best, "stop_training": True}, max_steps=60)
    assert search.selection() == 2 and trainer.state.global_step == search.step < 60


def test_a_search_takes_its_own_measure_and_its_own_model(trained):
    with pytest.raises(ValueError, match="compute_loss is given, but a PlacementSearch takes compute_score"):
        SearchCallback(make_search(), compute_loss=lambda model, batch: 1.0)
    _, trainer = trained(CLASSES, max_steps=1)
    SearchCallback(make_search(copy.deepcopy(trainer.model))).add_to(trainer)
    with pytest.raises(ValueError, match="not on the model that the Trainer trains"):
        trainer.train()
