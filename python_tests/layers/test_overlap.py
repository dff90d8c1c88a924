"""APT on few rows in two parts: what depends on the attention's input alone is queued before the attention."""

import copy
import pickle
from contextlib import nullcontext

import pytest
import torch
from devices import CUDA_DEVICES, emulation
from tiny_families import make_inputs, make_model, run
from torch import nn

import petl_ext
from petl_ext import APTConfig, APTLayer, ops
from petl_ext.nn.side_stream import SideStream
from petl_ext.ops.apt import begun_apt, packed_apt

ON_CUDA = pytest.mark.parametrize("device", CUDA_DEVICES, ids=str, indirect=True)
DIM = 264  # more than rows of which a slice has all


def make(device=None, dtype=torch.bfloat16, activation="relu", rows=30):
    """(a layer that serves, x, y)."""
    torch.manual_seed(0)
    layer = APTLayer(DIM, num_prompts=70, activation=activation).eval().requires_grad_(False).to(device, dtype)
    layer.log_scale.fill_(0.3)
    return layer, *(torch.randn(rows, DIM, device=device).to(dtype) for _ in range(2))


def arguments_of(layer, dtype):
    keys = layer.keys()
    return layer.prompts, keys, layer.activation, packed_apt(layer.prompts, keys, layer.activation, dtype)


def in_two_parts(layer, x, y):
    prompts, keys, activation, packed = arguments_of(layer, x.dtype)
    begun = begun_apt(x, prompts, keys, activation, packed)
    return ops.apt(x, y, prompts, keys, layer.log_scale, activation, packed=packed, begun=begun), begun


@ON_CUDA
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("activation", ["relu", "softmax"])
@pytest.mark.parametrize("rows", [1, 30, 131])
def test_two_parts_give_the_bits_of_one_call(device, dtype, activation, rows):
    layer, x, y = make(device.torch_device, dtype, activation, rows)
    for layer_dtype in (dtype, torch.float32):  # whose keys come with a rest
        layer.to(layer_dtype)
        out, begun = in_two_parts(layer, x, y)
        assert torch.equal(out, layer(x, y))
        begun.data.zero_()
        rest = ops.apt(x, y, *arguments_of(layer, dtype)[:2], layer.log_scale, activation, packed=None, begun=begun)
        assert torch.equal(rest, out), "without packed weights it must do all"


@pytest.mark.parametrize("order", ["forward", "reverse"])
@pytest.mark.parametrize("copies", ["lazy", "eager"])
def test_in_whatever_order_the_kernels_run(order, copies):
    layer, x, y = make()
    with emulation():
        expected = layer(x, y)
    with emulation(order=order, copies=copies):
        assert torch.equal(in_two_parts(layer, x, y)[0], expected)


@ON_CUDA
def test_what_was_begun_is_what_the_call_reads(device):
    layer, x, y = make(device.torch_device)
    prompts, keys, activation, packed = arguments_of(layer, x.dtype)
    begun = begun_apt(x, prompts, keys, activation, packed)

    def call(x, y, begun):
        return ops.apt(x, y, prompts, keys, layer.log_scale, activation, packed=packed, begun=begun)

    expected = layer(x, y)
    begun.data.zero_()
    assert not torch.equal(call(x, y, begun), expected)
    # Of another x, of other dtypes and with gradients it is not for.
    assert torch.equal(call(x.clone(), y, begun), expected)
    assert torch.equal(call(x, y.float(), begun), layer(x, y.float()))
    with torch.enable_grad():
        assert torch.equal(call(x, y.requires_grad_(), begun), expected)


@ON_CUDA
def test_many_rows_and_float32_have_nothing_to_begin(device):
    for dtype, rows in ((torch.bfloat16, 2000), (torch.float32, 30)):
        layer, x, y = make(device.torch_device, dtype, rows=rows)
        out, begun = in_two_parts(layer, x, y)
        assert begun is None and torch.equal(out, layer(x, y))


@ON_CUDA
def test_under_autocast_it_is_of_the_x_that_was_given(device):
    layer, x, y = make(device.torch_device, torch.float32)
    with torch.autocast(device.torch_device.type, torch.bfloat16):
        prompts, keys, activation, packed = arguments_of(layer, torch.bfloat16)
        begun = begun_apt(x, prompts, keys, activation, packed)
        y = y.bfloat16()
        out = ops.apt(x, y, prompts, keys, layer.log_scale, activation, packed=packed, begun=begun)
        assert begun.x is x and torch.equal(out, layer(x, y))


