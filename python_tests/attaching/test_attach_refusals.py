"""What attach refuses, in words that say what must be and what is, and with the model unchanged."""

import pytest
import torch
from tiny_vilt import CONFIGS, make_model, snapshot

import petl_ext
from petl_ext import APTConfig, ClassifierOnlyConfig, DeepPromptConfig


class Elsewhere(torch.nn.Module):
    """A model with nothing that any method looks for."""

    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(3, 3)


def own_forward(model):
    site = model.vilt.encoder.layer[1].attention.output
    site.forward = site.forward


def two_levels(model):
    petl_ext.attach(model.vilt, CONFIGS[0])


def integer_projection(model):
    dense = model.vilt.encoder.layer[1].attention.output.dense
    dense.weight = torch.nn.Parameter(dense.weight.to(torch.int8), requires_grad=False)


def meta_projection(model):
    model.vilt.encoder.layer[1].attention.output.to("meta")


@pytest.mark.parametrize(
    ("prepare", "config", "keep", "message"),
    [
        (None, CONFIGS[0], ["clasifier"], "keep='clasifier' matches no parameter of Vilt.*classifier"),
        (None, CONFIGS[0], ["class"], "keep='class' matches no parameter"),
        (None, CONFIGS[0], [""], "keep='' matches no parameter"),
        (None, ClassifierOnlyConfig(), [], r"ClassifierOnlyConfig\(.*\) adds nothing and keep is empty"),
        (
            None,
            APTConfig(sites=["attention.out"]),
            [],
            "pattern 'attention.out'.*vilt.encoder.layer.0.attention.output",
        ),
        (None, APTConfig(sites=["attention.output", "x"]), [], "pattern 'x'"),
        (None, APTConfig(sites=[r"layer\.\d\.output"]), [], r"Candidates, .*: vilt.encoder.layer.0.attention.output"),
        (None, DeepPromptConfig(sites=["attention.output"]), [], "layer.0.attention.attention"),
        (two_levels, CONFIGS[1], [], r"APTConfig\(.*\) is already attached to vilt; detach"),
        (own_forward, CONFIGS[0], [], "layer.1.attention.output has a forward of its own"),
        (integer_projection, ClassifierOnlyConfig(), ["dense"], "only floating-point weights can train"),
        (meta_projection, CONFIGS[0], [], "layer.1.attention.output's weight is on the meta device"),
        (meta_projection, ClassifierOnlyConfig(), ["dense"], "layer.1.attention.output.dense.* is on the meta device"),
    ],
)
def test_a_refused_attach_changes_nothing(prepare, config, keep, message):
    model = make_model()
    if prepare:
        prepare(model)
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        petl_ext.attach(model, config, keep)
    assert snapshot(model) == before


def test_what_is_no_model_is_refused():
    with pytest.raises(TypeError, match=r"attach: model must be a torch\.nn\.Module, got str"):
        petl_ext.attach("vilt", CONFIGS[0])


def test_a_compiled_model_is_refused():
    model = make_model()
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"attach: got an OptimizedModule; attach to the model first, then compile it"):
        petl_ext.attach(torch.compile(model, backend="eager"), CONFIGS[0])
    assert snapshot(model) == before


def test_a_part_of_an_attached_model_is_refused():
    model = make_model()
    petl_ext.attach(model, CONFIGS[0])
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"encoder\.layer\.0.* carries 'apt' .* a model around ViltModel; detach\(\)"):
        petl_ext.attach(model.vilt, CONFIGS[2])
    assert snapshot(model) == before


def test_attaching_twice_names_what_is_there():
    model = make_model()
    petl_ext.attach(model, CONFIGS[0])
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"APTConfig\(num_prompts=5.*already attached to the model"):
        petl_ext.attach(model, CONFIGS[1])
    del model.petl_attachment
    with pytest.raises(ValueError, match=r"layer\.0\.attention.output carries 'apt'"):
        petl_ext.attach(model, CONFIGS[0])
    assert snapshot(model)[:3] == before[:3]


def test_an_error_while_attaching_is_undone(monkeypatch):
    model = make_model()
    before, trains = snapshot(model), petl_ext.APTLayer.train
    calls = []

    def refuse(self, mode=True):
        calls.append(1)
        if len(calls) == 2:
            raise MemoryError("no room")
        return trains(self, mode)

    monkeypatch.setattr(petl_ext.APTLayer, "train", refuse)
    with pytest.raises(MemoryError):
        petl_ext.attach(model, CONFIGS[0])
    assert snapshot(model) == before


def test_models_and_arguments_of_the_wrong_kind():
    with pytest.raises(ValueError, match=r"Elsewhere belongs to none of the families.*its modules: linear"):
        petl_ext.attach(Elsewhere(), APTConfig())
    with pytest.raises(ValueError, match=r"matches nothing in Elsewhere.*its modules: linear"):
        petl_ext.attach(Elsewhere(), APTConfig(sites=["linear"]))
    with pytest.raises(TypeError, match="keep must be a list of names, got 'classifier'"):
        petl_ext.attach(make_model(), APTConfig(), keep="classifier")
    with pytest.raises(TypeError, match=r"config must be one of AdapterConfig, APTConfig, .*got 'apt'"):
        petl_ext.attach(make_model(), "apt")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: APTConfig(num_prompts=0), "num_prompts must be a positive integer, got 0"),
        (lambda: APTConfig(rank=2.5), "rank must be a positive integer, got 2.5"),
        (lambda: APTConfig(activation="gelu"), "got 'gelu'"),
        (lambda: APTConfig(dropout=1.0), "got 1.0"),
        (lambda: APTConfig(sites="attention"), "got 'attention'"),
        (lambda: APTConfig(sites=[]), r"got \[\]"),
        (lambda: APTConfig(sites=["(?i)output"]), "not at the start"),
        (lambda: APTConfig(sites=["("]), r"'\(' is not a regular expression"),
        (lambda: DeepPromptConfig(num_prompts=-1), "num_prompts must be a positive integer, got -1"),
        (lambda: DeepPromptConfig(num_prompts=True), "got True"),
    ],
)
def test_a_configuration_refuses_bad_values(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_attaching_inside_data_parallel_is_refused():
    model = torch.nn.DataParallel(make_model())
    with pytest.raises(ValueError, match="got a DataParallel; attach to the model first"):
        petl_ext.attach(model, CONFIGS[0])


def another_head(model):
    model.classifier = torch.nn.Linear(32, 3)


def compiled_inside(model):
    model.vilt = torch.compile(model.vilt, backend="eager")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (another_head, r"6 tensors are gone from .*, such as classifier\.0"),
        (compiled_inside, r"8 tensors are gone from .*, such as vilt.*\.apt\."),
    ],
)
def test_an_incomplete_folder_is_not_written(change, message, tmp_path):
    model = make_model()
    attachment = petl_ext.attach(model, APTConfig(num_prompts=5), keep=["classifier"])
    change(model)
    with pytest.raises(RuntimeError, match=f"save: {message}.*; a module there"):
        attachment.save(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_a_replaced_site_is_named():
    model = make_model()
    attachment = petl_ext.attach(model, APTConfig(num_prompts=5))
    attention = model.vilt.encoder.layer[1].attention
    output, attention.output = attention.output, torch.nn.Identity()
    before = snapshot(model)
    for leave in (attachment.detach, attachment.disable().__enter__):
        with pytest.raises(RuntimeError, match=r"layer.1.attention.output, which carries .* replaced by a Identity"):
            leave()
        assert snapshot(model) == before
    attention.output = output
    assert all(row.kernel != "none" for row in attachment.report().rows)
