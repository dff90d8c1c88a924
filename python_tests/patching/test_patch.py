"""Other code bases' modules, patched, compute what they did, however they are used."""

import copy
import pickle

import pytest
import torch
from ops_called import OpsCalled
from original_modules import Adapter, Cross_Attention, LibraryAdapter, ParallelAdapter, SiluAdapter
from patched_modules import DIM, hidden_tokens, made, one_query, prompts, rows, stream, streams
from tolerance import assert_as_good_as_torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import petl_ext
from petl_ext.ops import floors
from petl_ext.patching.patch import kind_of

DRAWS = 4  # Which of two errors is smaller in one draw of few numbers, each rounded several times, is luck.


def with_softmax(module):
    module.activation = nn.Softmax(dim=-1)
    return module


# name: (module, op, how it is called)
MODULES = {
    "prompts": (prompts, "apt", streams(count=2)),
    "prompts, softmax": (lambda: with_softmax(prompts()), "apt", streams(count=2)),
    "bottleneck": (lambda: Adapter(DIM), "adapter", streams()),
    "bottleneck, silu": (lambda: SiluAdapter(DIM, 16), "adapter", streams()),
    "parallel": (lambda: ParallelAdapter(DIM, 16, adapter_scalar="4.0"), "adapter", streams(False)),
    "parallel, residual": (lambda: ParallelAdapter(DIM, 16), "adapter", streams()),
    "parallel, another residual": (
        lambda: ParallelAdapter(DIM, 16, adapter_scalar="learnable_scalar"),
        "adapter",
        lambda module, dtype: module(stream().to(dtype), residual=stream(1).to(dtype)),
    ),
    "parallel, norm last": (
        lambda: ParallelAdapter(DIM, 16, adapter_scalar="0.5", adapter_layernorm_option="out"),
        "adapter",
        streams(),
    ),
    "parallel, no norm": (lambda: ParallelAdapter(DIM, 16, adapter_layernorm_option="none"), "adapter", streams(False)),
    "cross-attention": (lambda: Cross_Attention(DIM, 0.0, 4), "attention_pool", one_query()),
    "cross-attention, masked": (lambda: Cross_Attention(DIM, 0.0, 4), "attention_pool", one_query(hidden_tokens())),
    "cross-attention, of LLaMA": (
        lambda: Cross_Attention(DIM, 0.0, 4, mid_size=32, visual_size=48),
        "attention_pool",
        one_query(dim=48),
    ),
    "library": (lambda: LibraryAdapter(DIM, 16, "swish", ln_before=True), "adapter", streams(count=2)),
    "library, parallel": (
        lambda: LibraryAdapter(DIM, 16, "gelu", scaling="learned", parallel=True),
        "adapter",
        streams(count=2),
    ),
}
every_module = pytest.mark.parametrize(("make", "op", "call"), MODULES.values(), ids=MODULES)


def first(out):
    return out[0] if isinstance(out, tuple) else out


def output_and_gradients(model, call, dtype):
    """{"out": output, name: gradient of each parameter and input} of the module in `model`."""
    model, inputs = copy.deepcopy(model).to(dtype), {}

    def watch(module, arguments, named):
        tensors = [t for t in (*arguments, *named.values()) if torch.is_tensor(t) and t.is_floating_point()]
        inputs.update((f"input {i}", t.requires_grad_()) for i, t in enumerate(tensors))

    model[0].register_forward_pre_hook(watch, with_kwargs=True)
    out = first(call(model[0], dtype))
    out.backward(rows(*out.shape, seed=9).to(dtype))
    # The library's parallel adapter does not use its residual.
    tensors = [*inputs.items(), *model.named_parameters()]
    return {"out": out.detach()} | {name: t.grad for name, t in tensors if t.grad is not None}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@every_module
def test_outputs_and_gradients_stay_and_unpatch_restores_them(make, op, call, dtype, no_floors):
    oracle, theirs, ours = [], [], []
    for seed in range(DRAWS):
        model = made(make, seed).to(dtype)
        oracle.append(output_and_gradients(model, call, torch.float64))
        theirs.append(output_and_gradients(model, call, dtype))
        own_class, keys, text = type(model[0]), list(model.state_dict()), repr(model)
        patch = petl_ext.patch(model)
        assert isinstance(model[0], own_class)
        assert (list(model.state_dict()), repr(model)) == (keys, text)
        with OpsCalled() as called:
            ours.append(output_and_gradients(model, call, dtype))
        assert called.names == [op] and ours[-1].keys() == theirs[-1].keys() == oracle[-1].keys() > {"out", "input 0"}
        assert all(tensor.dtype is theirs[-1][name].dtype for name, tensor in ours[-1].items())
        patch.unpatch()
        assert type(model[0]) is own_class and "petl_settings" not in vars(model[0])
        again = output_and_gradients(model, call, dtype)
        assert all(torch.equal(tensor, theirs[-1][name]) for name, tensor in again.items())
    for name in oracle[0]:
        drawn = (torch.cat([run[name].flatten() for run in runs]) for runs in (ours, theirs, oracle))
        assert_as_good_as_torch(name, *drawn)