@ON_CUDA
def test_wrong_parts_are_refused(device):
    layer, x, y = make(device.torch_device)
    prompts, keys, activation, packed = arguments_of(layer, x.dtype)
    begun = torch.ops.petl_ext.apt_begin(x, prompts, keys, activation, packed.data)

    def rest(begun, packed=packed.data, y=y):
        torch.ops.petl_ext.apt_forward(
            x, y, prompts, keys, layer.log_scale, activation, False, packed, 0.0, None, begun
        )

    with pytest.raises(
        RuntimeError, match=r"apt: begun must be contiguous, .* \d+ elements, as apt_begin returned it, got 8"
    ):
        rest(begun[:8])
    with pytest.raises(RuntimeError, match=r"apt: begun must come with the packed weights.*got none"):
        rest(begun, packed=None)
    with pytest.raises(RuntimeError, match=r"apt: begun must be contiguous, .* 0 elements"):  # nothing of floats
        rest(begun, y=y.float())
    with pytest.raises(RuntimeError, match=r"apt: x must have shape \[\.\.\., 264\]"):
        begun_apt(x[:, :8], prompts, keys, activation, packed)


class Recorded:
    """In the place of a `SideStream`, which a GPU needs: says when it was asked for what."""

    def __init__(self, events):
        self.events = events

    def queue(self, work):
        self.events.append("begin")
        return work()

    def wait(self):
        self.events.append("wait")


@pytest.fixture
def events(monkeypatch):
    """What happens, in order, in a process that takes the CPU for a GPU."""
    events = []
    monkeypatch.setattr("petl_ext.nn.apt.side_stream_on", lambda device: Recorded(events))
    with emulation():
        yield events


@pytest.mark.parametrize(("family", "child"), [("clip_vision_model", "q_proj"), ("bert", "dense")])
@torch.no_grad()
def test_an_attached_model_begins_before_the_attention_or_its_projection(events, family, child):
    model = make_model(family, layers=2).eval()
    inputs = make_inputs(model)
    apt = petl_ext.attach(model, APTConfig(num_prompts=5, rank=2))
    model.to(torch.bfloat16)
    inputs = {name: t.bfloat16() if t.is_floating_point() else t for name, t in inputs.items()}
    for name in apt.installed.sites:
        model.get_submodule(f"{name}.{child}").register_forward_hook(lambda *_: events.append(child))
    apt.freeze()
    expected = run(model, inputs)
    assert "begin" not in events
    events.clear()
    apt.freeze(overlap=True)
    # The rows' width is below what is split, so nothing is begun; the order of the questions is what is looked at.
    assert torch.equal(run(model, inputs), expected)
    assert events == ["begin", child] * 2


@torch.no_grad()
def test_the_layer_waits_for_what_it_has_begun(events):
    layer, x, y = make()
    expected = layer(x, y)
    layer.freeze(overlap=True)
    begun = layer.begin(x)
    assert begun is not None and events == ["begin"]
    assert torch.equal(layer(x, y, begun), expected) and events == ["begin", "wait"]
    layer.freeze()
    assert layer.begin(x) is None


@torch.no_grad()
def test_only_a_frozen_layer_begins(events):
    layer, x, _ = make()
    assert layer.begin(x) is None
    layer.freeze(overlap=True)
    twins = copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))
    assert [twin.begin(x) for twin in twins] == [None, None]
    with torch.enable_grad():
        assert layer.begin(x) is None
    layer.prompts.mul_(2)
    assert layer.begin(x) is None
    layer.freeze(overlap=True)
    layer.train()
    assert layer.begin(x) is None and events == []


@pytest.mark.parametrize("found", [None, "begun"])
@pytest.mark.parametrize("captures", [True, False])
def test_a_stream_that_leaves_a_capture_comes_back(monkeypatch, captures, found):
    """On streams that only say who waits for whom."""
    waits = []

    class Stream:
        device = "gpu"

        def __init__(self, name):
            self.name = name

        def wait_stream(self, other):
            waits.append((self.name, other.name))

    monkeypatch.setattr(torch.cuda, "Stream", lambda device: Stream("side"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream("main"))
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: captures)
    side = SideStream("gpu")
    assert side.queue(lambda: found) == (found if captures else None)
    left, back = ("side", "main"), ("main", "side")
    assert waits == ([left] + [back] * (found is None) if captures else [])
    side.wait()
    assert waits[-1] == back


def test_what_freeze_refuses():
    layer = APTLayer(16, num_prompts=3).eval()
    with pytest.raises(ValueError, match="overlap must be True or False, got 'yes'"):
        layer.freeze(overlap="yes")
    model = nn.Sequential(make_model("bert", layers=1)).eval()
    adapters = petl_ext.attach(model, petl_ext.AdapterConfig(bottleneck=4))
    with pytest.raises(ValueError, match="freeze: overlap must be False without layers of APT, got True"):
        adapters.freeze(overlap=True)
