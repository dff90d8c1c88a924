"""What a forward does beside returning the op's formula, and for which inputs, is seen before it is patched."""

import collections
import inspect

import pytest
import torch
from original_modules import Adapter, Cross_Attention, ParallelAdapter, approximate_prompt
from torch import nn

import petl_ext
from petl_ext.ops import floors
from petl_ext.patching import probe, recognize
from petl_ext.patching.patch import kind_of

DIM = 32


def refusal(module):
    """Why `petl_ext.patch` leaves it alone; the module must come out of it as it was."""
    keys, attributes = list(module.state_dict()), set(vars(module))
    with pytest.raises(ValueError) as raised:
        petl_ext.patch(nn.ModuleDict({"it": module}))
    assert (list(module.state_dict()), set(vars(module))) == (keys, attributes)
    return str(raised.value).split(": ", 2)[-1]


class Formula(Adapter):
    """`aside` does what the test is about."""

    def __init__(self, dim=DIM):
        super().__init__(dim)
        self.calls, self.records, self.table, self.names = 0, [], {}, set()
        self.window, self.meter, self.factor = collections.deque(maxlen=2), Meter(), torch.ones(1)
        self.share, self.seen = 0.5, float("nan")

    def forward(self, x):
        hidden = self.activation(self.down_sampler(x))
        out = x + self.up_sampler(hidden)
        self.aside(x, hidden)
        return out

    def aside(self, x, hidden):
        pass


class Meter:
    def __init__(self):
        self.sums = [0.0]


class Counting(nn.ReLU):
    calls = 0

    def forward(self, x):
        Counting.calls += 1
        return super().forward(x)


class Seeing(nn.ReLU):
    def __init__(self):
        super().__init__()
        self.register_buffer("greatest", torch.zeros(1), persistent=False)

    def forward(self, x):
        self.greatest.copy_(x.detach().abs().max())
        return super().forward(x)


def sees_by_data(module, x, hidden):
    module.activation.greatest.data = x.abs().max()[None]


SIDE_EFFECTS = {
    "an attribute that was not there": (lambda m, x, hidden: setattr(m, "z", hidden), "sets z"),
    "a counter": (lambda m, x, hidden: setattr(m, "calls", m.calls + 1), "sets calls"),
    "a list": (lambda m, x, hidden: m.records.append(x), "sets records[0]"),
    "a new list": (lambda m, x, hidden: setattr(m, "records", []), "sets records"),
    "a deque": (lambda m, x, hidden: m.window.append(1), "sets window[0]"),
    "a dictionary": (lambda m, x, hidden: m.table.update(last=x), "sets table['last']"),
    "a set": (lambda m, x, hidden: m.names.add("x"), "sets names"),
    "an object's insides": (lambda m, x, hidden: m.meter.sums.append(1.0), "sets meter.sums[1]"),
    "a tensor in place": (lambda m, x, hidden: m.factor.mul_(2), "sets factor"),
    "a parameter by its data": (lambda m, x, hidden: m.down_sampler.weight.data.clamp_(0), "sets down_sampler.weight"),
    "an attribute of a part": (lambda m, x, hidden: setattr(m.activation, "z", 1), "sets activation.z"),
    "a buffer of a part": (lambda m, x, hidden: m.activation.register_buffer("b", x), "sets activation.b"),
    "a part's part": (lambda m, x, hidden: m.activation.add_module("b", nn.ReLU()), "sets activation.b"),
    "a hook": (lambda m, x, hidden: m.activation.register_forward_hook(print), "sets activation._forward_hooks["),
    "an attribute that goes": (lambda m, x, hidden: vars(m).pop("share", None), "sets share"),
    "in training": (lambda m, x, hidden: m.training and setattr(m, "z", x), "sets z in training"),
    "in evaluation": (lambda m, x, hidden: m.training or setattr(m, "z", x), "sets z"),
    "with gradients": (lambda m, x, hidden: torch.is_grad_enabled() and setattr(m, "z", x), "sets z in training"),
    "long inputs": (
        lambda m, x, hidden: x.size(1) > 512 and setattr(m, "z", x),
        f"sets z for [1, 640, {DIM}]",
    ),
    "a mode": (lambda m, x, hidden: m.activation.train(False), "sets activation.training in training"),
    "random numbers": (lambda m, x, hidden: m.training and torch.rand(1), "draws random numbers in training"),
    "the input": (lambda m, x, hidden: x.zero_(), "changes its input"),
}


