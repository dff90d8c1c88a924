"""What is known about the kernels is known once, is true, and is known of an op that joins."""

import re

import problems
import pytest
import torch
from gpu.steps import steps
from ops_called import OpsCalled
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from petl_ext import AdapterLayer, APTLayer, VisualPromptLayer, cli, counting, ops
from petl_ext.attaching.sites.site import fused_kernel
from petl_ext.ops import cpu_path, kernels
from petl_ext.ops.adapter import ACTIVATIONS as ADAPTER_ACTIVATIONS
from petl_ext.ops.apt import ACTIVATIONS as APT_ACTIVATIONS

every_op = pytest.mark.parametrize("op", list(kernels.OPS))


def test_there_is_one_list_of_ops(tmp_path):
    public = {name.removesuffix("_reference") for name in ops.__all__ if name.endswith("_reference")}
    assert kernels.OPS.keys() == public == problems.OPS.keys()
    (op_tests,) = [step for step in steps(tmp_path / "counters.txt") if step.name == "op tests"]
    named = re.findall(r"test_(\w+)\.py", " ".join(map(str, op_tests.commands[0])))
    assert named == sorted([*public, "dropout", "every_op"])


@every_op
def test_who_computes_and_why(op):
    kernel_for = kernels.kernel_for
    assert kernel_for(op, "cpu", torch.float32) == (f"{op} (cpu, {cpu_path()})", "")
    assert kernel_for(op, torch.device("cpu"), torch.float16).reason == ""
    assert kernel_for(op, "cpu", torch.float64) == ("reference", "float64")
    with_dropout = (
        ("reference", "dropout 0.25 in training") if op == "attention_pool" else kernel_for(op, "cpu", torch.float32)
    )
    assert kernel_for(op, "cpu", torch.float32, dropout=0.25) == with_dropout
    for device in ("mps:1", "meta"):
        expected = f"this build holds no kernel for {device.partition(':')[0]}"
        assert kernel_for(op, device, torch.float32) == ("none", expected)


def test_an_unknown_op_is_refused():
    with pytest.raises(ValueError, match='op must be "adapter", "apt" or "attention_pool", got \'lora\''):
        kernels.kernel_for("lora", "cpu", torch.float32)


@every_op
def test_the_limits_of_cuda_are_those_of_the_docstring_and_bound_the_kernel(op, monkeypatch):
    monkeypatch.setattr(kernels, "_HELD", {("native", op, "cuda")})
    multiple, width, inner = kernels.OPS[op].cuda_limits
    stated = r"On CUDA, D is a multiple of (\d+) up to (\d+) and [PBH] at most (\d+)"
    assert re.search(stated, getattr(ops, op).__doc__).groups() == (str(multiple), str(width), str(inner))

    def reason(*sizes):
        return kernels.kernel_for(op, "cuda", torch.float32, sizes=sizes).reason

    assert reason(width, inner) == reason(multiple, 1) == "" == kernels.kernel_for(op, "cuda", torch.float32).reason
    for sizes in ((width, inner + 1), (width + multiple, 1), (width - 1, 1)):
        assert reason(*sizes) == f"the CUDA kernel does not take a width of {sizes[0]} with {sizes[1]}"


def call(op, dropout=0.0, activation=None):
    """A small call of an op or of its reference."""
    x = torch.randn(2, 7, 16, generator=torch.Generator().manual_seed(0))
    named = {"activation": activation} if activation else {}
    if op.startswith("apt"):
        return getattr(ops, op)(x, 2 * x, x[0], 3 * x[0], x[0, 0, :1], dropout=dropout, **named)
    if op.startswith("adapter"):
        weights = (x[0], x[0, :, 0], x[1].T, x[1, 0])
        return getattr(ops, op)(x, *weights, residual=x, dropout=dropout, **named)
    return getattr(ops, op)(x, x[:, :3], dropout=dropout)


def test_attention_pool_drops_out_by_its_reference():
    torch.manual_seed(0)
    with OpsCalled() as called:
        dropped = call("attention_pool", 0.5)
    assert called.names == []
    torch.manual_seed(0)
    assert torch.equal(dropped, call("attention_pool_reference", 0.5))
    with OpsCalled() as called:
        assert not torch.equal(dropped, call("attention_pool"))
    assert called.names == ["attention_pool"]


@pytest.mark.parametrize("op", ["apt", "adapter"])
def test_a_kernel_drops_out_where_no_reference_was_asked_for(op):
    with OpsCalled() as called:
        call(op, 0.5)
    assert called.names == [op]
    torch.manual_seed(0)
    with OpsCalled() as called, ops.backend("reference"):
        dropped = call(op, 0.5)
    assert called.names == []
    torch.manual_seed(0)
    assert torch.equal(dropped, call(f"{op}_reference", 0.5))


