"""Run as a script by test_patch_library.py where the library `adapters` can be imported, which pins its transformers.

Bottlenecks of the library in a tiny BERT: patched they compute what they did, and unpatched they do so bit for bit.
"""

import copy

import adapters
import torch
from tolerance import assert_as_good_as_torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import BertConfig, BertModel

import petl_ext
from petl_ext.ops import floors

FUSED = {
    "sequential": adapters.SeqBnConfig(),
    "two sequential, swish": adapters.DoubleSeqBnConfig(),
    "parallel, learned scale": adapters.ParBnConfig(scaling="learned"),
    "norm before, gelu": adapters.SeqBnConfig(ln_before=True, non_linearity="gelu", scaling=2.0),
    "mix and match": adapters.MAMConfig(),
}
LEFT_ALONE = {
    "compacter": (adapters.CompacterConfig(phm_dim=4, reduction_factor=4), "PHMLayer"),
    "gating": (adapters.SeqBnConfig(use_gating=True), "gate"),
    "norm after": (adapters.SeqBnConfig(ln_after=True), "LayerNorm"),
    "tanh": (adapters.SeqBnConfig(non_linearity="tanh"), "activation"),
}


class Ops(TorchDispatchMode):
    """Counts calls of our adapter."""

    calls = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls += func is torch.ops.petl_ext.adapter_forward.default
        return func(*args, **(kwargs or {}))


def bert_with(*configs, fuse=False):
    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, vocab_size=50,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    model = BertModel(config)
    adapters.init(model)
    names = [f"bottleneck{i}" for i in range(len(configs))]
    for name, adapter_config in zip(names, configs, strict=True):
        model.add_adapter(name, adapter_config)
    if fuse:
        model.add_adapter_fusion(names)
    active = adapters.Fuse(*names) if fuse else names[0]
    model.train_adapter(active)
    model.set_active_adapters(active)
    for name, parameter in model.named_parameters():
        # Some start as zero, where a wrong computation would not show.
        if any(part in name for part in names):
            torch.nn.init.normal_(parameter, std=0.3)
    return model.train()


def outputs_and_gradients(model, dtype):
    model = copy.deepcopy(model).to(dtype)
    with Ops() as ops:
        out = model(torch.arange(40).view(2, 20) % 50).last_hidden_state
    out.pow(3).sum().backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return ops.calls, {"out": out.detach(), **gradients}


def check_fused(model, expected_calls=None):
    _, oracle = outputs_and_gradients(model, torch.float64)
    _, theirs = outputs_and_gradients(model, torch.float32)
    keys = list(model.state_dict())
    patch = petl_ext.patch(model)
    report = patch.report()
    assert report.fused == len(report.rows) > 0, report
    calls, ours = outputs_and_gradients(model, torch.float32)
    assert calls == (expected_calls or report.fused), (calls, report)
    assert list(model.state_dict()) == keys and ours.keys() == theirs.keys() == oracle.keys()
    for name in oracle:
        assert_as_good_as_torch(name, ours[name], theirs[name], oracle[name])
    patch.unpatch()
    calls, again = outputs_and_gradients(model, torch.float32)
    assert calls == 0 and all(torch.equal(theirs[name], again[name]) for name in theirs)


def check_left_alone(name, config, reason):
    model = bert_with(config)
    try:
        petl_ext.patch(model)
    except ValueError as error:
        assert reason in str(error), error
    else:
        raise AssertionError(f"{name} was patched")


def check_moved():
    """As docs/migration.md tells: weights of a `double_seq_bn` in adapters that are attached to the same BERT."""
    theirs = bert_with(adapters.DoubleSeqBnConfig()).eval()
    ours = BertModel(theirs.config).eval()
    found = theirs.state_dict()
    ours.load_state_dict({name: found[name] for name in ours.state_dict()})
    bottlenecks = petl_ext.attach(ours, petl_ext.AdapterConfig(bottleneck=32 // 16, activation="silu"))
    names = {"down": "adapter_down.0.weight", "down_bias": "adapter_down.0.bias"}
    names |= {"up": "adapter_up.weight", "up_bias": "adapter_up.bias"}
    for site in bottlenecks.sites:
        moved = {name: found[f"{site}.adapters.bottleneck0.{library_name}"] for name, library_name in names.items()}
        ours.get_submodule(f"{site}.adapter").load_state_dict(moved)
    tokens = torch.arange(40).view(2, 20) % 50
    torch.testing.assert_close(ours(tokens).last_hidden_state, theirs(tokens).last_hidden_state)


def main():
    # Otherwise so few rows would go to the library's own forward.
    floors.FLOORS.clear()
    for config in FUSED.values():
        check_fused(bert_with(config))
    check_fused(bert_with(adapters.SeqBnConfig(), adapters.SeqBnConfig(), fuse=True))
    for name, (config, reason) in LEFT_ALONE.items():
        check_left_alone(name, config, reason)
    check_moved()
    model = bert_with(adapters.SeqBnConfig(), adapters.SeqBnConfig(dropout=0.1))
    assert petl_ext.patch(model).report().left_alone == {"dropout 0.1 in training, where the kernel has none": 2}


main()
print("all computed the same")