@pytest.mark.parametrize(("aside", "reason"), SIDE_EFFECTS.values(), ids=SIDE_EFFECTS)
def test_a_forward_that_leaves_something_behind_is_left_alone(aside, reason):
    module = type("Other", (Formula,), {"aside": aside})()
    assert refusal(module).startswith(f"its forward {reason}")


def test_what_leaves_nothing_behind_is_patched():
    """That `seen` is NaN is no change, nor is a list that stands twice."""
    module = Formula()
    module.again, module.itself = module.records, module.table
    module.table["itself"] = module.table
    assert petl_ext.patch(nn.Sequential(module)).report().fused == 1


def test_side_effects_of_parts_are_seen():
    module = Adapter(DIM)
    module.activation = Seeing()
    assert refusal(module) == "its forward sets activation.greatest"
    module.activation = Counting()
    assert refusal(module) == "its forward sets activation.calls"


def test_what_a_forward_has_kept_is_named():
    """Such a tensor cannot be copied."""
    module = type("Keeping", (Formula,), {"aside": lambda self, x, hidden: setattr(self, "z", hidden)})()
    module(torch.randn(2, 3, DIM))
    assert refusal(module) == "it keeps z, which has been computed: a forward seems to set it"
    other = Formula()
    other.stream = open(__file__)  # noqa: SIM115
    with other.stream:
        assert refusal(other).startswith("no copy of it can be made: ")


class Branching(Adapter):
    """The formula where `branch` is no, its input where it is yes."""

    def __init__(self, branch):
        super().__init__(DIM)
        self.branch = branch

    def forward(self, x):
        return x if self.branch(self, x) else super().forward(x)


BRANCHES = {
    "long": (lambda m, x: x.size(1) > 512, "computes something else for [1, 640, 32] than"),
    "long in training": (lambda m, x: m.training and x.size(1) > 576, "else for [1, 640, 32] in training than"),
    "long, tokens first": (lambda m, x: x.size(0) > 600, "computes something else for [640, 1, 32] than"),
    "one token": (lambda m, x: x.size(1) == 1, "computes something else for [1, 1, 32] than"),
    "one sample": (lambda m, x: x.size(0) == 1, "computes something else for [1, 1, 32] than"),
    "several samples": (lambda m, x: x.size(0) > 4, "computes something else for [8, 5, 32] than"),
    "always": (lambda m, x: True, "computes something else than"),
}


@pytest.mark.parametrize(("branch", "reason"), BRANCHES.values(), ids=BRANCHES)
def test_a_forward_that_branches_on_sizes_is_left_alone(branch, reason):
    assert reason in refusal(Branching(branch))


@pytest.mark.parametrize("make", [
    lambda: approximate_prompt(4, DIM, 4, 20),
    lambda: ParallelAdapter(DIM, 8, adapter_scalar="2.0"),
    lambda: Cross_Attention(DIM, 0.0, 4),
], ids=["prompts", "parallel", "cross-attention"])  # fmt: skip
def test_all_kinds_are_probed_at_length(make):
    its_class = type(make())

    def forward(self, x, *others):
        return its_class.forward(self, x, *others) * (2 if x.size(1) > 512 else 1)

    class Longer(its_class):
        pass

    Longer.forward = forward
    Longer.forward.__signature__ = inspect.signature(its_class.forward)
    module = make()
    module.__class__ = Longer
    assert "computes something else for [1, 640, 32] than" in refusal(module)


class Refusing(Adapter):
    """Raises where `refuses` says yes."""

    def __init__(self, refuses):
        super().__init__(DIM)
        self.refuses = refuses

    def forward(self, x):
        if self.refuses(x):
            raise IndexError("no such input")
        return super().forward(x)


@pytest.mark.parametrize("axes", [1, 2, 4, 5])
def test_inputs_of_so_many_axes_are_refused_as_before(axes, monkeypatch):
    monkeypatch.setattr(floors, "FLOORS", {})
    model = nn.Sequential(Refusing(lambda x: x.dim() == axes))
    assert petl_ext.patch(model).report().fused == 1
    assert model[0].petl_settings.axes == tuple(n for n in (3, 2, 4) if n != axes)
    with pytest.raises(IndexError, match="no such input"):
        model(torch.randn(*[2] * (axes - 1), DIM))