@every_module
def test_autocast_gives_what_it_gave(make, op, call, no_floors):
    model = made(make)
    with torch.autocast("cpu", torch.bfloat16):
        theirs = first(call(model[0], torch.float32))
        petl_ext.patch(model)
        with OpsCalled() as called:
            ours = first(call(model[0], torch.float32))
    assert called.names == [op] and ours.dtype is theirs.dtype
    oracle = first(call(model.double()[0], torch.float64))
    assert_as_good_as_torch("out", ours, theirs, oracle)


@every_module
def test_a_patched_model_copies_pickles_and_compiles(make, op, call, no_floors):
    model = made(make)
    petl_ext.patch(model)
    expected = first(call(model[0], torch.float32))
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert petl_ext.patch(copied).report().fused == 1
        assert torch.equal(first(call(copied[0], torch.float32)), expected)
        petl_ext.unpatch(copied)
        assert kind_of(model[0]) and not kind_of(copied[0])
    torch._dynamo.reset()
    compiled = torch.compile(model[0], backend="aot_eager", fullgraph=True)
    first(call(compiled, torch.float32)).sum().backward()
    with OpsCalled() as called:
        out = first(call(compiled, torch.float32))
    assert called.names == [op] and torch.allclose(out, expected, atol=1e-6)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(reentrant, no_floors):
    model = made(lambda: ParallelAdapter(DIM, 16))
    petl_ext.patch(model)
    inputs = [stream().requires_grad_() for _ in range(2)]
    model(inputs[0]).sum().backward()
    checkpoint(model, inputs[1], use_reentrant=reentrant).sum().backward()
    assert torch.equal(inputs[0].grad, inputs[1].grad)


def test_every_parameter_gets_a_gradient_in_data_parallel(no_floors, tmp_path):
    model = nn.ModuleDict({"attention": Cross_Attention(DIM, 0.0, 4), "adapter": Adapter(DIM)})
    petl_ext.patch(model)

    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.parts = model

        def forward(self, visual, query):
            return self.parts["adapter"](self.parts["attention"](visual, visual, query, None))

    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        parallel = nn.parallel.DistributedDataParallel(Both())
        for _ in range(2):
            parallel(rows(3, 9, DIM), rows(3, 1, DIM)).sum().backward()
        del parallel
    finally:
        torch.distributed.destroy_process_group()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_too_few_rows_run_the_modules_own_forward(monkeypatch):
    high = {("adapter", torch.float32, torch.float32): floors.Floors(10, None, 8)}
    high["adapter", torch.float32, torch.bfloat16] = floors.Floors(6, 20, None)
    monkeypatch.setattr(floors, "FLOORS", high)
    model = made(lambda: Adapter(DIM))
    patch = petl_ext.patch(model)
    with OpsCalled() as called, torch.no_grad():
        model(rows(9, DIM))
    assert called.names == []
    with OpsCalled() as called:
        model(rows(5000, DIM))
    assert called.names == []
    with OpsCalled() as called, torch.no_grad():
        model(rows(10, DIM))
        with torch.autocast("cpu", torch.bfloat16):
            model(rows(5, DIM))
            model(rows(6, DIM))
    assert called.names == ["adapter"] * 2
    (row,) = patch.report().rows
    outside, within = (
        "without gradients below 10 rows, with gradients",
        "without gradients below 6 rows, with gradients",
    )
    assert row.exception == f"{outside} always; under autocast in bfloat16 {within} below 20 rows"
    assert row.exception in str(patch.report())
    model = nn.Sequential(ParallelAdapter(DIM, 8, dropout=0.1))
    patch = petl_ext.patch(model)
    (row,) = patch.report().rows
    assert row.exception == f"{outside} below 8 rows; under autocast in bfloat16 {within} always"
    with OpsCalled() as called:
        for count in (7, 8):
            model(rows(count, DIM))
            with torch.autocast("cpu", torch.bfloat16):
                model(rows(count, DIM))
    assert called.names == ["adapter"]
