"""Attached models under FSDP2, fully_shard, in two processes."""

import pytest
import torch
from tiny_families import make_inputs, make_model, run
from tiny_vilt import randomize
from torch.distributed.fsdp import FSDPModule, fully_shard
from two_processes import in_two_processes

import petl_ext
from petl_ext import AdapterConfig, APTConfig, DASConfig

CASES = [
    ("vilt", APTConfig(num_prompts=5, rank=2)),
    ("bert", AdapterConfig(bottleneck=6)),
    ("vilt", DASConfig(bottleneck=6, skip=[1])),
]


def attached(family, config):
    model = make_model(family)
    attachment = petl_ext.attach(model, config)
    randomize(attachment)
    return model, attachment


def layers_of(model):
    return next(module for name, module in model.named_modules() if name.endswith("encoder.layer"))


def sharded(model):
    for layer in layers_of(model):
        fully_shard(layer.attention.output)
        fully_shard(layer)
    return fully_shard(model)


def train_steps(model, attachment, inputs_of_steps):
    optimizer = torch.optim.SGD(attachment.parameters(), lr=0.1)
    for batches in inputs_of_steps:
        for inputs in batches:
            (run(model, inputs).square().mean() / len(batches)).backward()
        optimizer.step()
        optimizer.zero_grad()


def step_inputs(model, ranks):
    return [[{**make_inputs(model), **noise(model, 10 * step + rank)} for rank in ranks] for step in range(2)]


def noise(model, seed):
    inputs = make_inputs(model)
    generator = torch.Generator().manual_seed(seed)
    return {"input_ids": torch.randint(3, 40, inputs["input_ids"].shape, generator=generator)}


def whole(attachment):
    return {
        name: parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter.detach()
        for name, parameter in attachment.named_parameters()
    }


def results_on_rank(rank, family, config, folder):
    model, attachment = attached(family, config)
    inputs = make_inputs(model)
    sharded(model)
    with torch.no_grad():
        run(model, inputs)  # keys that are kept must not outlive the steps
    train_steps(model, attachment, step_inputs(model, [rank]))
    with torch.no_grad():
        found = {"logits": run(model, inputs), "parameters": whole(attachment)}
        with attachment.disable():
            found["disabled"] = run(model, inputs)
        attachment.save(folder)
        another, _ = attached(family, config)
        sharded(another)
        petl_ext.load(another, folder)
        found["loaded"] = run(another, inputs)
    assert all(isinstance(layer, FSDPModule) for layer in layers_of(model))
    attachment.detach()
    assert all(isinstance(layer, FSDPModule) for layer in layers_of(model))
    with torch.no_grad():
        found["detached"] = run(model, inputs)
    return found


def results_and_refusal(rank, folder):
    results = [results_on_rank(rank, *case, folder / str(number)) for number, case in enumerate(CASES)]
    with pytest.raises(ValueError) as refused:
        petl_ext.attach(sharded(make_model("bert")), APTConfig())
    return results, str(refused.value)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What two processes, which take seconds to start, have found for all cases, and where they have saved it."""
    folder = tmp_path_factory.mktemp("saved")
    return in_two_processes(results_and_refusal, folder), folder


@pytest.mark.parametrize("number", range(len(CASES)), ids=[f"{family}-{config.row}" for family, config in CASES])
def test_shards_train_and_save_as_the_whole_does(number, ranks):
    found_by_rank, folder = ranks
    family, config = CASES[number]
    model, attachment = attached(family, config)
    inputs = make_inputs(model)
    with torch.no_grad(), attachment.disable():
        bare = run(model, inputs)
    train_steps(model, attachment, step_inputs(model, [0, 1]))
    with torch.no_grad():
        expected = run(model, inputs)
    for results, _ in found_by_rank:
        found = results[number]
        torch.testing.assert_close(found["parameters"], whole(attachment))
        for name, logits in (("logits", expected), ("loaded", expected), ("disabled", bare), ("detached", bare)):
            torch.testing.assert_close(found[name], logits, msg=lambda text, name=name: f"{name}: {text}")
    fresh = make_model(family)
    petl_ext.load(fresh, folder / str(number))
    with torch.no_grad():
        torch.testing.assert_close(run(fresh, inputs), expected)


def test_a_sharded_model_is_refused(ranks):
    assert all("attach to the model first, then shard it" in refusal for _, refusal in ranks[0])