def test_inputs_of_so_many_axes_compute_what_they_did(monkeypatch):
    monkeypatch.setattr(floors, "FLOORS", {})
    module = Branching(lambda m, x: x.dim() == 2)
    petl_ext.patch(nn.Sequential(module))
    x = torch.randn(7, DIM)
    assert torch.equal(module(x), x) and not torch.equal(module(x[None]), x[None])


def test_a_forward_that_raises_is_left_alone_and_says_so():
    assert refusal(Refusing(lambda x: True)) == "its forward raises IndexError: no such input"
    long = refusal(Refusing(lambda x: x.size(1) > 512))
    assert long == "its forward raises IndexError for [1, 640, 32]: no such input"


class Detaching(Adapter):
    def forward(self, x):
        return x + self.up_sampler(self.activation(self.down_sampler(x.detach())))


class WithoutGradients(Adapter):
    @torch.no_grad()
    def forward(self, x):
        return super().forward(x)


@pytest.mark.parametrize("its_class", [Detaching, WithoutGradients])
def test_a_forward_with_other_gradients_is_left_alone(its_class):
    assert refusal(its_class(DIM)).startswith("its forward passes other gradients back than")


class Same(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()


class WithoutBackward(Adapter):
    def forward(self, x):
        return Same.apply(super().forward(x))


def test_a_forward_without_a_backward_pass_is_left_alone():
    assert refusal(WithoutBackward(DIM)).startswith("its backward pass raises NotImplementedError: ")


class Silent(Adapter):
    """Its train, as that of some code bases, returns nothing."""

    def train(self, mode=True):
        super().train(mode)


def test_a_train_that_returns_nothing_is_no_obstacle():
    module = Silent(DIM)
    assert petl_ext.patch(nn.Sequential(module)).report().fused == 1
    odd = Silent(DIM)
    odd.activation = nn.Tanh()
    assert "its activation" in refusal(odd)


def takes_no_branch(module, x):
    return False


def test_layers_of_one_structure_are_probed_once(monkeypatch):
    probed = []
    monkeypatch.setattr(recognize, "probe", lambda *given: probed.append(given) or probe.probe(*given))
    model = nn.Sequential(*(Branching(takes_no_branch) for _ in range(5)), Adapter(DIM))
    for index, module in enumerate(model[:5]):
        module.calls = 7 * (index == 3)
    assert petl_ext.patch(model).report().fused == 6
    assert [module for _, module in probed] == [model[0], model[3], model[5]]
    noted = [dict(entry[1:] for entry in module.petl_settings.attributes) for module in model[2:4]]
    assert [attributes["calls"] for attributes in noted] == [0, 7]


def test_layers_that_differ_in_an_object_are_probed_one_by_one():
    model = nn.Sequential(Branching(takes_no_branch), Branching(lambda m, x: True))
    assert petl_ext.patch(model).report().fused == 1
    assert kind_of(model[0]) and not kind_of(model[1])


def test_layers_that_differ_in_what_they_share_are_probed_one_by_one():
    class Twice(Adapter):
        """The formula where two of its parts are one."""

        def __init__(self):
            super().__init__(DIM)
            self.other = nn.ReLU(inplace=True)

        def forward(self, x):
            return super().forward(x) * (1 if self.other is self.activation else 2)

    model = nn.Sequential(Twice(), Twice())
    model[0].other = model[0].activation
    assert petl_ext.patch(model).report().fused == 1
    assert kind_of(model[0]) and not kind_of(model[1])


def test_patching_within_inference_mode():
    with torch.inference_mode():
        model = nn.Sequential(Adapter(DIM))
        assert petl_ext.patch(model).report().fused == 1


def test_probing_compiles_nothing():
    """For whose forward is compiled there is a limit of how often."""
    compiled = []

    def backend(graph, inputs):
        compiled.append(graph)
        return graph

    class Compiled(Adapter):
        @torch.compile(backend=backend)
        def forward(self, x):
            return x + self.up_sampler(self.activation(self.down_sampler(x)))

    model, x = nn.Sequential(Compiled(DIM)), torch.randn(2, 3, DIM)
    assert petl_ext.patch(model).report().fused == 1 and not compiled
    petl_ext.unpatch(model)
    model(x)
    assert len(compiled) == 1
