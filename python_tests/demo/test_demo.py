"""The demo, on little data and for few steps."""

import json
from dataclasses import replace

import pytest
import torch
from pictures import assert_legible

import petl_ext
from petl_ext.cli import main
from petl_ext.demo.charts import types_table
from petl_ext.demo.data import Score
from petl_ext.demo.training import Size
from petl_ext.demo.vilt import every_layer, lora, run
from petl_ext.demo.vilt.depth_search import DAS
from petl_ext.demo.vilt.training import ViltRun, groups_of
from petl_ext.search import DepthSearch
from petl_ext.tasks.labels import TypeAccuracy

DIM, LAYERS, BOTTLENECK = 128, 4, 16
ADAPTER = 2 * BOTTLENECK * DIM + BOTTLENECK + DIM
NORM = 2 * DIM
BYPASS = 2 * (2 * BOTTLENECK) * DIM + 2 * BOTTLENECK + DIM + NORM


@pytest.fixture
def tiny(monkeypatch):
    scenes = {"train": 150, "val": 10, "test": 20}
    size = Size(steps=3, search_steps=10, batch=8, search_batch=8, questions_per_scene=2, scenes=scenes)
    for name in ("quick", "full"):
        monkeypatch.setattr(ViltRun, name, size)
    monkeypatch.setattr(run, "TIMED_ROUNDS", 2)


def prepare(folder):
    return ViltRun.prepare(folder, ViltRun.quick, seed=0, progress=False)


def rows_of(report):
    """{method: cells after the name} of the first table."""
    lines = [line.split("|")[1:-1] for line in report.splitlines() if "µs" in line]
    return {name.strip().partition(" (")[0]: [cell.strip() for cell in cells] for name, *cells in lines}


def number(cell):
    return float(cell.replace(",", "").rstrip(" M%"))


def test_report(tiny, tmp_path, capsys):
    threads = torch.get_num_threads()
    main(["demo", "--quick", "--no-progress", "--output", str(tmp_path / "first")])
    report = (tmp_path / "first" / "report.md").read_text()
    assert report in capsys.readouterr().out
    rows = rows_of(report)
    assert list(rows) == [method.name for method in run.METHODS]
    new = {
        "classifier only": 0,
        "APT, 50 prompts": LAYERS * (50 * DIM + 2 * 4 * DIM + 1),
        "adapter": LAYERS * 2 * ADAPTER,
        "parallel adapter": LAYERS * (ADAPTER + NORM),
        DAS.name: (LAYERS - 1) * 2 * (ADAPTER + NORM) + BYPASS,
        "full tuning": 0,
    }
    head = number(rows["classifier only"][0])
    for name, count in new.items():
        assert number(rows[name][1]) == count
        assert number(rows[name][0]) - head == count or name == "full tuning"
    assert number(rows["classifier only"][3]) == number(rows["full tuning"][3]) == 100
    assert number(rows[DAS.name][3]) < 85 < 100 < number(rows["parallel adapter"][3]) < number(rows["adapter"][3])
    for name in ("accuracy.png", "types.png", "gates.png"):
        assert f"({name})" in report
        assert_legible(tmp_path / "first" / name)
    assert torch.get_num_threads() == threads
    again = rows_of(run.run_demo(tmp_path / "again", quick=True, seed=0, progress=False))
    assert {name: cells[4] for name, cells in again.items()} == {name: cells[4] for name, cells in rows.items()}


def test_a_score_weighs_types_by_their_questions():
    score = Score({"color": TypeAccuracy(30, 0.9, 0.2), "count": TypeAccuracy(10, 0.5, 0.4)})
    assert score.accuracy == pytest.approx(0.8) and score.standard_error == pytest.approx((0.8 * 0.2 / 40) ** 0.5)
    assert str(score) == "80.0% ± 6.3%"
    rows = [line.strip("| ").split(" | ") for line in types_table({"APT": score}, majority=True).splitlines()]
    assert rows[0] == ["method", "color", "count"]
    assert rows[2:] == [["most frequent answer", "20%", "40%"], ["APT", "90%", "50%"]]
    assert len(types_table({"APT": score}).splitlines()) == 3