@every_op
@pytest.mark.parametrize("dropout", [-0.1, 1.0, float("nan"), "0.1"])
def test_a_dropout_that_is_no_probability_is_refused(op, dropout):
    with pytest.raises(ValueError, match=rf"{op}: dropout must lie in \[0, 1\), got {dropout!r}"):
        call(op, dropout)


@pytest.mark.parametrize(("op", "known"), [("apt", APT_ACTIVATIONS), ("adapter", ADAPTER_ACTIVATIONS)])
def test_the_kernels_know_the_same_activations(op, known):
    for activation in known:
        with OpsCalled() as called:
            call(op, activation=activation)
        assert called.names == [op]
    messages = []
    for choice in ("native", "reference"):
        with ops.backend(choice), pytest.raises(RuntimeError) as refused:
            call(op, activation="tanh")
        messages.append(str(refused.value))
    assert messages[0] == messages[1] and all(name in messages[0] for name in known)


LAYERS = {
    "apt": lambda layer, x: layer(x, x),
    "adapter": lambda layer, x: layer(x),
    "attention_pool": lambda layer, x: layer(x, x[:, 0]),
}


@pytest.mark.parametrize(
    ("op", "layer"),
    [
        ("apt", APTLayer(16, num_prompts=5, dropout=0.3)),
        ("adapter", AdapterLayer(16, 6, dropout=0.3)),
        ("attention_pool", VisualPromptLayer(16, 4, dropout=0.3)),
    ],
)
def test_layers_drop_out_in_training_only(op, layer):
    for training in (True, False):
        by_reference = training and op == "attention_pool"
        with OpsCalled() as called:
            outs = [LAYERS[op](layer.train(training), torch.ones(2, 7, 16)) for _ in range(2)]
        assert torch.equal(*outs) == (not training)
        assert called.names == ([] if by_reference else [op, op])
        assert (fused_kernel(op, layer).reason == "") == (not by_reference)


# An op that joins: out = x weight^T, on the CPU.
class Toy(nn.Module):
    dropout = 0.0

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3, 4))


@pytest.fixture
def toy():
    """The raw ops live as long as `library`; our registries forget them."""
    library = torch.library.Library("petl_ext", "FRAGMENT")
    registries = (kernels.OPS, kernels._HELD, counting._FORMULAS)
    before = [registry.copy() for registry in registries]
    library.define("toy_forward(Tensor x, Tensor weight) -> Tensor")
    library.define("toy_backward(Tensor dout, Tensor x, Tensor weight) -> (Tensor, Tensor)")
    library.impl("toy_forward", lambda x, weight: x @ weight.mT, "CPU")
    library.impl("toy_backward", lambda dout, x, weight: (dout @ weight, dout.mT @ x), "CPU")
    kernels.register(
        "toy",
        lambda x, weight, **_: 2 * x[0] * weight[0] * weight[1],
        lambda dout, x, weight, **_: 4 * x[0] * weight[0] * weight[1],
    )
    yield
    for registry, entries in zip(registries, before, strict=True):
        registry.clear()
        registry.update(entries)
    library._destroy()


def test_an_op_that_joins_is_known_everywhere(toy):
    assert kernels.held_kernels("toy") == [("native", "cpu")] and kernels.OPS["toy"].cuda_limits is None
    assert "kernels: toy on CPU\n" in cli.info()
    assert kernels.kernel_for("toy", "cpu", torch.float32) == (f"toy (cpu, {cpu_path()})", "")
    assert fused_kernel("toy", Toy()) == (f"toy (cpu, {cpu_path()})", "")  # what a report of `attach` asks
    assert fused_kernel("toy", Toy().double()) == ("reference", "float64")
    assert kernels.kernel_for("toy", "cuda", torch.float32).reason == "this build holds no kernel for cuda"
    raw_ops = torch.ops.petl_ext
    x, weight = torch.ones(5, 4), torch.ones(3, 4)
    assert kernels.raw_ops_for("toy", (x, weight)) == "petl_ext"
    with pytest.raises(NotImplementedError, match=r"petl_ext\.ops\.toy: this build holds no kernel for meta"):
        raw_ops.toy_forward(x.to("meta"), weight.to("meta"))
    counting.register_flop_formulas()
    with FlopCounterMode(display=False) as counter:
        raw_ops.toy_backward(raw_ops.toy_forward(x, weight), x, weight)
    assert counter.get_total_flops() == 6 * 5 * 3 * 4
