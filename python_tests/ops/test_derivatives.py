"""Derivatives and transformations that the kernels do not know: the reference computes them, and nothing vanishes."""

import copy
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch.autograd import forward_ad
from torch.autograd.functional import hessian

import petl_ext
from petl_ext import ops

# torch's forward mode calls torch.jit.script, and torch.jit.trace is what is tested.
pytestmark = pytest.mark.filterwarnings(r"ignore:.torch\.jit\..* is deprecated:DeprecationWarning")

DIM = 16


def normal(*shape, seed=0, std=0.5):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * std


@dataclass(frozen=True)
class Case:
    """An op on tensors of which every one can have a gradient."""

    op: str
    call: Any  # (function, *tensors) to the output
    tensors: tuple

    def ours(self, *tensors):
        return self.call(getattr(ops, self.op), *tensors)

    def reference(self, *tensors):
        return self.call(getattr(ops, f"{self.op}_reference"), *tensors)

    def __str__(self):
        return self.op


X = normal(2, 7, DIM)
WEIGHTS = (normal(6, DIM, seed=1), normal(6, seed=2), normal(DIM, 6, seed=3), normal(DIM, seed=4))
NORM = (normal(DIM, seed=5) + 1, normal(DIM, seed=6))
CASES = {
    "apt": Case(
        "apt",
        lambda op, *tensors: op(*tensors),
        (X, normal(2, 7, DIM, seed=1), normal(5, DIM, seed=2), normal(5, DIM, seed=3), normal(1)),
    ),
    "apt, softmax, one tensor twice": Case(
        "apt",
        lambda op, x, *tensors: op(x, x, *tensors, "softmax"),
        (X, normal(5, DIM, seed=2), normal(5, DIM, seed=3), normal(1)),
    ),
    "adapter": Case("adapter", lambda op, x, *weights: op(x, *weights, residual=x, activation="gelu"), (X, *WEIGHTS)),
    "adapter, everything": Case(
        "adapter",
        lambda op, x, residual, gain, norm, bias, *weights: op(
            x, *weights, scale=gain, activation="silu", norm_weight=norm, norm_bias=bias, residual=residual
        ),
        (X, normal(2, 7, DIM, seed=7), normal(1), *NORM, *WEIGHTS),
    ),
    "attention_pool": Case(
        "attention_pool", lambda op, visual, query: op(visual, query, scale=0.3), (X, normal(2, 3, DIM, seed=1))
    ),
    "attention_pool, masked": Case(
        "attention_pool",
        lambda op, visual, query: op(visual, query, torch.arange(7)[None].expand(2, 7) < 5),
        (X, normal(2, 3, DIM, seed=1)),
    ),
}
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def penalized(function, tensors, which):
    """All gradients of the output and of a penalty on its gradient to tensor `which`."""
    tensors = [tensor.clone().requires_grad_() for tensor in tensors]
    out = function(*tensors)
    (gradient,) = torch.autograd.grad(out.square().sum(), tensors[which], create_graph=True)
    loss = out.square().mean() + (gradient.norm() - 1).square()
    return torch.autograd.grad(loss, tensors)


@every_case
def test_a_gradient_penalty(case):
    for which in range(len(case.tensors)):
        ours, expected = (penalized(f, case.tensors, which) for f in (case.ours, case.reference))
        for found, wanted in zip(ours, expected, strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5 * wanted.abs().max().item())