def test_das_trains_without_the_layer_that_it_skips(tiny, tmp_path):
    trained = run.train(DAS, prepare(tmp_path))
    (skipped,) = trained.search.selection()
    assert trained.attachment.config.skip == (skipped,) and trained.attachment.config.permanent
    assert str(skipped) in trained.name
    layers = trained.attachment.model.vilt.encoder.layer
    sizes = [sum(parameter.numel() for parameter in layer.parameters()) for layer in layers]
    assert sizes[skipped] == BYPASS < min(size for layer, size in enumerate(sizes) if layer != skipped)
    with_adapters = prepare(tmp_path).attach(replace(DAS, config=petl_ext.AdapterConfig(bottleneck=BOTTLENECK)))
    assert trained.attachment.report().total < with_adapters.report().total


def test_lora_trains_itself_and_the_head(tiny, tmp_path, capsys):
    prepared = prepare(tmp_path)
    new, trainer = lora.train(lora.ROWS[0], prepared)
    trained = {name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad}
    loras = {name for name in trained if "lora_" in name}
    assert new == LAYERS * 2 * 2 * 16 * DIM and len(loras) == LAYERS * 2 * 2
    assert trained - loras == {name for name, _ in prepared.attach(run.METHODS[0]).named_parameters()}
    lora.main(["--quick", "--no-progress", "--output", str(tmp_path), "--seeds", "0", "1"])
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| LoRA")]
    assert [cells[1] for cells in rows] == ["32,768", "36,864"] and {len(cells) for cells in rows} == {4}


