"""Each op against PyTorch's eager mode and torch.compile, at the shapes of the models that it serves."""

import pytest
import torch
from problems import ADAPTER, APT, OPS, draw, forward, forward_backward
from shapes import VILT

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# Of x, and of y or the residual, under autocast beside weights in float32.
MIXTURES = [(x, stream) for x in DTYPES for stream in DTYPES]
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


@pytest.mark.parametrize("direction", [forward, forward_backward], ids=lambda f: f.__name__)
@pytest.mark.parametrize(("x", "stream"), MIXTURES)
@pytest.mark.parametrize(
    ("op", "inner", "form"),
    [(APT, 50, "relu"), (APT, 200, "relu"), *((ADAPTER, inner, "other residual") for inner in (96, 192, 288))]
    + [(ADAPTER, inner, form) for inner in (96, 192, 288) for form in ADAPTER.cpu_forms],
    ids=str,
)
def test_under_autocast(op, inner, form, x, stream, direction, compare):
    """As torch.autocast makes of a model: the parallel and the sequential adapter know one stream alone."""
    if form in ADAPTER.cpu_forms and x != stream:
        pytest.skip("one stream")
    problem = draw(op, VILT.rows, VILT.dim, inner, dtype=DTYPES[x], weight_dtype=torch.float32, **op.forms[form])
    dtypes = {"y": stream, "residual": stream}
    streams = {name: problem[name].to(DTYPES[dtypes[name]]) for name in dtypes if name in problem.tensors}
    problem = problem.change(**streams)
    if direction is forward_backward:
        problem = problem.trained()

    def under_autocast(function):
        with torch.autocast("cpu", torch.bfloat16):
            direction(problem, function)

    contenders = {
        name: lambda function=function: under_autocast(function) for name, function in functions_of(op).items()
    }
    form = form if op is ADAPTER else ""
    title = f"{op.name} {direction.__name__} autocast {x}/{stream} {VILT} {op.inner}={inner} {form}".rstrip()
    compare(title, VILT, contenders)