@every_case
def test_a_gradient_penalty_where_one_tensor_alone_requires_a_gradient(case):
    def penalty(function):
        x = case.tensors[0].clone().requires_grad_()
        (gradient,) = torch.autograd.grad(function(x, *case.tensors[1:]).sum(), x, create_graph=True)
        return gradient, torch.autograd.grad(gradient.square().sum(), x, allow_unused=True, materialize_grads=True)[0]

    for found, wanted in zip(penalty(case.ours), penalty(case.reference), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


@every_case
def test_hessian(case):
    def rows(function):
        return hessian(lambda x: function(x, *case.tensors[1:]).square().sum(), case.tensors[0])

    torch.testing.assert_close(rows(case.ours), rows(case.reference), rtol=1e-4, atol=1e-4)


@every_case
@pytest.mark.parametrize("requires_grad", [False, True])
def test_forward_mode(case, requires_grad):
    tangents = [normal(*tensor.shape, seed=9 + i) for i, tensor in enumerate(case.tensors)]

    def tangent(function):
        with forward_ad.dual_level():
            given = zip(case.tensors, tangents, strict=True)
            duals = [forward_ad.make_dual(t.clone().requires_grad_(requires_grad), d) for t, d in given]
            return forward_ad.unpack_dual(function(*duals)).tangent.detach()

    assert tangent(case.ours).abs().max() > 0
    torch.testing.assert_close(tangent(case.ours), tangent(case.reference))


@every_case
def test_transformations_of_torch_func(case):
    some = [torch.stack([tensor, tensor + 0.1, tensor - 0.1]) for tensor in case.tensors]
    expected = torch.stack([case.reference(*tensors) for tensors in zip(*some, strict=True)])
    torch.testing.assert_close(torch.vmap(case.ours)(*some), expected)
    gradient, jvp = torch.func.grad(lambda x: case.ours(x, *case.tensors[1:]).square().sum()), torch.func.jvp
    x = case.tensors[0].clone().requires_grad_()
    (wanted,) = torch.autograd.grad(case.reference(x, *case.tensors[1:]).square().sum(), x)
    torch.testing.assert_close(gradient(case.tensors[0]), wanted)
    (out, tangent), (_, wanted) = (jvp(f, case.tensors, case.tensors) for f in (case.ours, case.reference))
    torch.testing.assert_close(tangent, wanted)
    torch.testing.assert_close(out, case.reference(*case.tensors))


LAYERS = {
    "APTLayer": (lambda: petl_ext.APTLayer(DIM, 5, 2), (X, normal(2, 7, DIM, seed=1))),
    "AdapterLayer": (lambda: petl_ext.AdapterLayer(DIM, 6, layer_norm=True), (X,)),
    "VisualPromptLayer": (lambda: petl_ext.VisualPromptLayer(DIM, 4), (X, normal(2, DIM, seed=1))),
}
every_layer = pytest.mark.parametrize(("make", "inputs"), LAYERS.values(), ids=LAYERS)


@every_layer
@pytest.mark.parametrize("gradients", [False, True])
def test_an_ensemble_of_layers_under_vmap(make, inputs, gradients):
    layers = [make().eval() for _ in range(3)]
    parameters, buffers = torch.func.stack_module_state(layers)
    base = copy.deepcopy(layers[0]).to("meta")

    def call(parameters, buffers):
        return torch.func.functional_call(base, (parameters, buffers), inputs)

    with torch.set_grad_enabled(gradients):
        found = torch.vmap(call)(parameters, buffers)
        torch.testing.assert_close(found, torch.stack([layer(*inputs) for layer in layers]))
    if gradients:
        found.square().sum().backward()
        for layer in layers:
            layer(*inputs).square().sum().backward()
        for name, stacked in parameters.items():
            wanted = torch.stack([layer.get_parameter(name).grad for layer in layers])
            torch.testing.assert_close(stacked.grad, wanted)


@every_layer
def test_traced_and_saved(make, inputs, tmp_path):
    layer = make().eval()
    torch.jit.save(torch.jit.trace(layer, inputs), tmp_path / "layer.pt")
    traced = torch.jit.load(tmp_path / "layer.pt")
    more = tuple(torch.cat([tensor, tensor + 0.5, tensor]) for tensor in inputs)
    torch.testing.assert_close(traced(*more), layer(*more))
    for module in (traced, layer):
        module(*more).square().sum().backward()
    for name, parameter in traced.named_parameters():
        torch.testing.assert_close(parameter.grad, layer.get_parameter(name).grad)


@every_layer
@pytest.mark.parametrize("strict", [False, True])
def test_exported_with_a_batch_and_a_length_that_change(make, inputs, strict):
    layer = make().eval()
    batch, length = torch.export.Dim("batch", min=2, max=64), torch.export.Dim("length", min=2, max=99)
    shapes = tuple({0: batch, 1: length} if tensor.dim() == 3 else {0: batch} for tensor in inputs)
    larger = tuple(normal(5, *(9,) * (tensor.dim() - 2), DIM, seed=3) for tensor in inputs)
    for gradients in (False, True):
        with torch.set_grad_enabled(gradients):
            program = torch.export.export(layer, inputs, dynamic_shapes=shapes, strict=strict).module()
            torch.testing.assert_close(program(*larger), layer(*larger))
