"""The reasons in `patch`'s report are true of the module: they go by what its parts are, not by names."""

import math

import pytest
import torch
import torch.nn.functional as F
from original_modules import Adapter, Cross_Attention, LibraryAdapter, ParallelAdapter, approximate_prompt
from torch import nn

import petl_ext

DIM = 32


def refusal(module):
    """(kind, reason) of what `petl_ext.patch` leaves alone."""
    with pytest.raises(ValueError) as raised:
        petl_ext.patch(nn.ModuleDict({"it": module}))
    return str(raised.value).split("  it, ")[1].split(": ", 1)


class Pair(nn.Module):
    """AdapterMLP and RepAdapter of LaVIN, by what conv_A and conv_B are."""

    def __init__(self, first, second):
        super().__init__()
        self.conv_A, self.conv_B = first, second

    def forward(self, x):
        return self.conv_B(F.silu(self.conv_A(x)))


PAIRS = {
    "widths": (lambda: Pair(nn.Linear(48, 8), nn.Linear(8, 96)), "its projections are 48 to 8 and 8 to 96"),
    "groups": (
        lambda: Pair(nn.Conv1d(48, 8, 1), nn.Conv1d(8, 48, 1, groups=2)),
        "a projection is Conv1d(8, 48, kernel_size=(1,), stride=(1,), groups=2), neither nn.Linear nor a 1 x 1 "
        "convolution of one group",
    ),
}


@pytest.mark.parametrize(("make", "expected"), PAIRS.values(), ids=PAIRS)
def test_a_pair_is_refused_for_what_it_is(make, expected):
    assert refusal(make()) == ["bottleneck adapter", expected]


def test_other_pairs_are_nothing_that_is_known():
    with pytest.raises(ValueError, match="holds nothing that is known"):
        petl_ext.patch(Pair(nn.Embedding(4, 4), nn.Linear(4, 4)))


class Wrapped(nn.Module):
    """As adapter libraries wrap their activations: its name tells nothing."""

    def __init__(self, function):
        super().__init__()
        self.f = function

    def forward(self, x):
        return self.f(x)


def gelu_new(x):
    return 0.5 * x * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x.pow(3))))


def gelu_fast(x):
    return 0.5 * x * (1.0 + torch.tanh(x * 0.7978845608 * (1.0 + 0.044715 * x * x)))


UNKNOWN = "what it computes between its projections is not relu or gelu or silu"
ACTIVATIONS = {
    "gelu_new": (gelu_new, "its activation computes tanh GELU"),
    "gelu_fast": (gelu_fast, "its activation computes tanh GELU"),
    "torch's": (nn.GELU(approximate="tanh"), "its activation computes tanh GELU"),
    "quick": (lambda x: x * torch.sigmoid(1.702 * x), "its activation computes QuickGELU"),
    "relu6": (nn.ReLU6(), "its activation computes ReLU6"),
    "leaky": (nn.LeakyReLU(), "its activation computes leaky ReLU of slope 0.01"),
    "another slope": (nn.LeakyReLU(0.2), UNKNOWN),
    "clamped late": (lambda x: F.relu(x).clamp(max=100), UNKNOWN),
    "nothing": (nn.Identity(), "its activation computes the identity"),
    "unknown": (torch.sin, UNKNOWN),
    "raises": (lambda x: x.nothing, "its forward raises AttributeError: "),
    "no tensor": (lambda x: None, "its forward raises TypeError: "),
}


@pytest.mark.parametrize(("function", "expected"), ACTIVATIONS.values(), ids=ACTIVATIONS)
def test_the_report_says_what_an_activation_computes(function, expected):
    for make, name in ((lambda: Adapter(DIM), "activation"), (lambda: ParallelAdapter(DIM, 8), "non_linear_func")):
        module = make()
        setattr(module, name, Wrapped(function))
        _, reason = refusal(module)
        assert reason.startswith(expected)
        assert reason.endswith("not relu or gelu or silu") or "raises" in expected


def test_prompts_do_not_know_all_activations():
    module = approximate_prompt(4, DIM, 4, 20)
    module.activation = Wrapped(F.gelu)
    assert refusal(module)[1] == "its activation computes gelu, not relu or softmax"


class Swish(nn.Module):
    """SiLU as long as beta is one."""

    def __init__(self):
        super().__init__()
        self.beta = nn.Parameter(torch.ones(1))

    def forward(self, x):
        return x * torch.sigmoid(self.beta * x)


