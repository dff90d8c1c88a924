"""MACs of models, counted by hand, under every implementation of attention, and whatever their modules do."""

import pytest
import tiny_meter
import torch
import torch.nn.functional as F
from tiny_vilt import CONFIGS, TOKENS, make_inputs, make_model
from torch import nn
from torch.nn.modules import module as torch_modules
from torch_macs import counted_macs
from transformers import (
    BertConfig,
    BertModel,
    CLIPConfig,
    CLIPModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    ViltConfig,
)
from transformers.models.vilt.modeling_vilt import ViltLayer

import petl_ext
from petl_ext import AdapterLayer, APTLayer
from petl_ext.counting import count_macs
from petl_ext.models import MeterForImageAndTextRetrieval


class Attention(nn.Module):
    """Grouped: 4 heads ask 2."""

    def forward(self, query, memory):
        return F.scaled_dot_product_attention(query, memory, memory, is_causal=True, enable_gqa=True)


class FusedAttention(nn.Module):
    """What `Attention` runs on a GPU."""

    def __init__(self, op, *options):
        super().__init__()
        self.op, self.options = op, options

    def forward(self, query, memory):
        return self.op(query, memory, memory, *self.options)


class Vector(nn.Module):
    """Products with vectors: one by a matrix, one of two vectors, one added to something."""

    def forward(self, matrix, vector, added):
        return torch.addmv(added, matrix, vector) @ (matrix @ vector)


ENCODER_MACS = 2 * (4 * 5 * 8**2 + 2 * 5**2 * 8 + 2 * 5 * 8 * 16)
HAND_COUNTED = {
    "linear": (nn.Linear(8, 3), torch.randn(2, 5, 8), 2 * 5 * 8 * 3),
    "patches": (nn.Conv2d(3, 7, 4, stride=4), torch.randn(2, 3, 8, 8), 2 * 4 * 7 * 3 * 4**2),
    "grouped convolution": (nn.Conv2d(4, 4, 3, padding=1, groups=4), torch.randn(1, 4, 8, 8), 8**2 * 4 * 3**2),
    "attention": (Attention(), (torch.randn(3, 4, 5, 8), torch.randn(3, 2, 6, 8)), 2 * 3 * 4 * 5 * 6 * 8),
    "multi-head": (nn.MultiheadAttention(8, 2), (torch.randn(5, 1, 8),) * 3, 4 * 5 * 8**2 + 2 * 5**2 * 8),
    "encoder": (
        nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), num_layers=2),
        torch.randn(1, 5, 8),
        ENCODER_MACS,
    ),
    "vectors": (Vector(), (torch.randn(5, 8), torch.randn(8), torch.randn(5)), 2 * 5 * 8 + 5),
    "norm": (nn.LayerNorm(8), torch.randn(2, 8), 0),
    "adapter": (AdapterLayer(8, 3), torch.randn(2, 5, 8), 2 * 10 * 8 * 3),
    "apt": (APTLayer(8, 3, 2), (torch.randn(2, 5, 8),) * 2, 2 * 10 * 8 * 3 + 2 * 3 * 2 * 8),
}


FUSED_ATTENTION = {
    "flash": FusedAttention(torch.ops.aten._scaled_dot_product_flash_attention),
    "efficient": FusedAttention(torch.ops.aten._scaled_dot_product_efficient_attention, None, False),
    "cudnn": FusedAttention(torch.ops.aten._scaled_dot_product_cudnn_attention, None, False),
}


@pytest.mark.parametrize("op", FUSED_ATTENTION)
def test_fused_attention_with_shared_keys(op):
    query, memory = torch.empty(3, 4, 5, 8, device="meta"), torch.empty(3, 2, 6, 8, device="meta")
    assert count_macs(FUSED_ATTENTION[op], (query, memory)).total == 2 * 3 * 4 * 5 * 6 * 8


@pytest.mark.parametrize("case", HAND_COUNTED)
@pytest.mark.parametrize("training", [False, True])
def test_hand_counted_models(case, training):
    model, inputs, macs = HAND_COUNTED[case]
    model.train(training)
    first, second = count_macs(model, inputs), count_macs(model, inputs)
    assert first.total == second.total == first.of("") == macs


SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48, "vocab_size": 50}
TOKEN_IDS = torch.arange(1, 15).view(2, 7)
MASKED = {"input_ids": TOKEN_IDS, "attention_mask": (TOKEN_IDS < 12).long()}
HUGGING_FACE = {
    "bert": (BertModel, BertConfig(**SIZES), MASKED),
    "llama": (LlamaForCausalLM, LlamaConfig(**SIZES, num_key_value_heads=2), MASKED),
    "t5": (
        T5ForConditionalGeneration,
        T5Config(d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, vocab_size=50),
        {**MASKED, "decoder_input_ids": TOKEN_IDS[:, :3]},
    ),
    "clip": (
        CLIPModel,
        CLIPConfig(
            text_config={**SIZES, "bos_token_id": 1, "eos_token_id": 2},
            vision_config={**SIZES, "image_size": 16, "patch_size": 8},
            projection_dim=16,
        ),
        {**MASKED, "pixel_values": torch.randn(2, 3, 16, 16)},
    ),
}


@pytest.mark.parametrize("family", HUGGING_FACE)
def test_every_implementation_of_attention_counts_the_same(family):
    model_class, config, inputs = HUGGING_FACE[family]
    eager, sdpa = (
        count_macs(model_class._from_config(config, attn_implementation=implementation), inputs)
        for implementation in ("eager", "sdpa")
    )
    assert eager.total > 0
    assert eager == sdpa


def test_a_bert_counts_by_hand():
    model_class, config, inputs = HUGGING_FACE["bert"]
    count = count_macs(model_class(config), inputs)
    layer = 2 * (4 * 7 * 32**2 + 2 * 7**2 * 32 + 2 * 7 * 32 * 48)
    assert [count.of(f"encoder.layer.{i}") for i in (0, 1)] == [layer, layer]
    assert count.of("encoder.layer") == count.of("encoder") == 2 * layer
    assert count.of("embeddings") == 0
    assert count.of("pooler") == count.of("pooler.dense") == 2 * 32**2
    assert count.total == count.of("encoder") + count.of("pooler")


def test_a_block_of_a_vilt_of_published_size():
    with torch.device("meta"):
        block, hidden_states = ViltLayer(ViltConfig()), torch.empty(1, 241, 768)
    count = count_macs(block, hidden_states)
    assert count.total == 12 * 241 * 768**2 + 2 * 241**2 * 768
    assert round(count.total / 1e9, 3) == 1.795
    assert count.total == sum(count.of(child) for child in ("attention", "intermediate", "output"))


@pytest.mark.parametrize("config", CONFIGS[:2], ids=lambda config: config.method)
def test_what_is_attached_counts(config):
    model = make_model()
    inputs = make_inputs(model, batch=1)
    attachment = petl_ext.attach(model, config)
    count = count_macs(model, inputs)
    with attachment.disable():
        bare = count_macs(model, inputs)
    assert sum(count.of(site) - bare.of(site) for site in attachment.sites) == count.total - bare.total
    assert count.total - bare.total == attachment.report(TOKENS).macs


class Shared(nn.Module):
    """`one` is also called `other` and runs twice, `outer` runs inside itself, `idle` not at all."""

    def __init__(self):
        super().__init__()
        self.one = nn.Linear(4, 4)
        self.other = self.one
        self.outer = Outer()
        self.idle = nn.Linear(4, 4)

    def forward(self, x):
        return self.outer(self.other(self.one(x)), calls=3)


class Outer(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x, calls):
        return self.inner(self(x, calls=calls - 1) if calls > 1 else x)


def test_modules_with_two_names_or_many_calls():
    count = count_macs(Shared(), torch.randn(2, 4))
    linear = 2 * 4**2
    assert count.of("one") == count.of("other") == 2 * linear
    assert count.of("outer") == count.of("outer.inner") == 3 * linear
    assert count.of("idle") == 0
    assert count.total == 5 * linear


class Unentered(nn.Module):
    """Runs its parts by methods other than forward, or piece by piece."""

    def __init__(self):
        super().__init__()
        self.pieces = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.ReLU()))
        self.encoder = Encoder()
        self.idle = nn.Sequential(nn.Linear(4, 4))

    def forward(self, x):
        for piece in self.pieces:
            x = piece(x)
        return self.encoder.encode(x)


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 3)

    def encode(self, x):
        return self.linear(x)


