"""Other code bases' modules, patched, compute what they did; what cannot be patched is named, with the reason."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from accelerate import cpu_offload, dispatch_model
from ops_called import OpsCalled
from original_modules import (
    Adapter,
    Cross_Attention,
    LibraryAdapter,
    ParallelAdapter,
    SiluAdapter,
    approximate_prompt,
)
from tolerance import assert_as_good_as_torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import petl_ext
from petl_ext.ops import kernels
from petl_ext.patching import dispatch
from petl_ext.patching.patch import kind_of

DIM = 64
DRAWS = 4  # Which of two errors is smaller in one draw of few numbers, each rounded several times, is luck.


@pytest.fixture
def no_floors(monkeypatch):
    """Otherwise so few rows would go to the modules' own forward."""
    monkeypatch.setattr(kernels, "FLOORS", {})


def rows(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def stream(seed=0):
    return rows(2, 24, DIM, seed=seed)


def one_query(mask=None, dim=DIM):
    def call(module, dtype):
        visual = rows(8, 25, dim, seed=1).to(dtype)
        return module(visual, visual, rows(8, 1, DIM, seed=2).to(dtype), mask)

    return call


def hidden_tokens():
    """Some of one sample's, all of another's."""
    hidden = torch.zeros(8, 1, 1, 25, dtype=torch.bool)
    hidden[1, ..., 10:], hidden[2] = True, True
    return hidden


def streams(*others, count=1):
    return lambda module, dtype: module(*(stream(i).to(dtype) for i in range(count)), *others)


def prompts(dropout=0.0):
    return approximate_prompt(4, DIM, 4, 20, dropout)


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


def made(make, seed=0):
    """In a model, and with parameters none of which is zero or one."""
    torch.manual_seed(seed)
    model = nn.Sequential(make())
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model


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
    monkeypatch.setattr(kernels, "FLOORS", {("adapter", torch.float32): (10, None)})
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
            model(rows(1, DIM))
    assert called.names == ["adapter"] * 2
    (row,) = patch.report().rows
    assert row.exception == "without gradients below 10 rows, with gradients always"
    assert row.exception in str(patch.report())


# What keeps a call from the kernel, once a module has been patched: (module, what is done to it, call, reported)
def lora(module):
    module.up_sampler = nn.Sequential(module.up_sampler, nn.Identity())


def watched(module):
    module.down_sampler.register_forward_hook(lambda *_: None)


class Square(Adapter):
    def __init__(self, dim):
        super().__init__(dim, dim)


class Switched(Adapter):
    """With a switch and a function as plain attributes, which forward goes by."""

    def __init__(self, dim):
        super().__init__(dim)
        self.enabled, self.after = True, torch.clone

    def forward(self, x):
        return self.after(super().forward(x)) if self.enabled else x


def with_gelu(module):
    module.activation = nn.GELU()
    return module


def other_gelu(module):
    module.activation = nn.GELU(approximate="tanh")


def offloaded(module):
    cpu_offload(module, execution_device=torch.device("cpu"))


def with_own_forward(module):
    module.up_sampler.forward = torch.zeros_like


OWN_FORWARD = {
    "offloaded weights": (lambda: Adapter(DIM), offloaded, streams(), None),
    "a part's own forward": (lambda: Square(DIM), with_own_forward, streams(), "a part has a forward of its own"),
    "a switch": (lambda: Switched(DIM), lambda m: setattr(m, "enabled", False), streams(), "enabled was changed"),
    "a function": (lambda: Switched(DIM), lambda m: setattr(m, "after", torch.relu), streams(), "after was changed"),
    "another GELU": (lambda: with_gelu(Adapter(DIM)), other_gelu, streams(), "approximate was changed"),
    "dropout": (lambda: prompts(0.1), None, streams(count=2), "dropout 0.1 in training"),
    "float dropout": (lambda: ParallelAdapter(DIM, 16, dropout=0.2), None, streams(), "dropout 0.2 in training"),
    "float64": (lambda: Adapter(DIM).double(), None, lambda m, _: m(stream().double()), "float64"),
    "a part replaced": (lambda: Adapter(DIM), lora, streams(), "a part was replaced"),
    "a hook": (lambda: Adapter(DIM), watched, streams(), "a part carries a hook"),
    "two queries": (
        lambda: Cross_Attention(DIM, 0.0, 4),
        None,
        lambda m, dtype: m(v := stream().to(dtype), v, v[:, :2], None),
        None,
    ),
    "other values": (
        lambda: Cross_Attention(DIM, 0.0, 4),
        None,
        lambda m, dtype: m(stream().to(dtype), stream(1).to(dtype), stream(2)[:, :1].to(dtype), None),
        None,
    ),
    "one residual for all": (
        lambda: ParallelAdapter(DIM, 8),
        None,
        lambda m, _: m(stream(), residual=stream(1)[:1]),
        None,
    ),
    "one input for all": (prompts, None, lambda m, _: m(stream()[:1], stream(1)), None),
    "one query for all": (
        lambda: Cross_Attention(DIM, 0.0, 4),
        None,
        lambda m, _: m(v := stream(), v, stream(1)[:1, :1], None),
        None,
    ),
    "masks per head": (
        lambda: Cross_Attention(DIM, 0.0, 4),
        None,
        one_query(hidden_tokens().expand(8, 4, 1, 25)),
        None,
    ),
}


@pytest.mark.parametrize(("make", "change", "call", "reason"), OWN_FORWARD.values(), ids=OWN_FORWARD)
def test_what_no_kernel_computes_runs_the_modules_own_forward(make, change, call, reason, no_floors):
    model = made(make)
    unpatched = copy.deepcopy(model)
    patch = petl_ext.patch(model)
    for changed in (model, unpatched):
        if change:
            change(changed[0])
    torch.manual_seed(1)
    expected = call(unpatched[0], torch.float32)
    torch.manual_seed(1)
    with OpsCalled() as called:
        assert torch.equal(call(model[0], torch.float32), expected)
    assert called.names == []
    if reason:
        assert patch.report().left_alone == {reason: 1}
        assert reason in str(patch.report())


def test_devices_without_a_kernel_run_the_modules_own_forward(monkeypatch):
    model = nn.Sequential(Adapter(DIM), Adapter(60, 8)).to("meta")
    patch = petl_ext.patch(model)
    assert patch.report().left_alone == {"this build holds no kernel for meta": 2}
    assert model[0](torch.empty(3, DIM, device="meta")).shape == (3, DIM)
    monkeypatch.setattr(kernels, "_HELD", {("native", "adapter", "cuda")})
    reasons = [dispatch.own_forward_for_now(part, "cuda", torch.float32) for part in model]
    assert reasons == ["", "the CUDA kernel does not take a width of 60 with 8"]


def test_dropout_keeps_the_kernel_in_eval(no_floors):
    model = made(lambda: prompts(0.1)).eval()
    patch = petl_ext.patch(model)
    assert patch.report().fused == 1
    with OpsCalled() as called:
        model[0](stream(), stream(1))
    assert called.names == ["apt"]


class Gated(Adapter):
    def __init__(self, dim):
        super().__init__(dim)
        self.gate = nn.Parameter(torch.ones(1))


class Doubled(Adapter):
    def forward(self, x):
        return x + 2 * self.up_sampler(self.activation(self.down_sampler(x)))


class OtherInTraining(Adapter):
    def forward(self, x):
        return super().forward(x) * (2 if self.training else 1)


class ReluLast(ParallelAdapter):
    def forward(self, x, add_residual=True, residual=None):
        return F.relu(super().forward(x, add_residual, residual))


class Clamped(Adapter):
    def forward(self, x):
        return super().forward(x).clamp(-100, 100)


class Scaled(Adapter):
    def forward(self, x, res=True, weights=None):
        return super().forward(x)


class InAutocast(Adapter):
    def forward(self, x):
        with torch.autocast("cpu", torch.bfloat16):
            return super().forward(x)


class DecoratedByAutocast(Adapter):
    @torch.autocast("cpu", torch.bfloat16)
    def forward(self, x):
        return super().forward(x)


class LlavaAdapter(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.down, self.act, self.up = nn.Linear(dim, 8), nn.ReLU(), nn.Linear(8, dim)

    def forward(self, x):
        with torch.autocast("cpu", torch.bfloat16):
            out = self.up(self.act(self.down(x)))
        return x + out


class RepAdapter(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.conv_A, self.conv_B = nn.Conv1d(dim, 8, 1), nn.Conv1d(8, dim, 1, groups=2)


def changed(module, **attributes):
    for name, value in attributes.items():
        setattr(module, name, value)
    return module


def hooked(module):
    module.up_sampler.register_forward_pre_hook(lambda *_: None)
    return module


ALMOST = {
    "a gate": (lambda: Gated(DIM), "it also has gate"),
    "a missing scale": (lambda: changed(prompts(), scale=None), "it lacks scale"),
    "one linear layer": (
        lambda: changed(prompts(), mm=nn.Linear(DIM, DIM)),
        "not a Sequential",
    ),
    "sizes": (lambda: changed(Adapter(DIM), up_sampler=nn.Linear(8, 32)), "64 to 8 and 8 to 32"),
    "mm's sizes": (
        lambda: changed(prompts(), mm_tokens=nn.Parameter(rows(20, 8))),
        r"\[20, 8\]",
    ),
    "an activation": (lambda: changed(Adapter(DIM), activation=nn.Tanh()), "computes tanh, not relu or gelu or silu"),
    "no bias": (lambda: changed(Adapter(DIM), down_sampler=nn.Linear(DIM, 8, bias=False)), "nn.Linear with a bias"),
    "a norm": (lambda: changed(ParallelAdapter(DIM, 8), adapter_layer_norm_before=nn.RMSNorm(DIM)), "norm is RMSNorm"),
    "a scale per channel": (lambda: LibraryAdapter(DIM, 8, scaling="channel"), r"scale has the shape \[64\]"),
    "the library's gating": (lambda: LibraryAdapter(DIM, 8, gating=True), "it has a gate"),
    "another constant": (lambda: Doubled(DIM), "computes something else"),
    "another formula in training": (lambda: OtherInTraining(DIM), "computes something else"),
    "ReLU after": (lambda: ReluLast(DIM, 8), "computes something else"),
    "a clamp": (lambda: Clamped(DIM), "computes something else"),
    "other arguments": (lambda: Scaled(DIM), r"its forward takes \(self, x, res=True, weights=None\)"),
    "autocast": (lambda: InAutocast(DIM), "an autocast of its own"),
    "autocast as decorator": (lambda: DecoratedByAutocast(DIM), "an autocast of its own"),
    "LLaVA's": (lambda: LlavaAdapter(DIM), "an autocast of its own"),
    "grouped convolutions": (lambda: RepAdapter(DIM), "no op computes grouped convolutions"),
    "a hook": (lambda: hooked(Adapter(DIM)), "a part carries a hook"),
    "a forward of the instance": (lambda: changed(Adapter(DIM), forward=lambda x: x), "a forward of its own"),
    "heads": (lambda: changed(Cross_Attention(DIM, 0.0, 4), num_heads=5), "num_heads is 5"),
}


@pytest.mark.parametrize(("make", "reason"), ALMOST.values(), ids=ALMOST)
def test_what_almost_matches_is_left_alone_and_says_why(make, reason):
    model = nn.ModuleDict({"almost": make()})
    own_class = type(model["almost"])
    with pytest.raises(ValueError, match=f"(?s)must be left alone:.*almost, .*{reason}"):
        petl_ext.patch(model)
    assert type(model["almost"]) is own_class
    model["adapter"] = Adapter(DIM)
    report = petl_ext.patch(model).report()
    assert type(model["almost"]) is own_class
    assert report.fused == 1 and list(report.left_alone.values()) == [1]
    assert "1 of 2 fused" in str(report)


def test_recognising_draws_no_random_numbers_and_runs_no_hook():
    model = made(lambda: prompts(0.1))
    model[0].register_forward_hook(pytest.fail)
    state, before = torch.get_rng_state(), copy.deepcopy(model.state_dict())
    petl_ext.patch(model)
    assert torch.equal(torch.get_rng_state(), state) and model.training and model[0].attn_drop.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_model_without_known_modules_is_refused():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    with pytest.raises(ValueError, match=r"holds nothing that is known.*approximate_prompt.*Cross_Attention"):
        petl_ext.patch(model)
    with pytest.raises(ValueError, match="nothing in Sequential is patched"):
        petl_ext.unpatch(model)
    for function in (petl_ext.patch, petl_ext.unpatch):
        with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got str"):
            function("model")


def test_patching_again_patches_what_is_new():
    model = nn.ModuleList([Adapter(DIM)])
    petl_ext.patch(model)
    patched_class = type(model[0])
    model.append(Adapter(DIM))
    assert petl_ext.patch(model).report().fused == 2
    assert type(model[0]) is type(model[1]) is patched_class
    petl_ext.unpatch(model)
    assert [type(module) for module in model] == [Adapter, Adapter]


def test_a_class_given_since_stays_on_top():
    """fully_shard gives a module such a class."""
    model = nn.Sequential(Adapter(DIM))
    bare = model(stream())
    petl_ext.patch(model)
    mark = type("Mark", (), {})
    model[0].__class__ = type("Sharded", (mark, type(model[0])), {})
    assert petl_ext.patch(model).report().fused == 1
    petl_ext.unpatch(model)
    assert type(model[0]).__bases__ == (mark, Adapter) and torch.equal(model(stream()), bare)


def test_hooks_of_a_device_map_stay(no_floors):
    model, bare = nn.Sequential(Adapter(DIM)), nn.Sequential(Adapter(DIM))
    bare.load_state_dict(model.state_dict())
    dispatch_model(model, {"": "cpu"}, force_hooks=True)
    assert petl_ext.patch(model).report().fused == 1
    with OpsCalled() as called:
        torch.testing.assert_close(model(stream()), bare(stream()))
    assert called.names == ["adapter"]
    petl_ext.unpatch(model)
    assert torch.equal(model(stream()), bare(stream()))


def test_weights_go_both_ways():
    model, other = made(lambda: Adapter(DIM)), nn.Sequential(Adapter(DIM))
    petl_ext.patch(model)
    other.load_state_dict(model.state_dict())
    model.load_state_dict(other.state_dict())
    petl_ext.unpatch(model)
    assert torch.equal(model(stream()), other(stream()))


@pytest.fixture
def adapter_class():
    """A class of its own for each test, since it is changed."""

    class Copy(Adapter):
        def forward(self, x):
            return x + self.up_sampler(self.activation(self.down_sampler(x)))

    yield Copy
    if "petl_original" in vars(Copy.forward):
        petl_ext.unpatch_class(Copy)


def test_a_patched_class_takes_in_instances_old_and_new(adapter_class, no_floors):
    old = adapter_class(DIM)
    expected, original = old(stream()), adapter_class.forward
    patch = petl_ext.patch_class(adapter_class)
    new = adapter_class(DIM)
    assert patch.report().rows == []
    with OpsCalled() as called:
        assert torch.allclose(old(stream()), expected, atol=1e-5)
        new(stream())
    assert called.names == ["adapter"] * 2
    assert patch.report().fused == 2
    patch.unpatch()
    assert adapter_class.forward is original and type(old) is type(new) is adapter_class
    assert torch.equal(old(stream()), expected)
    with pytest.raises(ValueError, match="Copy is not patched"):
        petl_ext.unpatch_class(adapter_class)


def test_an_unpatched_instance_of_a_patched_class_stays_so(adapter_class, no_floors):
    module, other = adapter_class(DIM), adapter_class(DIM)
    expected = module(stream())
    patch = petl_ext.patch_class(adapter_class)
    module(stream()), other(stream())
    petl_ext.unpatch(module)
    assert torch.equal(module(stream()), expected) and type(module) is adapter_class
    assert patch.report().fused == 1


def test_an_instance_of_a_patched_class_that_does_not_match_says_so_once(adapter_class, no_floors, caplog):
    odd = [changed(adapter_class(DIM), activation=nn.Tanh()) for _ in range(2)]
    expected = [module(stream()) for module in odd]
    patch = petl_ext.patch_class(adapter_class)
    for _ in range(2):
        assert all(torch.equal(module(stream()), out) for module, out in zip(odd, expected, strict=True))
    assert len(caplog.messages) == 1 and "its activation computes tanh" in caplog.messages[0]
    assert list(patch.report().left_alone.values()) == [2]


def test_a_subclass_with_a_forward_of_its_own_keeps_it(adapter_class, no_floors):
    class Twice(adapter_class):
        def forward(self, x):
            return 2 * super().forward(x)

    class Heir(adapter_class):
        pass

    twice, heir = Twice(DIM), Heir(DIM)
    expected = twice(stream())
    petl_ext.patch_class(adapter_class)
    with OpsCalled() as called:
        assert torch.equal(twice(stream()), expected) and type(twice) is Twice
        heir(stream())
    assert called.names == ["adapter"]


def test_a_model_of_a_patched_class_compiles(adapter_class, no_floors):
    model = adapter_class(DIM)
    petl_ext.patch_class(adapter_class)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    before = compiled(stream())
    assert not kind_of(model)
    model(stream())
    assert torch.allclose(compiled(stream()), before, atol=1e-5)
    with OpsCalled() as called:
        compiled(stream())
    assert called.names == ["adapter"]


def test_a_class_that_cannot_match_is_refused(adapter_class):
    with pytest.raises(TypeError, match=r"cls must be a subclass of torch\.nn\.Module, got .*int"):
        petl_ext.patch_class(int)
    with pytest.raises(ValueError, match="forward of Bilinear is that of no known kind"):
        petl_ext.patch_class(nn.Bilinear)
    petl_ext.patch_class(adapter_class)
    with pytest.raises(ValueError, match=r"Copy, or a class that it inherits forward from, is patched already"):
        petl_ext.patch_class(adapter_class)
