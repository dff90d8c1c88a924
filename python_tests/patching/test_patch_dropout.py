"""Patched modules that drop out: by the kernel where it drops out the same, and never elsewhere."""

import copy
import statistics

import pytest
import torch
import torch.nn.functional as F
from ops_called import OpsCalled
from original_modules import ParallelAdapter
from patched_modules import prompts
from plain_bottlenecks import DIM, INNER, Plain, checked, rows
from torch import nn

import petl_ext
from petl_ext import ops

pytestmark = pytest.mark.usefixtures("no_floors")
ELSEWHERE = "dropout 0.1 in training, where the kernel has none"


class Dropping(Plain):
    """By a function, at the steps that are named, at a probability of any name."""

    def __init__(self, *where, activation=F.relu):
        super().__init__()
        self.rate, self.where, self.activation = 0.1, where, activation

    def _drop(self, values, step):
        return F.dropout(values, self.rate, self.training) if step in self.where else values

    def forward(self, x):
        hidden = self.activation(self._drop(self.narrow(self._drop(x, "input")), "before"))
        return x + self._drop(self.widen(self._drop(hidden, "hidden")), "output")


class Forgetting(Dropping):
    """For long inputs alone."""

    def __init__(self):
        super().__init__("hidden")

    def _drop(self, values, step):
        return super()._drop(values, step) if values.size(-2) > 50 else values


class OfBoth(Dropping):
    """While it and a part are in training."""

    def __init__(self):
        super().__init__("hidden")
        self.part = nn.Identity()

    def _drop(self, values, step):
        return super()._drop(values, step) if self.part.training else values


class Convolving(nn.Module):
    def __init__(self):
        super().__init__()
        self.narrow, self.drop, self.widen = nn.Conv1d(DIM, INNER, 1), nn.Dropout(0.1), nn.Conv1d(INNER, DIM, 1)

    def forward(self, x):
        return x + self.widen(self.drop(F.gelu(self.narrow(x))))


def sequential():
    return nn.Sequential(nn.Linear(DIM, INNER), nn.ReLU(), nn.Dropout(0.1), nn.Linear(INNER, DIM))


def of_width(*shape):
    return (rows(*shape, DIM),)


TAKEN = {
    "a function": (lambda: Dropping("hidden"), of_width(2, 5), INNER),
    "before ReLU, which is the same": (lambda: Dropping("before"), of_width(2, 5), INNER),
    "a part": (sequential, of_width(2, 5), INNER),
    "convolutions": (Convolving, (rows(2, DIM, 5),), INNER),
    "AdaptFormer's": (lambda: ParallelAdapter(DIM, INNER, dropout=0.1), of_width(2, 5), INNER),
    "APT's": (lambda: prompts(0.1), (rows(2, 5, 64), rows(2, 5, 64, seed=1)), 20),
}


@pytest.mark.parametrize(("make", "inputs", "columns"), TAKEN.values(), ids=TAKEN)
def test_the_kernel_drops_out_where_the_module_does(make, inputs, columns, monkeypatch):
    """By the module's own forward, whose dropout is given the kernel's mask."""
    torch.manual_seed(2)
    model = make()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    own = copy.deepcopy(model)
    assert petl_ext.patch(model).report().fused == 1
    torch.manual_seed(3)
    with OpsCalled() as called:
        out = model(*inputs)
    assert len(called.names) == 1
    torch.manual_seed(3)
    kept = ops.dropout_mask(torch.randint(2**63 - 1, (2,)), 10, columns, 0.1)
    assert not kept.all()

    def masked(values, p=0.5, training=True, inplace=False):
        given = values.mT if isinstance(own, Convolving) else values
        dropped = given * kept.view(2, 5, columns) / (1 - p)
        return dropped.mT if isinstance(own, Convolving) else dropped

    with monkeypatch.context() as patched:
        patched.setattr(F, "dropout", masked)
        torch.testing.assert_close(out, own(*inputs), rtol=1e-4, atol=1e-4)
    checked(model.eval(), *inputs, runs=called.names)


LEFT = {
    "of the input": lambda: Dropping("input"),
    "of the output": lambda: Dropping("output"),
    "before GELU": lambda: Dropping("before", activation=F.gelu),
    "twice": lambda: Dropping("hidden", "output"),
    "of some lengths": Forgetting,
    "as two modules decide": OfBoth,
}


@pytest.mark.parametrize("make", LEFT.values(), ids=LEFT)
def test_dropout_elsewhere_runs_its_own_forward_in_training_alone(make):
    model = make()
    patch = petl_ext.patch(model)
    assert patch.report().left_alone == {ELSEWHERE: 1}
    own = copy.deepcopy(model)
    petl_ext.unpatch(own)
    outs = []
    for module in (model, own):
        torch.manual_seed(0)
        outs.append(module(rows(2, 60, DIM)))
    assert torch.equal(*outs)
    model.eval()
    assert patch.report().fused == 1
    checked(model, rows(2, 5, DIM))


def test_the_part_that_drops_out_decides():
    model = sequential()
    patch = petl_ext.patch(model)
    x = rows(2, 5, DIM)
    for training in (False, True):
        model.train(training)
        model[2].train(not training)
        outs = [model(x) for _ in range(2)]
        assert torch.equal(*outs) == training
    assert patch.report().fused == 1
    model[2].p = 0.2
    assert patch.report().left_alone == {"p was changed": 1}


def test_checkpointing_computes_the_same_again():
    model, x = sequential(), rows(2, 5, DIM)
    petl_ext.patch(model)
    gradients = []
    for call in (model, lambda x: torch.utils.checkpoint.checkpoint(model, x, use_reentrant=False)):
        model.zero_grad()
        torch.manual_seed(0)
        call(x).square().sum().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert all(map(torch.equal, *gradients))


def last_losses(dropout, is_patched, seed, steps=200):
    """The mean loss of the last hundred of so many steps; seeds tell what is dropped, not what is learned."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, DIM), ParallelAdapter(DIM, INNER, dropout=dropout), nn.Linear(DIM, 1))
    if is_patched:
        assert petl_ext.patch(model).report().fused == 1
    x = rows(steps, 64, 8)
    target, losses = (x.sin() * rows(8)).sum(-1, keepdim=True), []
    optimizer = torch.optim.Adam(model[1].parameters(), lr=3e-3)
    torch.manual_seed(seed)
    for inputs, wanted in zip(x, target, strict=True):
        loss = F.mse_loss(model(inputs), wanted)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return statistics.mean(losses[-100:])


def separation(first, second):
    """The difference of two means, in its standard deviations (Welch's t)."""
    deviation = sum(statistics.variance(values) / len(values) for values in (first, second)) ** 0.5
    return abs(statistics.mean(first) - statistics.mean(second)) / deviation


def test_losses_of_200_steps_have_the_distribution_of_the_unpatched_model():
    """Of three seeds each, by Welch's t, which for equal means is below 4.6 in 99 of 100 cases. It tells dropout of
    another probability."""
    own = [last_losses(0.3, False, seed) for seed in range(3)]
    assert separation(own, [last_losses(0.3, True, seed) for seed in range(3, 6)]) < 4.6
    assert separation(own, [last_losses(0.2, True, seed) for seed in range(3, 6)]) > 4.6