def test_modules_whose_forward_does_not_run():
    count = count_macs(Unentered(), torch.randn(2, 4))
    linear = 2 * 4**2
    assert count.of("pieces") == 2 * linear
    assert count.of("pieces.1") == linear
    assert count.of("encoder") == 2 * 4 * 3
    assert count.of("idle") == count.of("idle.0") == 0
    assert count.total == 2 * linear + 2 * 4 * 3


def test_a_meter_that_reads_several_texts():
    model = tiny_meter.make_model(MeterForImageAndTextRetrieval)
    inputs = tiny_meter.make_inputs(model)
    texts = {name: torch.stack([inputs[name]] * 3, dim=1) for name in ("input_ids", "attention_mask")}
    count = count_macs(model, inputs | texts)
    assert count.of("rank_output") == 2 * 3 * 2 * tiny_meter.DIM
    assert count.of("meter") == count.total - count.of("rank_output")


class Hesitant(nn.Module):
    """Goes on where its first child fails."""

    def __init__(self):
        super().__init__()
        self.fails, self.works = Fails(), nn.Linear(4, 4)

    def forward(self, x):
        try:
            return self.fails(x)
        except ArithmeticError:
            return self.works(x)


class Fails(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x):
        self.linear(x)
        raise ArithmeticError("after a product")


def test_a_failure_inside_the_model_is_left_behind():
    count = count_macs(Hesitant(), torch.randn(2, 4))
    assert (count.of("fails"), count.of("works"), count.total) == (32, 32, 64)


class Restless(nn.Module):
    """Has all that a forward pass could change."""

    def __init__(self, error=None):
        super().__init__()
        self.norm = nn.BatchNorm1d(4)
        self.dropout = nn.Dropout(0.5)
        self.frozen = nn.Linear(4, 4).eval()
        self.error = error

    def forward(self, x):
        assert not torch.is_grad_enabled()
        x = self.frozen(self.dropout(self.norm(x))) + torch.rand(4)
        if self.error:
            raise self.error
        return x


@pytest.mark.parametrize("error", [None, RuntimeError("broken"), KeyboardInterrupt()], ids=repr)
@pytest.mark.parametrize("fast_path", [False, True])
def test_the_model_is_left_as_it_was(error, fast_path):
    model, x = Restless(error), torch.randn(2, 4, requires_grad=True)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    random_state = torch.get_rng_state()
    torch.backends.mha.set_fastpath_enabled(fast_path)
    try:
        if error is None:
            count_macs(model, x)
        else:
            with pytest.raises(type(error)):
                count_macs(model, x)
        assert torch.backends.mha.get_fastpath_enabled() is fast_path
    finally:
        torch.backends.mha.set_fastpath_enabled(True)
    assert [model.training, model.norm.training, model.dropout.training, model.frozen.training] == [True] * 3 + [False]
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random_state)
    assert torch.is_grad_enabled()
    assert not torch_modules._global_forward_hooks and not torch_modules._global_forward_pre_hooks
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert counted_macs(lambda: x.detach() @ x.detach().mT) == 2 * 2 * 4


def test_ways_to_give_inputs():
    model, x = nn.Linear(4, 3), torch.randn(2, 4)
    counts = [count_macs(model, inputs) for inputs in (x, (x,), [x], {"input": x})]
    assert counts == counts[:1] * 4
    with pytest.raises(TypeError, match=r"inputs must be a tensor, a tuple, a list or a dict, got int"):
        count_macs(model, 3)


def test_a_count_prints_as_a_table():
    count = count_macs(nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Sequential(nn.Linear(3, 100))), torch.randn(4, 4))
    assert (
        str(count)
        == "module   MACs  share\n0          48   3.8%\n2       1,200  96.2%\n2.0     1,200  96.2%\ntotal   1,248"
    )
    assert "2.0" not in count.table(depth=1)
    assert str(count_macs(nn.ReLU(), torch.randn(2))) == "module  MACs  share\ntotal      0"


@pytest.mark.parametrize(
    ("name", "beside"),
    [("2", "it has 0, 1$"), ("1.5.weight", "1 has 1.0$"), ("0.linear", "0 has no children$")],
)
def test_an_unknown_module_is_refused(name, beside):
    count = count_macs(nn.Sequential(nn.Linear(4, 3), nn.Sequential(nn.ReLU())), torch.randn(2, 4))
    with pytest.raises(ValueError, match=rf"no module '{name}'; {beside}"):
        count.of(name)
