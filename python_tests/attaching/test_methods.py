"""A method is one file and a family one record: what is added so is attached, saved and loaded as the others are."""

import sys
from unittest import mock

import pytest
import torch
from tiny_vilt import make_model as make_vilt
from tiny_vilt import randomize, snapshot
from torch import nn

import petl_ext
import petl_ext.attaching.attach
from petl_ext import APTConfig, DASConfig
from petl_ext.attaching import Family, methods, register_family
from petl_ext.attaching.families import FAMILIES, family_of
from petl_ext.attaching.methods.das import SkippableLayer
from petl_ext.models.checkpoints.plan import LAYER_CHILDREN

DIM = 8
SHIFT = '''
"""A vector that is added to what an attention says."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from petl_ext.attaching.methods.config import Config
from petl_ext.attaching.sites.projections import ATTENTIONS, ProjectionSite


class Shift(nn.Module):
    def __init__(self, dim, start, device=None, dtype=None):
        super().__init__()
        self.vector = nn.Parameter(torch.full((dim,), start, device=device, dtype=dtype))


class ShiftedAttention(ProjectionSite):
    child = "shift"
    looked_for = "attentions"
    projections = ATTENTIONS

    def changed(self, x, y):
        return y + self.shift.vector

    @staticmethod
    def macs(layer, tokens):
        return 0

    @staticmethod
    def kernel(layer):
        return "none", "a sum"


@dataclass(frozen=True)
class ShiftConfig(Config):
    method: ClassVar[str] = "shift"
    row: ClassVar[str] = "shift"
    site_classes: ClassVar[dict] = {"shift": (ShiftedAttention,)}
    start: float = 0.5
    sites: tuple[str, ...] | None = None

    def new_layer(self, dim, **factory):
        return Shift(dim, self.start, **factory)
'''


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(DIM, DIM) for _ in range(4))

    def forward(self, hidden_states):
        q, k, v = self.q_proj(hidden_states), self.k_proj(hidden_states), self.v_proj(hidden_states)
        return self.out_proj((q @ k.mT).softmax(-1) @ v)


class Block(nn.Module):
    """Returns a tuple, as many a model's layers do."""

    def __init__(self):
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(DIM), Attention()

    def forward(self, hidden_states, with_depth=False):
        hidden_states = hidden_states + self.attention(self.norm(hidden_states))
        return (hidden_states, torch.ones(())) if with_depth else (hidden_states,)


class Toy(nn.Module):
    def __init__(self, depth=3):
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(depth))

    def forward(self, x):
        depth = torch.zeros(())
        for block in self.blocks:
            x, one = block(x, with_depth=True)
            depth = depth + one
        return x, depth


class SkippableBlock(SkippableLayer):
    def returned(self, hidden_states, with_depth=False):
        return (hidden_states, torch.zeros(())) if with_depth else (hidden_states,)


@pytest.fixture
def toy_family():
    sites = {"shift": r"blocks\.[02]\.attention", "apt": (r"blocks\.2\.attention", r"blocks\.0\.attention")}
    family = Family("Toy", sites | {"bypass": r"blocks\.\d"}, skippable=SkippableBlock)
    with mock.patch.dict(FAMILIES):
        FAMILIES["Toy"] = family
        yield family


@pytest.fixture
def shift_config(tmp_path, monkeypatch):
    """The configuration of a method whose file lies beside those of the package."""
    (tmp_path / "shift.py").write_text(SHIFT)
    monkeypatch.setattr(methods, "__path__", [*methods.__path__, str(tmp_path)])
    with mock.patch.dict(methods.CONFIGS), mock.patch.dict(sys.modules):
        methods.CONFIGS.update(methods.find_configs())
        yield methods.CONFIGS["shift"]


def made(seed=0):
    torch.manual_seed(seed)
    return Toy().eval()


