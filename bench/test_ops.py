"""Each op against PyTorch's eager mode and torch.compile, at the shapes of the models that it serves."""

import pytest
import torch
from problems import OPS, draw, forward, forward_backward

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
CASES = [
    pytest.param(op, shape, inner, form, id=f"{op}-{shape}-{inner}-{form}")
    for op in OPS.values()
    for shape, inner in op.cpu_cases
    for form in op.cpu_forms
]


def functions_of(op):
    # Without it the ninth shape would run uncompiled, silently: a function is compiled anew eight times at most.
    torch._dynamo.reset()
    return {"eager": op.reference, "compile": torch.compile(op.reference, dynamic=False), "ours": op.ours}


def name_of(op, shape, inner, form, *words):
    """The form is named where several are measured."""
    return " ".join([op.name, *words, f"{shape} {op.inner}={inner}", *([form] if len(op.cpu_forms) > 1 else [])])


@pytest.mark.parametrize("direction", [forward, forward_backward], ids=lambda f: f.__name__)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("op", "shape", "inner", "form"), CASES)
def test_op(op, shape, inner, form, dtype, direction, compare):
    sizes = op.sizes_of(shape.rows, shape.dim, inner)
    problem = draw(op, *sizes, dtype=DTYPES[dtype], **op.forms[form])
    if direction is forward_backward:
        problem = problem.trained()
    contenders = {
        name: lambda function=function: direction(problem, function) for name, function in functions_of(op).items()
    }
    compare(name_of(op, shape, inner, form, direction.__name__, dtype), shape, contenders)
