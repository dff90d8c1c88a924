"""Which layers can be skipped: chosen by sites, layers of one's own, and what is refused."""

import dataclasses

import pytest
import torch
from skipping_checks import attached
from tiny_families import DIM, make_model
from tiny_vilt import snapshot
from transformers import BertConfig, BertModel

import petl_ext
from petl_ext import APTConfig, DASConfig


def test_sites_choose_the_layers_that_can_be_skipped():
    model = make_model("vilt")
    attachment = petl_ext.attach(model, DASConfig(bottleneck=4, sites=[r"layer\.[12]"]))
    assert attachment.layers == ("vilt.encoder.layer.1", "vilt.encoder.layer.2")
    assert len(attachment.sites) == 4
    attachment.skip(["vilt.encoder.layer.2"])
    assert attachment.skipped == (1,)


def test_an_unknown_family_by_its_sites():
    bert = BertModel(BertConfig(vocab_size=50, hidden_size=DIM, num_hidden_layers=3, num_attention_heads=4)).eval()
    bert.config.model_type = "my_bert"
    with pytest.raises(ValueError, match=r"none of the families with sites for das, .*Candidates, layers.*layer\.0"):
        petl_ext.attach(bert, DASConfig())
    attachment = petl_ext.attach(bert, DASConfig(sites=[r"encoder\.layer\.\d"]))
    assert attachment.layers == tuple(f"encoder.layer.{index}" for index in range(3))
    assert bert.encoder.layer[0].bypass.down.shape == (192, DIM)
    attachment.skip([0, 2])
    assert bert(input_ids=torch.ones(1, 4, dtype=torch.long)).last_hidden_state.shape == (1, 4, DIM)


class HandMade(torch.nn.Module):
    """A layer of a model of one's own, whose first norm is that of a head."""

    def __init__(self):
        super().__init__()
        self.head_norm = torch.nn.LayerNorm(8)
        self.norm = torch.nn.LayerNorm(DIM)
        self.project = torch.nn.Linear(DIM, DIM)

    def forward(self, hidden_states) -> torch.Tensor:
        return hidden_states + self.project(self.norm(hidden_states))


class Silent(HandMade):
    def forward(self, hidden_states):
        return (super().forward(hidden_states),)


class Normless(torch.nn.Linear):
    def forward(self, hidden_states) -> torch.Tensor:
        return super().forward(hidden_states)


def test_layers_of_ones_own_must_say_what_they_return():
    model = torch.nn.Module()
    model.layers = torch.nn.ModuleList(HandMade() for _ in range(3))
    attachment = petl_ext.attach(model, DASConfig(sites=[r"layers\.\d"], bypass_bottleneck=4, skip=[0]))
    assert model.layers[0].bypass.down.shape == (4, DIM)
    assert model.layers[0](torch.randn(2, 3, DIM)).shape == (2, 3, DIM)
    attachment.detach()
    model.layers[1] = Silent()
    with pytest.raises(ValueError, match=r"pattern 'layers.1'. Candidates, .*declared -> torch.Tensor.*: layers.0, "):
        petl_ext.attach(model, DASConfig(sites=["layers.0", "layers.1"]))
    model.layers[1] = Normless(DIM, DIM)
    with pytest.raises(ValueError, match=r"attach: layers.1: Normless holds no norm"):
        petl_ext.attach(model, DASConfig(sites=[r"layers\.\d"]))


def test_parts_of_a_layer_are_no_layers():
    model = make_model("t5")
    before = snapshot(model)
    with pytest.raises(
        ValueError, match=r"matches nothing in T5.*Candidates, layers .*encoder.block.0, encoder.block.1"
    ):
        petl_ext.attach(model, DASConfig(sites=[r"layer\.\d+"]))
    assert snapshot(model) == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bottleneck": -1}, "bottleneck must be a positive integer, or 0, got -1"),
        ({"bypass_bottleneck": 0}, "bypass_bottleneck must be a positive integer or None, got 0"),
        ({"skip": [-1]}, r"skip must be a list of the layers' indices, got \[-1\]"),
        ({"skip": 3}, "skip must be a list of the layers' indices, got 3"),
        ({"permanent": True}, "permanent must be False, or True with layers in skip, got True"),
        ({"activation": "tanh"}, "activation must be"),
        ({"sites": ["("]}, "not a regular expression"),
    ],
)
def test_a_wrong_configuration_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        DASConfig(**options)


def test_wrong_layers_are_refused_and_change_nothing():
    _, attachment = attached("vilt")
    attachment.skip([1])
    for wrong in ([3], [-1], ["vilt.encoder.layer.9"], [True], [1.0]):
        with pytest.raises(ValueError, match="must be indices below 3 or names of layers, got"):
            attachment.skip(wrong)
    for wrong in (1, "vilt.encoder.layer.1"):
        with pytest.raises(ValueError, match="must be a list of indices or names of layers, got"):
            attachment.skip(wrong)
    assert attachment.skipped == (1,)
    attachment.skip([])
    with pytest.raises(ValueError, match="none of the 3 layers is skipped"):
        attachment.remove_skipped()
    with attachment.disable(), pytest.raises(RuntimeError, match="skip: the attachment is disabled"):
        attachment.skip([1])
    fresh = make_model("vilt")
    before = snapshot(fresh)
    with pytest.raises(ValueError, match="must be indices below 3"):
        petl_ext.attach(fresh, DASConfig(skip=[7]))
    assert snapshot(fresh) == before
    with pytest.raises(ValueError, match="nothing in ViltForQuestionAnswering with the pattern 'nowhere'"):
        petl_ext.attach(fresh, DASConfig(sites=["nowhere"]))
    assert snapshot(fresh) == before


def test_a_configuration_can_skip_from_the_start():
    model = make_model("vilt")
    attachment = petl_ext.attach(model, DASConfig(bottleneck=4, skip=[2, 0, 2]))
    assert attachment.skipped == (0, 2)
    removed = make_model("vilt")
    config = dataclasses.replace(attachment.config, permanent=True)
    assert petl_ext.attach(removed, config).config == config
    assert not hasattr(removed.vilt.encoder.layer[0], "attention")


def test_a_skipping_model_takes_no_second_attachment():
    model, _ = attached("vilt")
    with pytest.raises(ValueError, match="already attached"):
        petl_ext.attach(model, APTConfig())