def inputs():
    return torch.randn(2, 5, DIM, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def test_a_method_is_one_file(shift_config, toy_family, tmp_path):
    model, x = made(), inputs()
    before, (expected, _) = snapshot(model), model(x)
    attachment = petl_ext.attach(model, shift_config(start=0.75))
    assert attachment.sites == ("blocks.0.attention", "blocks.2.attention")
    row = attachment.report(tokens=5).rows[1]
    assert (row.layer, row.class_name, row.parameters) == ("blocks.2.attention.shift", "Shift", DIM)
    attention, given = model.blocks[0].attention, x + 1
    with attachment.disable():
        assert torch.equal(model(x)[0], expected)
        plain = attention(given)
    assert torch.equal(attention(given), plain + 0.75)
    randomize(attachment)
    attachment.save(tmp_path / "saved")
    again = made()
    assert petl_ext.load(again, tmp_path / "saved").config == attachment.config
    assert torch.equal(again(x)[0], model(x)[0])
    attachment.detach()
    assert snapshot(model) == before and torch.equal(model(x)[0], expected)


def test_the_files_are_the_list_of_methods(shift_config):
    assert methods.find_configs().keys() == methods.CONFIGS.keys()
    assert {"shift", "apt", "das", "full_tuning"} < methods.CONFIGS.keys()
    assert petl_ext.APTConfig is methods.CONFIGS["apt"]
    with pytest.raises(ValueError, match="adds nothing and keep is empty"):
        petl_ext.attach(made(), petl_ext.ClassifierOnlyConfig())
    with pytest.raises(ValueError, match=r"with sites for shift, so ShiftConfig.* Candidates, attentions: blocks"):
        petl_ext.attach(made(), shift_config())


def test_checkpoints_know_every_layers_name():
    assert {"apt", "adapter", "bypass", "deep_prompts", "class_token"} == LAYER_CHILDREN


@torch.no_grad()
def test_a_family_is_one_record(toy_family, tmp_path):
    """Its layers return tuples; its patterns for APT number the last block first."""
    model, x = made(), inputs()
    apt = petl_ext.attach(model, APTConfig(num_prompts=3))
    assert apt.sites == ("blocks.2.attention", "blocks.0.attention") and apt.family is toy_family
    apt.detach()
    expected = model(x)
    attachment = petl_ext.attach(model, DASConfig(bypass_bottleneck=2, skip=[1]))
    randomize(attachment)
    output, depth = model(x)
    assert depth == 2 and not torch.allclose(output, expected[0], atol=0.01)
    attachment.save(tmp_path / "saved")
    again = made()
    assert petl_ext.load(again, tmp_path / "saved").skipped == (1,)
    assert torch.equal(again(x)[0], output)
    with attachment.disable():
        assert torch.equal(model(x)[0], expected[0])


def test_a_family_is_registered_once():
    with mock.patch.dict(FAMILIES):
        register_family(Family("Toy", {"apt": ("attention",)}))
        assert family_of(made()).name == "Toy" and family_of(nn.Sequential(made(), made())).name == "Toy"
        with pytest.raises(ValueError, match="name must be one that no family has, got 'Toy'"):
            register_family(Family("Toy", {}))
    assert family_of(made()).name is None


@pytest.mark.parametrize(
    ("family", "error", "message"),
    [
        ("Toy", TypeError, "family must be a Family, got str"),
        (Family("vilt", {}), ValueError, "name must be one that no family has, got 'vilt'"),
        (Family(None, {}), ValueError, "name must be one that no family has, got None"),
        (Family("Toy", {"lora": "attention"}), ValueError, r"sites must be for methods of .*apt.*, got 'lora'"),
        (Family("Toy", {"apt": ("attention", "(")}), ValueError, r"'\(' is not a regular expression"),
    ],
)
def test_a_family_that_is_none_is_refused(family, error, message):
    with mock.patch.dict(FAMILIES):
        before = dict(FAMILIES)
        with pytest.raises(error, match=f"register_family: .*{message}" if error is ValueError else message):
            register_family(family)
        assert before == FAMILIES


@pytest.mark.parametrize("config", [APTConfig(num_prompts=3, class_token=True), DASConfig(bottleneck=4, skip=[1])])
def test_a_model_is_asked_once_what_family_it_is_of(config, tmp_path, monkeypatch):
    calls = []

    def counted(model):
        calls.append(model)
        return family_of(model)

    for module in [module for name, module in sys.modules.items() if name.startswith("petl_ext.")]:
        if getattr(module, "family_of", None) is family_of:
            monkeypatch.setattr(module, "family_of", counted)
    model = make_vilt()
    attachment = petl_ext.attach(model, config)
    assert calls == [model]
    attachment.report(tokens=4)
    attachment.save(tmp_path / "saved")
    petl_ext.load(model, tmp_path / "saved")
    assert calls == [model]
    again = make_vilt()
    petl_ext.load(again, tmp_path / "saved")
    assert calls == [model, again]
