"""Which attentions and MLPs end in a projection, which only look so, and families of one's own."""

import pytest
import torch
from diffusers.models.attention_processor import Attention as DiffusersAttention
from tiny_families import make_model
from tiny_vilt import randomize, snapshot
from torch import nn

import petl_ext
from petl_ext import AdapterConfig, APTConfig, DASConfig
from petl_ext.attaching.families import FAMILIES, Family
from petl_ext.ops import apt_reference

DIM = 8


class Attention(nn.Module):
    def __init__(self, output="out_proj"):
        super().__init__()
        for name in ("q_proj", "k_proj", "v_proj", output):
            setattr(self, name, nn.Linear(DIM, DIM))
        self.output = output

    def forward(self, hidden_states):
        query, key, value = (project(hidden_states) for project in (self.q_proj, self.k_proj, self.v_proj))
        weights = (query @ key.mT).softmax(-1)
        return getattr(self, self.output)(weights @ value), weights


class MLP(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(DIM, 2 * DIM), nn.GELU(), nn.Linear(2 * DIM, DIM)

    def forward(self, x):
        return self.fc2(self.act(self.fc1(x)))


class PreNormBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention, self.mlp = Attention(), MLP()

    def forward(self, hidden_states):
        hidden_states = hidden_states + self.attention(hidden_states=hidden_states)[0]
        return hidden_states + self.mlp(hidden_states)


class PreNormModel(nn.Module):
    """A model with attentions and MLPs that end in a projection."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.Sequential(PreNormBlock(), PreNormBlock())

    def forward(self, hidden_states):
        return self.blocks(hidden_states)


class Heads(nn.Module):
    def __init__(self):
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(DIM, DIM) for _ in range(3))

    def forward(self, hidden_states):
        return (self.query(hidden_states) @ self.key(hidden_states).mT).softmax(-1) @ self.value(hidden_states)


class Output(nn.Module):
    def __init__(self):
        super().__init__()
        self.dense, self.dropout, self.LayerNorm = nn.Linear(DIM, DIM), nn.Dropout(0.1), nn.LayerNorm(DIM)

    def forward(self, hidden_states, input_tensor):
        return self.LayerNorm(self.dropout(self.dense(hidden_states)) + input_tensor)


class PostNormBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.Module()
        self.attention.heads, self.attention.output = Heads(), Output()
        self.output = Output()

    def forward(self, hidden_states):
        attended = self.attention.output(self.attention.heads(hidden_states), hidden_states)
        return self.output(attended.tanh(), attended)


class PostNormModel(nn.Module):
    """A model whose attentions end in small output modules."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.Sequential(PostNormBlock(), PostNormBlock())

    def forward(self, hidden_states):
        return self.blocks(hidden_states)


TABLES = {
    PreNormModel: {
        "apt": r"blocks\.\d+\.attention",
        "sequential_adapter": r"blocks\.\d+\.(attention|mlp)",
        "parallel_adapter": r"blocks\.\d+\.attention",
    },
    PostNormModel: {
        "apt": r"blocks\.\d+\.attention\.output",
        "sequential_adapter": r"blocks\.\d+\.attention\.output",
        "parallel_adapter": r"blocks\.\d+\.attention\.output",
    },
}
SITES = {PreNormModel: "blocks.{}.attention", PostNormModel: "blocks.{}.attention.output"}


def made(model_class):
    torch.manual_seed(0)
    return model_class().eval()


@pytest.mark.parametrize("model_class", TABLES, ids=lambda model_class: model_class.__name__)
@pytest.mark.parametrize(
    "config", [APTConfig(num_prompts=5), AdapterConfig(bottleneck=3), AdapterConfig(kind="parallel", bottleneck=3)]
)
def test_a_new_family_takes_one_table(config, model_class, monkeypatch, tmp_path):
    monkeypatch.setitem(FAMILIES, model_class.__name__, Family(model_class.__name__, TABLES[model_class]))
    model, x = made(model_class), torch.randn(2, 4, DIM)
    before, output = snapshot(model), model(x)
    attachment = petl_ext.attach(model, config)
    assert {SITES[model_class].format(index) for index in range(2)} <= set(attachment.sites)
    randomize(attachment)
    changed = model(x)
    assert not torch.allclose(changed, output, atol=0.1)
    changed.sum().backward()
    assert all(parameter.grad.any() for parameter in attachment.parameters())
    attachment.save(tmp_path / "saved")
    again = made(model_class)
    petl_ext.load(again, tmp_path / "saved")
    assert torch.equal(again(x), changed)
    attachment.detach()
    assert torch.equal(model(x), output) and snapshot(model) == before
    monkeypatch.delitem(FAMILIES, model_class.__name__)
    with pytest.raises(
        ValueError, match=f"of the family '{model_class.__name__}', but {model_class.__name__} is of None"
    ):
        petl_ext.load(made(model_class), tmp_path / "saved")


def test_what_comes_out_is_the_formula():
    model, x = made(PreNormModel), torch.randn(2, 4, DIM)
    block = model.blocks[0]
    (y, weights), mlp = block.attention(x), block.mlp(x)
    attachment = petl_ext.attach(model, APTConfig(num_prompts=5, sites=["attention"]))
    randomize(attachment)
    apt = block.attention.apt
    expected = apt_reference(x, y, apt.prompts, apt.keys(), apt.log_scale)
    for output in (block.attention(x), block.attention(hidden_states=x)):
        assert torch.equal(output[1], weights)
        torch.testing.assert_close(output[0], expected)
    attachment.detach()
    attachment = petl_ext.attach(model, AdapterConfig(bottleneck=3, sites=["mlp"]))
    adapter = block.mlp.adapter
    expected = mlp + (mlp @ adapter.down.T + adapter.down_bias).relu() @ adapter.up.T + adapter.up_bias
    torch.testing.assert_close(block.mlp(x), expected)
    attachment.detach()
    attachment = petl_ext.attach(model, AdapterConfig("parallel", 3, scale=2.0, layer_norm=False, sites=["mlp"]))
    adapter = block.mlp.adapter
    added = (x @ adapter.down.T + adapter.down_bias).relu() @ adapter.up.T + adapter.up_bias
    torch.testing.assert_close(block.mlp(x), mlp + 2 * added)


class TwoStreams(Attention):
    def forward(self, query, key):
        return query + key


def with_child(name, child):
    def make():
        attention = Attention()
        setattr(attention, name, child())
        return attention

    return make


def of_diffusers(**options):
    return lambda: DiffusersAttention(DIM, heads=2, dim_head=4, **options)


LAST = "must be its last step"
ALMOST = {
    "gate": (with_child("gate", lambda: nn.Linear(DIM, DIM)), rf"out_proj {LAST}, but gate.weight, gate.bias may come"),
    "scalar gate": (with_child("gate", lambda: nn.Parameter(torch.ones(1))), rf"out_proj {LAST}, but gate may come"),
    "norm": (with_child("norm", lambda: nn.LayerNorm(DIM)), rf"out_proj {LAST}, but norm.weight, norm.bias may come"),
    "norm without weights": (
        with_child("norm", lambda: nn.LayerNorm(DIM, elementwise_affine=False)),
        rf"out_proj {LAST}, but norm.weight, norm.bias may come",
    ),
    "dropout": (with_child("drop", lambda: nn.Dropout(0.1)), rf"out_proj {LAST}, but the dropout drop may come behind"),
    "width": (
        with_child("out_proj", lambda: nn.Linear(DIM, 12)),
        "out_proj must give the width.* q_proj takes, 8, got 12",
    ),
    "arguments": (TwoStreams, r"its forward must take hidden_states first, got \(self, query, key\)"),
    "residual": (of_diffusers(residual_connection=True), rf"to_out.0 {LAST}, but a residual may come behind"),
    "factor": (of_diffusers(rescale_output_factor=2.0), rf"to_out.0 {LAST}, but a factor may come behind"),
    "group norm": (of_diffusers(norm_num_groups=2), rf"to_out.0 {LAST}, but group_norm.weight, group_norm.bias may"),
    "two texts": (of_diffusers(added_kv_proj_dim=DIM), rf"to_out.0 {LAST}, but add_k_proj.weight"),
    "diffusers' dropout": (of_diffusers(dropout=0.1), rf"to_out.0 {LAST}, but the dropout to_out.1 may come behind"),
}


@pytest.mark.parametrize(("make", "message"), ALMOST.values(), ids=ALMOST)
def test_what_almost_is_a_site_is_refused_with_the_reason(make, message):
    model = nn.ModuleDict({"good": Attention(), "bad": make()})
    before = snapshot(model)
    for sites in (["good", "bad"], [".*"]):
        with pytest.raises(ValueError, match=f"attach: bad: .*{message}"):
            petl_ext.attach(model, APTConfig(sites=sites))
        assert snapshot(model) == before
    with pytest.raises(ValueError, match=r"Candidates, .*: good$"):
        petl_ext.attach(model, APTConfig(sites=["other"]))
    with pytest.raises(ValueError, match=f"It has no .*; what looks like one: bad: .*{message}"):
        petl_ext.attach(nn.ModuleDict({"bad": make()}), APTConfig(sites=["other"]))


class SummedOutput(Output):
    """RoBERTa-PreLayerNorm's."""

    def __init__(self):
        super().__init__()
        del self.LayerNorm

    def forward(self, hidden_states, input_tensor):
        return self.dropout(self.dense(hidden_states)) + input_tensor


class OtherNormOutput(SummedOutput):
    """TVP's."""

    def __init__(self):
        super().__init__()
        self.layer_norm = nn.LayerNorm(DIM)

    def forward(self, hidden_states, input_tensor):
        return self.layer_norm(super().forward(hidden_states, input_tensor))


class GatedOutput(Output):
    def forward(self, hidden_states, input_tensor):
        return self.LayerNorm(self.dropout(self.dense(hidden_states).tanh()) + input_tensor)


@pytest.mark.parametrize("output", [SummedOutput, OtherNormOutput, GatedOutput])
@pytest.mark.parametrize("config", [APTConfig, AdapterConfig])
def test_an_output_module_with_other_steps_is_refused(output, config):
    model = made(PostNormModel)
    model.blocks[1].attention.output = output()
    before = snapshot(model)
    message = r"attach: blocks.1.attention.output: the forward of \w+Output must be dense, dropout.*, and nothing else"
    with pytest.raises(ValueError, match=message):
        petl_ext.attach(model, config(sites=[r"attention.output"]))
    assert snapshot(model) == before


def test_two_methods_on_one_site():
    model = made(PreNormModel)
    petl_ext.attach(model, APTConfig(num_prompts=5, sites=["attention"]))
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"APTConfig\(.* is already attached to the model; detach\(\) it first"):
        petl_ext.attach(model, AdapterConfig(sites=["attention"]))
    assert snapshot(model) == before
    del model.petl_attachment
    with pytest.raises(ValueError, match=r"blocks.0.attention carries .apt. of what is attached to a model around"):
        petl_ext.attach(model, AdapterConfig(sites=["attention"]))
    assert snapshot(model)[:3] == before[:3]


def test_a_gated_mlp_is_no_site():
    model = made(PreNormModel)
    model.blocks[1].mlp.gate = nn.Parameter(torch.ones(1))
    with pytest.raises(ValueError, match=rf"attach: blocks.1.mlp: fc2 {LAST}, but gate may come behind"):
        petl_ext.attach(model, AdapterConfig(sites=["mlp"]))


def test_a_family_with_another_module_in_one_layer_is_not_attached_to_in_part():
    model = make_model("llama", 2)
    model.model.layers[1].self_attn = nn.Identity()
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"layers\.1\.self_attn, a Identity, stands where APTConfig.* puts a layer"):
        petl_ext.attach(model, APTConfig())
    assert snapshot(model) == before


def test_methods_that_a_family_has_no_sites_for():
    with pytest.raises(ValueError, match=r"UNet2DConditionModel takes no DASConfig: its blocks take the timestep"):
        petl_ext.attach(make_model("unet", 1), DASConfig())
    with pytest.raises(ValueError, match=r"matches nothing in UNet2DConditionModel with the pattern 'down_blocks.0'"):
        petl_ext.attach(make_model("unet", 1), DASConfig(sites=["down_blocks.0"]))
