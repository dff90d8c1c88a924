"""What follows a training: measurements against others of the same model, plans, tables, the command line."""

import json
import shutil

import pytest
import torch
from live_tensors import count_tensors
from small_recipes import small_recipe

from petl_ext.cli import main
from petl_ext.recipes.comparing import compare
from petl_ext.recipes.evaluating import evaluate
from petl_ext.recipes.planning import plan
from petl_ext.recipes.runs import open_run
from petl_ext.recipes.training import Experiment, train
from petl_ext.tasks import scienceqa, vqa

QUICK = ("training.steps=2", "training.checkpoint_every=null")


@pytest.fixture(scope="module")
def runs(digits, tmp_path_factory):
    """Of APT on two tasks, one of them with two seeds, and of an adapter; all measured."""
    folder = tmp_path_factory.mktemp("runs")
    made = {
        "vqa": small_recipe("digits-vqa-apt", *QUICK),
        "vqa, seed 1": small_recipe("digits-vqa-apt", *QUICK, "training.seed=1"),
        "scienceqa": small_recipe("digits-scienceqa-apt", *QUICK),
        "adapter": small_recipe("digits-vqa-adapter", *QUICK),
    }
    for name, recipe in made.items():
        train(recipe, digits, folder / name, progress=False)
        evaluate(folder / name, digits, progress=False)
    return {name: open_run(folder / name) for name in made}


def trained_model(run, digits):
    """With its splits, made and filled as a user would."""
    answers = run.answers if run.answers.exists() else None
    experiment = Experiment.of(run.recipe, digits, answers=answers)
    experiment.prepared.load(run.trained)
    return experiment.prepared.model.eval(), experiment.splits


def answered(model, splits, dataset):
    """The logits of every sample alone."""
    with torch.no_grad():
        rows = []
        for index in range(len(dataset)):
            batch = splits.collator([dataset[index]])
            batch.pop("labels", None)
            rows.append(model(**batch).logits)
    return torch.cat(rows)


def test_vqa_s_file_and_accuracy(runs, digits):
    run = runs["vqa"]
    model, splits = trained_model(run, digits)
    (dataset,) = splits.parts("test")
    answers = splits.vocabulary.decode(answered(model, splits, dataset))
    written = json.loads((run.results("test") / "vqa_results.json").read_text())
    assert written == [
        {"question_id": question.question_id, "answer": answer}
        for question, answer in zip(dataset.questions, answers, strict=True)
    ]
    right = [vqa.answer_accuracy(answer, of.answers) for answer, of in zip(answers, dataset.annotations, strict=True)]
    assert run.metrics("test")["accuracy"] == pytest.approx(sum(right) / len(right))


def test_scienceqa_s_file_and_accuracy(runs, digits):
    run = runs["scienceqa"]
    model, splits = trained_model(run, digits)
    (dataset,) = splits.parts("test")
    answers = scienceqa.choose(answered(model, splits, dataset), dataset.problems)
    written = json.loads((run.results("test") / "scienceqa_results.json").read_text())
    assert list(written["results"].values()) == answers
    right = sum(answer == problem.answer for answer, problem in zip(answers, dataset.problems, strict=True))
    assert run.metrics("test")["Avg"] == pytest.approx(right / len(answers)) and written["correct"] == right


def test_one_table(runs, tmp_path):
    comparison = compare([run.folder for run in runs.values()])
    header, apt, adapter = comparison.cells()
    cells = dict(zip(header, apt, strict=True))
    scores = [100 * runs[name].metrics("test")["accuracy"] for name in ("vqa", "vqa, seed 1")]
    mean, spread = sum(scores) / 2, abs(scores[0] - scores[1]) / 2**0.5
    other = 100 * runs["scienceqa"].metrics("test")["Avg"]
    assert cells["VQA"] == f"{mean:.2f} ± {spread:.2f}" and cells["ScienceQA"] == f"{other:.2f}"
    assert cells["average"] == f"{(mean + other) / 2:.2f}" and cells["new parameters"] == "0.03M"
    assert dict(zip(header, adapter, strict=True))["average"] == "-"
    comparison.save(tmp_path / "table")
    text = (tmp_path / "table" / "table.md").read_text()
    assert text == comparison.markdown() and text.count("\n") == 4
    assert (tmp_path / "table" / "table.png").read_bytes().startswith(b"\x89PNG")