def test_learning_rates_of_lora(tiny, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(lora, "RATES", (1e-3, 1e-2))
    lora.main(["--quick", "--no-progress", "--output", str(tmp_path), "--seeds", "0", "--tune"])
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| LoRA")]
    assert [cells[1] for cells in rows] == ["0.001", "0.01", "0.001", "0.01"]


def test_every_layer(tiny, tmp_path, capsys):
    every_layer.main(["--quick", "--no-progress", "--output", str(tmp_path)])
    lines = [line.split("|")[1:-1] for line in capsys.readouterr().out.splitlines()[2:]]
    assert [line[0].strip().partition(",")[0] for line in lines] == ["0", "1", "2", "3", "a random one"]
    assert sum("the choice of the search" in line[0] for line in lines) == 1
    tests = [number(line[3].strip()) for line in lines]
    assert tests[-1] == pytest.approx(sum(tests[:-1]) / LAYERS, abs=0.1)


def test_learning_rate_groups(tiny, tmp_path):
    method = run.METHODS[2]
    attachment = prepare(tmp_path).attach(method)
    groups = {group["lr"]: sum(p.numel() for p in group["params"]) for group in groups_of(attachment, method)}
    model = attachment.model
    pooler = sum(p.numel() for p in model.vilt.pooler.parameters())
    types = sum(p.numel() for name, p in model.named_parameters() if "token_type_embeddings" in name)
    assert groups == {
        method.learning_rate: LAYERS * (50 * DIM + 2 * 4 * DIM + 1),
        method.head_learning_rate: sum(p.numel() for p in model.classifier.parameters()),
        method.head_learning_rate / 2: pooler + types,
    }


def test_tuning_tries_each_rate_once_and_keeps_the_best(monkeypatch):
    monkeypatch.setattr(run, "RATES", (1.0, 2.0))
    monkeypatch.setattr(run, "HEAD_RATES", (0.1, 0.2))
    method = run.Method("any", run.FullTuningConfig(), 1.0, 0.1)
    scores = {(1.0, 0.1): 0.3, (2.0, 0.1): 0.5, (2.0, 0.2): 0.4}
    tried = run._try_rates(method, lambda trial: scores[trial.learning_rate, trial.head_learning_rate])
    assert {(trial.learning_rate, trial.head_learning_rate): score for trial, score in tried} == scores


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    return tmp_path_factory.mktemp("digits")


@pytest.fixture
def search(tiny, digits, capsys):
    def run_search(*options):
        main(["search", "das", "--output", str(digits), "--quick", "--no-progress", *options])
        return json.loads(capsys.readouterr().out)

    return run_search


def state_in(folder):
    return json.loads((folder / "search.json").read_text())


def test_search_das(search, digits):
    result = search()
    assert 0.7 < result["macs"] < 0.85
    model = prepare(digits).attach(replace(DAS, config=replace(DAS.config, skip=result["skip"]))).model
    assert list(model.petl_attachment.skipped) == result["skip"]
    state = state_in(digits)
    restored = DepthSearch.load(digits / "search.json", model)
    assert list(restored.selection()) == result["skip"] and restored.step == 10 and restored.finished
    assert_legible(digits / "gates.png")
    assert {path.name for path in digits.iterdir()} == {"digits-150-seed0", "gates.png", "search.json"}
    assert search() == result and state_in(digits) == state


def test_search_das_to_a_budget(search, digits):
    result = search("--max-macs", "0.6")
    assert len(result["skip"]) == 2 and 0.5 < result["macs"] <= 0.6
    assert len(search("--num-skip", "2")["skip"]) == 2


def test_search_das_goes_on_after_an_interruption(search, digits, monkeypatch, capsys):
    uninterrupted = search("--num-skip", "2"), state_in(digits)
    (digits / "search.json").unlink()

    def interrupt(self, compute_loss):
        if self.step >= 6:
            raise KeyboardInterrupt
        update(self, compute_loss)

    update = DepthSearch.update
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stopped:
        patch.setattr(DepthSearch, "update", interrupt)
        search("--num-skip", "2")
    assert stopped.value.code == 130 and "--resume" in capsys.readouterr().err
    (checkpoints,) = digits.glob("das-checkpoints-*")
    (checkpoint,) = checkpoints.iterdir()
    # Killed in the middle of the next checkpoint.
    for name in ("checkpoint-90", "checkpoint-91"):
        (checkpoints / name).mkdir()
    (checkpoints / "checkpoint-91" / "trainer_state.json").write_text("{")
    for options, complaint in (((), f"{checkpoint} is of an interrupted search"), (("--resume",), "num_skip must be")):
        with pytest.raises(SystemExit) as refused:
            search(*options)
        assert refused.value.code == 2 and complaint in capsys.readouterr().err
    assert (search("--num-skip", "2", "--resume"), state_in(digits)) == uninterrupted
    assert not checkpoints.exists()


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (("--num-skip", "5"), "num_skip must be an integer from 1 to 4"),
        (("--num-skip", "4"), "num_skip=4 leaves only 1 different subset"),
        (("--max-macs", "0.01"), "max_macs must be at least"),
        (("--steps", "3"), "3 steps are too few"),
        (("--num-skip", "1", "--max-macs", "0.5"), "not allowed with"),
        (("--output", __file__), "File exists"),
    ],
)
def test_search_das_refuses(search, capsys, options, complaint):
    with pytest.raises(SystemExit) as refused:
        search(*options)
    printed = capsys.readouterr()
    assert refused.value.code == 2 and complaint in printed.err and not printed.out


@pytest.mark.parametrize("options", ["das --num-skip 5", "das --max-macs 0.01", "placement --steps 3"])
def test_search_refuses_before_it_draws_data(tmp_path, options):
    with pytest.raises(SystemExit, match="2"):
        main(["search", *options.split(), "--output", str(tmp_path / "new")])
    assert not (tmp_path / "new").exists()