def test_an_activation_that_trains_is_no_known_one():
    module = Adapter(DIM)
    module.activation = Swish()
    assert refusal(module)[1] == UNKNOWN
    library = LibraryAdapter(DIM, 8)
    library.non_linearity = library.adapter_down[-1] = Swish()
    assert refusal(library)[1] == "what its activation computes depends on its parameters or buffers"


class Counting(nn.ReLU):
    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return super().forward(x)


def test_looking_at_an_activation_leaves_it_as_it_was():
    module = Adapter(DIM)
    module.activation = Counting()
    module.activation.register_forward_hook(pytest.fail)
    assert refusal(module)[1] == "a part carries a hook"
    other = Adapter(DIM)
    other.activation = Counting()
    state = torch.get_rng_state()
    assert refusal(other)[1] == "its forward sets activation.calls"
    other.activation = nn.RReLU()
    assert refusal(other)[1] == UNKNOWN
    assert module.activation.calls == 0 and torch.equal(torch.get_rng_state(), state)


class Linear(nn.Linear):
    """As those that quantize or carry LoRA are called."""


class LayerNorm(nn.LayerNorm):
    pass


class AskingAutocast(Adapter):
    def forward(self, x):
        return super().forward(x.bfloat16() if torch.is_autocast_enabled("cpu") else x)


def changed(module, **attributes):
    for name, value in attributes.items():
        if hasattr(module, name):
            delattr(module, name)
        setattr(module, name, value)
    return module


def with_down(part):
    module = Adapter(DIM)
    module.down_sampler = part
    return module


def library(*layers):
    """With the library's `adapter_down` of these layers and its activation."""
    module = LibraryAdapter(DIM, 8)
    module.adapter_down = nn.Sequential(*layers, module.non_linearity)
    return module


REASONS = {
    "a projection of PyTorch's name": (
        lambda: with_down(Linear(DIM, 4)),
        "a projection is test_patch_reasons.Linear, neither nn.Linear nor a 1 x 1 convolution of one group",
    ),
    "a norm of PyTorch's name": (
        lambda: changed(ParallelAdapter(DIM, 8), adapter_layer_norm_before=LayerNorm(DIM)),
        "its norm is test_patch_reasons.LayerNorm, not nn.LayerNorm(32)",
    ),
    "another sequence": (
        lambda: changed(approximate_prompt(4, DIM, 4, 20), mm=nn.Sequential(nn.Linear(DIM, 4), nn.ReLU())),
        "mm is Sequential(Linear, ReLU), not a Sequential of two Linear",
    ),
    "prompts that are no parameter": (
        lambda: changed(approximate_prompt(4, DIM, 4, 20), mm_tokens=nn.Embedding(20, DIM)),
        "mm_tokens is Embedding(20, 32), not a parameter",
    ),
    "dropout that is a parameter": (
        lambda: changed(approximate_prompt(4, DIM, 4, 20), attn_drop=nn.Parameter(torch.ones(2))),
        "its dropout is a tensor of the shape [2], not nn.Dropout",
    ),
    "the library's sequence": (
        lambda: library(nn.Linear(DIM, 8), nn.Dropout()),
        "adapter_down is Sequential(Linear, Dropout, Activation_Function_Class), not Sequential([LayerNorm,] Linear,",
    ),
    "the library's flag alone": (
        lambda: changed(LibraryAdapter(DIM, 8), add_layer_norm_after=True, adapter_norm_after=nn.LayerNorm(DIM)),
        "it ends in LayerNorm((32,)",
    ),
    "projections that do not fit": (
        lambda: changed(Cross_Attention(DIM, 0.0, 4), linear_k=nn.Linear(16, DIM)),
        "linear_v goes from 32 to 32, linear_k goes from 16 to 32",
    ),
    "what asks for autocast": (lambda: AskingAutocast(DIM), "its forward raises RuntimeError under autocast"),
}


@pytest.mark.parametrize(("make", "reason"), REASONS.values(), ids=REASONS)
def test_reasons_are_true_of_the_parts(make, reason):
    assert reason in refusal(make())[1]


def test_a_flag_of_the_library_without_its_part_is_no_reason():
    module = changed(LibraryAdapter(DIM, 8), add_layer_norm_after=True)
    assert petl_ext.patch(nn.Sequential(module)).report().fused == 1
