"""CUDA graphs of whole attached models. Without a GPU the emulated kernels are called again in the place of a replay,
which tries all but the capture itself."""

import subprocess
import sys

import pytest
import torch
from devices import CUDA_DEVICES
from gpu.graphs import captured
from tiny_families import make_inputs, make_model, run
from tiny_vilt import make_model as make_vilt

import petl_ext
from petl_ext import AdapterConfig, APTConfig, DASConfig

on_cuda = pytest.mark.parametrize("device", CUDA_DEVICES, ids=str, indirect=True)
CONFIGS = {
    "apt": APTConfig(num_prompts=5, rank=2),
    "adapter": AdapterConfig(bottleneck=6),
    "parallel": AdapterConfig(kind="parallel", bottleneck=6),
    "das": DASConfig(bottleneck=6, skip=[1]),
}
every_method = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
every_family = pytest.mark.parametrize("family", ["vilt", "bert", "clip_vision_model", "llama"])


def recalled(function):
    """In the place of `captured` where there is no GPU: the same tensors are written anew by another call."""
    results = function()

    def replay():
        for result, again in zip(results, function(), strict=True):
            with torch.no_grad():
                result.copy_(again)
        return results

    return replay


def capture_on(device):
    return captured if device.name == "cuda" else recalled


def prepared(device, model, config, dtype=torch.bfloat16):
    """(what computes, its inputs, attachment). Nothing there asks the device for a value, as ViLT's embeddings and
    masks do: that cannot be captured."""
    inputs = make_inputs(model)
    inputs.pop("attention_mask", None)
    attachment = petl_ext.attach(model, config)
    if model.config.model_type == "vilt":
        inputs = {"hidden_states": torch.randn(2, 40, model.config.hidden_size)}
        model = model.vilt.encoder
    model.to(device.torch_device, dtype).eval()
    floats = {name: tensor.to(dtype) for name, tensor in inputs.items() if tensor.is_floating_point()}
    return model, {name: tensor.to(device.torch_device) for name, tensor in (inputs | floats).items()}, attachment


def attached(device, family, config, dtype=torch.bfloat16):
    torch.manual_seed(0)
    return prepared(device, make_model(family), config, dtype)


def forward_of(model, inputs):
    def forward():
        with torch.no_grad():
            return [run(model, inputs)]

    return forward


def step_of(model, inputs, trained):
    """The output and the gradients of the trained parameters, which are the same tensors in every call."""

    def step():
        for parameter in trained:
            parameter.grad.zero_()
        out = run(model, inputs)
        out.float().square().mean().backward()
        return [out.detach(), *(parameter.grad for parameter in trained)]

    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
    return step


def assert_equal(results, expected):
    assert len(results) == len(expected) > 0
    assert all(torch.equal(*pair) for pair in zip(results, expected, strict=True))


def copies(results):
    return [result.detach().clone() for result in results]


@torch.no_grad()
def change(model, inputs):
    """In place: every trained parameter, and what the model sees."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.mul_(1.5)
    for tensor in inputs.values():
        tensor.copy_(tensor.flip(0))


@on_cuda
@every_method
@every_family
def test_forward_of_a_model_is_replayed_after_its_weights_have_changed(device, family, config):
    model, inputs, _ = attached(device, family, config)
    forward = forward_of(model, inputs)
    before = copies(forward())
    replay = capture_on(device)(forward)
    assert_equal(replay(), before)
    change(model, inputs)
    expected = copies(forward())
    assert not torch.equal(expected[0], before[0])
    assert_equal(replay(), expected)


@on_cuda
@every_method
@pytest.mark.parametrize("family", ["vilt", "llama"])
def test_a_training_step_is_replayed_after_its_weights_have_changed(device, family, config):
    model, inputs, _ = attached(device, family, config, torch.float32)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    step = step_of(model, inputs, trained)
    before = copies(step())
    replay = capture_on(device)(step)
    assert_equal(copies(replay()), before)
    change(model, inputs)
    expected = copies(step())
    assert any(gradient.any() for gradient in expected[1:])
    assert_equal(copies(replay()), expected)


@on_cuda
def test_several_graphs_at_once(device):
    models = [attached(device, family, CONFIGS["apt"]) for family in ("vilt", "bert", "vilt")]
    forwards = [forward_of(model, inputs) for model, inputs, _ in models]
    replays = [capture_on(device)(forward) for forward in forwards]
    change(*models[2][:2])
    expected = [copies(forward()) for forward in forwards]
    found = [replays[index]() for index in (2, 0, 1, 0, 2)]
    for index, results in zip((2, 0, 1, 0, 2), found, strict=True):
        assert_equal(results, expected[index])


@on_cuda
@pytest.mark.parametrize("overlap", [False, True])
def test_a_frozen_model_of_few_rows(device, overlap):
    """Wide enough for rows to be split, which alone can begin beside the attention."""
    torch.manual_seed(0)
    model, inputs, apt = prepared(device, make_vilt(hidden_size=256, intermediate_size=64), APTConfig(num_prompts=70))
    forward = forward_of(model, inputs)
    expected = copies(forward())
    apt.freeze(overlap=overlap)
    replay = capture_on(device)(forward)
    assert_equal(replay(), expected)
    change(model, inputs)
    apt.freeze(overlap=overlap)
    replay = capture_on(device)(forward)
    apt.thaw()
    assert_equal(replay(), copies(forward()))


FIRST_USE = """
import torch
import petl_ext

torch.manual_seed(0)
x, y = (torch.randn(300, 256, device="cuda", dtype=torch.bfloat16) for _ in range(2))
prompts, log_scale = torch.randn(70, 256, device="cuda"), torch.zeros(1, device="cuda")
graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
torch.cuda.synchronize()
with torch.cuda.graph(graph, stream=stream):
    out = petl_ext.ops.apt(x, y, prompts, prompts, log_scale)
graph.replay()
assert torch.equal(out, petl_ext.ops.apt(x, y, prompts, prompts, log_scale))
"""


@pytest.mark.parametrize("device", [device for device in CUDA_DEVICES if device.name == "cuda"], ids=str, indirect=True)
def test_a_kernels_first_use_may_be_inside_a_capture(device):
    result = subprocess.run([sys.executable, "-c", FIRST_USE], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
