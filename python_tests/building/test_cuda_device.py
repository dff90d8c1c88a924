"""The CUDA kernels on a GPU: as the emulator says they are, and the same bits however they are queued."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from clear_masks import with_clear_mask
from devices import emulation
from gpu.every_kernel import DTYPES
from gpu.graphs import captured
from problems import OPS, draw_rows, forward, forward_backward
from tolerance import assert_as_good_as_torch

from petl_ext.ops.kernels import OPS as KERNELS

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

ROWS = 131
SIZES = [pytest.param(op, inner, id=f"{op}-{inner}") for op in OPS.values() for inner in op.every_size]
every_op_and_size = pytest.mark.parametrize(("op", "inner"), SIZES)
every_dtype = pytest.mark.parametrize("dtypes", DTYPES.values(), ids=DTYPES)
both_directions = pytest.mark.parametrize("step", [forward, forward_backward], ids=lambda step: step.__name__)

# Each activation at the small width, the usual one at that of the models too.
ACTIVATIONS_AND_SIZES = [
    pytest.param(op, activation, dim, inner, id=f"{op}-{activation}-{dim}-{inner}")
    for op in OPS.values()
    for inner in op.every_size
    for dim in (72, 768)
    for activation in (op.activations if dim == 72 else op.activations[:1])
]


def same_bits(results, expected):
    return all(torch.equal(result, expected[name]) for name, result in results.items())


def large_problem(op, dtypes, inner, seed=0):
    """More rows than a slab of the weights' gradients, more blocks than multiprocessors."""
    return draw_rows(op, 20_000, 72, inner, *dtypes, device="cuda", seed=seed)


@every_dtype
@pytest.mark.parametrize(("op", "activation", "dim", "inner"), ACTIVATIONS_AND_SIZES)
def test_hardware_and_emulator_agree(op, activation, dim, inner, dtypes, record_property):
    problem = draw_rows(op, ROWS, dim, inner, *dtypes, activation=activation)
    if activation == "relu":
        problem = with_clear_mask(problem)
    with emulation():
        emulated = {name: result.cuda() for name, result in forward_backward(problem, op.ours).items()}
    problem = problem.to("cuda")
    hardware, torchs = forward_backward(problem, op.ours), forward_backward(problem, op.reference)
    oracle = forward_backward(problem.double(), op.reference)
    difference = {
        name: float((result.double() - emulated[name].double()).abs().max() / emulated[name].double().abs().max())
        for name, result in hardware.items()
    }
    record_property("largest difference from the emulator", {"difference": difference})
    for name in hardware:
        ours, emulators, theirs, exact = (results[name].double() for results in (hardware, emulated, torchs, oracle))
        if exact.numel() == 1:
            continue  # how far torch is off a single number is chance
        assert_as_good_as_torch(f"{name} on the GPU", ours, theirs, exact)
        # As far from the emulator as torch may be from the exact value.
        assert_as_good_as_torch(f"{name}, GPU against emulator", ours, emulators + (theirs - exact), emulators)


@every_dtype
@every_op_and_size
def test_two_runs_are_bit_equal(op, dtypes, inner):
    problem = large_problem(op, dtypes, inner)
    expected = forward_backward(problem, op.ours)
    assert same_bits(forward_backward(problem, op.ours), expected)


@every_op_and_size
def test_two_streams_at_once(op, inner):
    problems = [large_problem(op, DTYPES["mixed"], inner, seed) for seed in range(2)]
    expected = [forward_backward(problem, op.ours) for problem in problems]
    torch.cuda.synchronize()
    streams, results = [torch.cuda.Stream() for _ in problems], []
    for _ in range(5):
        for stream, problem, wanted in zip(streams, problems, expected, strict=True):
            with torch.cuda.stream(stream):
                results.append((forward_backward(problem, op.ours), wanted))
    torch.cuda.synchronize()
    assert all(same_bits(result, wanted) for result, wanted in results)


@every_op_and_size
def test_two_threads_at_once(op, inner):
    problems = [large_problem(op, DTYPES["mixed"], inner, seed) for seed in range(2)]
    expected = [forward_backward(problem, op.ours) for problem in problems]
    torch.cuda.synchronize()

    def run(problem):
        with torch.cuda.stream(torch.cuda.Stream()):
            results = [forward_backward(problem, op.ours) for _ in range(5)]
            torch.cuda.current_stream().synchronize()
        return results

    with ThreadPoolExecutor(2) as pool:
        for results, wanted in zip(pool.map(run, problems), expected, strict=True):
            assert all(same_bits(result, wanted) for result in results)


@every_dtype
@every_op_and_size
@both_directions
def test_graph_gives_the_same_bits(op, dtypes, inner, step):
    problem, other = (large_problem(op, dtypes, inner, seed) for seed in range(2))
    expected, expected_of_other = step(problem, op.ours), step(other, op.ours)
    replay = captured(lambda: step(problem, op.ours))
    for result in replay().values():
        result.fill_(torch.nan)
    assert same_bits(replay(), expected)
    with torch.no_grad():
        for name, tensor in problem.tensors.items():
            tensor.copy_(other.tensors[name])
        problem.dout.copy_(other.dout)
    assert same_bits(replay(), expected_of_other)


@pytest.mark.parametrize("name", [name for name, op in KERNELS.items() if op.has_dropout])
def test_a_graph_drops_out_anew_at_each_replay(name):
    """As torch's dropout does, and by the generator's seed."""
    problem = large_problem(OPS[name], DTYPES["mixed"], 50)
    problem.options["dropout"] = 0.5
    replay = captured(lambda: forward_backward(problem, OPS[name].ours))

    def replayed(seed):
        torch.cuda.manual_seed(seed)
        return [{key: result.clone() for key, result in replay().items()} for _ in range(2)]

    first, second = replayed(0)
    assert not torch.equal(first["out"], second["out"])
    assert all(map(same_bits, replayed(0), (first, second)))
