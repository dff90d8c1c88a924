"""The ops on arrays of other libraries: NumPy's, and what is done for CuPy's, of which no driver is needed here."""

import gc
import sys
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from op_problems import TESTED
from problems import OPS

from petl_ext import ops
from petl_ext.ops.arrays import takes_arrays

every_op = pytest.mark.parametrize("tested", TESTED.values(), ids=str)


def as_arrays(problem):
    """By name, in the order of the op's own arguments."""
    arguments = {**problem.options, **problem.tensors}
    arguments |= {name: arguments[other] for name, other in problem.same.items()}
    return {name: value.numpy() if torch.is_tensor(value) else value for name, value in arguments.items()}


@every_op
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64], ids=str)
def test_arrays_go_in_and_come_out(tested, dtype):
    for form in tested.op.forms:
        problem = tested.problem(form=form, dtype=dtype)
        out = tested.op.ours(**as_arrays(problem))
        assert type(out) is np.ndarray
        gc.collect()
        assert np.array_equal(out, problem.call(tested.op.ours).numpy())


def test_nothing_is_copied():
    seen = []

    @takes_arrays
    def op(x, scale=1.0):
        seen.append(x)
        return x

    array = np.ones((3, 4), np.float32)
    out = op(array, 2.0)
    assert seen[0].data_ptr() == array.ctypes.data == out.ctypes.data
    array[0, 0] = 5
    assert out[0, 0] == seen[0][0, 0] == 5
    del array, seen[0]
    gc.collect()
    assert out[0, 0] == 5 and out[1, 1] == 1


def test_tensors_may_stand_beside_arrays():
    x, weight = np.ones((2, 8), np.float32), torch.nn.Parameter(torch.ones(3, 8))
    out = ops.apt(x, x, weight, weight, torch.zeros(1))
    assert type(out) is np.ndarray
    assert np.array_equal(out, ops.apt(*map(torch.from_numpy, (x, x)), weight, weight, torch.zeros(1)).detach().numpy())


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda x: x[:, ::-1], r"float32 on cpu with shape \[2, 8\] and strides \(32, -4\): a stride is negative"),
        (lambda x: x.astype(">f4"), "of >f4 on cpu"),
        (lambda x: x.astype("datetime64[s]"), "of datetime64"),
        (lambda x: np.frombuffer(x.tobytes(), np.float32).reshape(2, 8), "readonly"),
    ],
)
def test_arrays_that_cannot_be_passed_on_are_named(change, said):
    x = np.ones((2, 8), np.float32)
    with pytest.raises(TypeError, match=f"apt: y must be an array that DLPack passes on without a copy, got .*{said}"):
        ops.apt(x, change(x), x, x, np.zeros(1, np.float32))


def test_integers_are_refused_as_of_tensors():
    x = np.ones((2, 8), np.int64)
    with pytest.raises(RuntimeError, match="apt: x must be float32, bfloat16 or float16, got"):
        ops.apt(x, x, x, x, x[0, :1])


class FakeCupyArray:
    """What the ops ask of a CuPy array, on the CPU."""

    device = SimpleNamespace(id=3)

    def __init__(self, tensor):
        self.tensor, self.shape, self.dtype, self.strides = tensor, tensor.shape, tensor.dtype, (4,)

    def __dlpack_device__(self):
        return self.tensor.__dlpack_device__()

    def __dlpack__(self, **_):
        return self.tensor.__dlpack__()


FakeCupyArray.__module__ = "cupy"


@pytest.fixture
def cupy(monkeypatch):
    """A module of that name, whose current stream is number 1234."""
    cuda = SimpleNamespace(get_current_stream=lambda: SimpleNamespace(ptr=1234))
    fake = SimpleNamespace(
        cuda=cuda, ndarray=FakeCupyArray, from_dlpack=lambda out: FakeCupyArray(torch.from_dlpack(out))
    )
    monkeypatch.setitem(sys.modules, "cupy", fake)
    entered = []
    monkeypatch.setattr(torch.cuda, "ExternalStream", lambda pointer, device: (pointer, device))
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: entered.append(stream) or nullcontext())
    return entered


def test_cupy_arrays_are_computed_on_cupys_current_stream(cupy):
    import petl_ext.cupy

    assert {name for name in vars(petl_ext.cupy) if name in OPS} == set(OPS)
    problem = TESTED["apt"].problem()
    out = petl_ext.cupy.apt(*map(FakeCupyArray, problem.tensors.values()), "relu")
    assert isinstance(out, FakeCupyArray) and cupy == [(1234, 3)]
    assert torch.equal(out.tensor, problem.call(ops.apt))
    with pytest.raises(TypeError, match=r"petl_ext\.cupy\.apt: the first argument must be a cupy\.ndarray, got Tensor"):
        petl_ext.cupy.apt(*problem.tensors.values())