def test_a_published_row_follows_its_run(digits, tmp_path):
    settings = ["published={table: apt-vilt, row: APT}", *QUICK]
    train(small_recipe("digits-vqa-apt", *settings), digits, tmp_path / "run", progress=False)
    with pytest.raises(ValueError, match="must have been evaluated on test, got no results: petl-ext eval"):
        compare([tmp_path / "run"])
    evaluate(tmp_path / "run", digits, progress=False)
    header, _, published = compare([tmp_path / "run"]).cells()
    cells = dict(zip(header, published, strict=True))
    assert cells["method"] == "APT, published" and cells["VQA"] == "70.94" and cells["average"] == "72.93"
    assert cells["new parameters"] == "1.92M" and cells["added MACs"] == "0.91G"


def test_a_plan_costs_what_the_training_does(runs, digits):
    planned = plan(runs["vqa"].recipe, digits)
    costs = runs["vqa"].training()
    assert {name: costs[name] for name in vars(planned.costs)} == vars(planned.costs)
    assert planned.costs.added_macs and (planned.samples, planned.steps, planned.accumulation) == (320, 2, 2)
    epochs = small_recipe("digits-vqa-apt", "training.steps=null", "training.epochs=1.5")
    assert plan(epochs, digits).steps == 60
    assert planned.memory["optimizer"] == 2 * planned.memory["gradients"] == 8 * planned.costs.trained_parameters


def test_what_is_kept_for_backward_grows_with_the_batch_and_shrinks_by_checkpointing(digits):
    def kept(*settings):
        return plan(small_recipe("digits-vqa-apt", *settings), digits).memory["kept for backward"]

    assert kept("training.micro_batch=8") == 2 * kept() > 0
    assert kept("training.gradient_checkpointing=true") < kept()


def test_planning_leaves_no_tensor_behind(digits):
    plan(small_recipe("digits-vqa-apt"), digits)
    before = count_tensors()
    plan(small_recipe("digits-vqa-apt"), digits)
    assert count_tensors() == before


def test_the_commands(digits, tmp_path, capsys):
    settings = ["--set", "training.steps=1", "--set", "training.batch_size=4", "--set", "training.micro_batch=4"]
    given = ["digits-snli-ve-apt", "--data", str(digits), "--output", str(tmp_path / "run"), "--no-progress", *settings]
    main(["train", *given, "--dry-run"])
    assert "optimizer steps: 1 of 1" in capsys.readouterr().out and not (tmp_path / "run").exists()
    broken = tmp_path / "broken"
    shutil.copytree(digits, broken)
    for image in (broken / "val").iterdir():
        image.write_bytes(b"no image")
    with pytest.raises(SystemExit) as refused:
        main(["train", *given, "--data", str(broken), "--check-images"])
    assert refused.value.code == 2 and "images cannot be decoded)" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    main(["train", *given, "--check-images"])
    main(["eval", str(tmp_path / "run"), "--data", str(digits), "--no-progress"])
    main(["compare", str(tmp_path / "run"), "--output", str(tmp_path / "table")])
    printed = capsys.readouterr().out
    assert "trained: " in printed and "\n  accuracy 0." in printed and "| APT | vilt backbone |" in printed
    main(["recipes"])
    assert "digits-snli-ve-apt" in capsys.readouterr().out
    main(["recipes", "digits-snli-ve-apt", "--set", "training.steps=3"])
    assert "\n  steps: 3\n" in capsys.readouterr().out
    with pytest.raises(SystemExit) as refused:
        main(["train", *given])
    assert refused.value.code == 2 and "holds this run, finished" in capsys.readouterr().err
    with pytest.raises(SystemExit) as refused:
        main(["compare", str(tmp_path)])
    assert refused.value.code == 2 and "must be the folder of a run" in capsys.readouterr().err
