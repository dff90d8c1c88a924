"""The demo, on little data and for few steps."""

import pytest
import torch
from PIL import Image

from petl_ext.cli import main
from petl_ext.demo import run


@pytest.fixture
def tiny(monkeypatch):
    size = run.Size(steps=3, batch=8, scenes={"train": 150, "val": 10, "test": 20})
    monkeypatch.setattr(run, "QUICK", size)
    monkeypatch.setattr(run, "Size", lambda: size)
    monkeypatch.setattr(run, "TIMED_ROUNDS", 2)


def test_report(tiny, tmp_path, capsys):
    threads = torch.get_num_threads()
    main(["demo", "--quick", "--no-progress", "--output", str(tmp_path)])
    report = (tmp_path / "report.md").read_text()
    assert report in capsys.readouterr().out
    rows = {line.split("|")[1].strip(): line.split("|")[2:-1] for line in report.splitlines() if line.startswith("| ")}
    assert {method.name for method in run.METHODS} <= rows.keys()
    head = int(report.split("| classifier only |")[1].split("|")[0].replace(",", ""))
    of_apt = report.split("| APT, 50 prompts |")[1].split("|")
    assert int(of_apt[0].replace(",", "")) - head == int(of_apt[1].replace(",", "")) == 4 * (50 * 128 + 2 * 4 * 128 + 1)
    for name in ("accuracy.png", "types.png"):
        with Image.open(tmp_path / name) as picture:
            assert picture.width > 800 and len(picture.convert("RGB").getcolors(1 << 20)) > 10
    assert torch.get_num_threads() == threads


def test_the_same_seed_gives_the_same_accuracies(tiny, tmp_path):
    def accuracies(folder):
        report = run.run_demo(folder, quick=True, seed=1, progress=False)
        return [line.split("|")[5] for line in report.splitlines() if "µs" in line]

    first = accuracies(tmp_path / "a")
    assert len(first) == len(run.METHODS)
    assert accuracies(tmp_path / "b") == first == accuracies(tmp_path / "a")


def test_learning_rate_groups():
    method = run.METHODS[2]
    attachment = run.attach(run._make_model(method, 21), method.config, keep=run.HEAD)
    groups = {group["lr"]: sum(p.numel() for p in group["params"]) for group in run._groups(attachment, method)}
    model = attachment.model
    pooler = sum(p.numel() for p in model.vilt.pooler.parameters())
    types = sum(p.numel() for name, p in model.named_parameters() if "token_type_embeddings" in name)
    assert groups == {
        method.learning_rate: 4 * (50 * 128 + 2 * 4 * 128 + 1),
        method.head_learning_rate: sum(p.numel() for p in model.classifier.parameters()),
        method.head_learning_rate / 2: pooler + types,
    }


def test_tuning_tries_each_rate_once_and_keeps_the_best(monkeypatch):
    monkeypatch.setattr(run, "RATES", (1.0, 2.0))
    monkeypatch.setattr(run, "HEAD_RATES", (0.1, 0.2))
    method = run.Method("any", run.FullTuningConfig(), 1.0, 0.1)
    scores = {(1.0, 0.1): 0.3, (2.0, 0.1): 0.5, (2.0, 0.2): 0.4}
    tried = run._search(method, lambda trial: scores[trial.learning_rate, trial.head_learning_rate])
    assert {(trial.learning_rate, trial.head_learning_rate): score for trial, score in tried} == scores
