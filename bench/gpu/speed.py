"""How fast the ops are: against eager PyTorch, torch.compile, Triton and a plain copy of as many bytes.

Each contender is captured in a CUDA graph of several calls, so that host time does not count. The calls take turns over
inputs that together are larger than four times the L2 cache, and each writes to memory of its own: all is cold, as in
a model, where other layers have been at work in between.
"""

import statistics
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass

import torch
from clock import cuda_clock, race, speed_up
from problems import OPS, Op, draw_rows, forward, forward_backward

from gpu.bounds import bound_of
from gpu.graphs import captured
from gpu.step_log import record, seconds_granted
from gpu.summary import triton_in_words
from gpu.traffic import FORWARD, FORWARD_BACKWARD, LEAST, OWN, verdicts
from petl_ext import ops

DIRECTIONS = {FORWARD: forward, FORWARD_BACKWARD: forward_backward}
ROWS = (15360, 61440)
ROUNDS = 25
FEWEST_CALLS = 12  # in a graph, so that launching the graph itself does not count
MOST_ERROR = 1e-2  # relative, of a bfloat16 result that is right
# Compiled by trying every kernel that the compiler knows, which takes some 20 seconds: of each op once, at the end.
MAX_AUTOTUNE = "max-autotune-no-cudagraphs"


@dataclass(frozen=True)
class Case:
    op: Op
    direction: str
    rows: int
    dim: int
    inner: int
    weight_dtype: torch.dtype
    is_tuned: bool = False

    @property
    def most_seconds(self):
        """That it may take: it is not begun when fewer are left."""
        return 45 if self.is_tuned else 25

    @property
    def weights(self):
        return str(self.weight_dtype).removeprefix("torch.")

    def __str__(self):
        tuned = " against max-autotune" if self.is_tuned else ""
        return f"{self.op} {self.direction} M={self.rows} {self.op.inner}={self.inner} weights {self.weights}{tuned}"


@dataclass(frozen=True)
class Bench:
    """Where and how it is measured.

    Attributes:
        capture: from a function that makes calls to one that makes them again; see graphs.py.
        clock: one of clock.py.
        cold_bytes: how large all inputs together are at least.
    """

    device: str
    capture: Callable
    clock: Callable
    cold_bytes: int
    rounds: int = ROUNDS
    fewest_calls: int = FEWEST_CALLS


def cases():
    """The most important first: the time may not suffice for all."""
    for weight_dtype in (torch.float32, torch.bfloat16):
        for rows in ROWS:
            for op in OPS.values():
                for inner in op.sizes:
                    for direction in DIRECTIONS:
                        yield Case(op, direction, op.whole(rows), 768, inner, weight_dtype)
    for op in OPS.values():
        yield Case(op, FORWARD, op.whole(ROWS[0]), 768, max(op.sizes), torch.float32, is_tuned=True)


def compiled(function, mode="default"):
    # Without it the ninth case would run uncompiled, silently: a function is compiled anew eight times at most.
    torch._dynamo.reset()
    return torch.compile(function, dynamic=False, mode=mode)


def by_triton(function):
    """The same op, computed by the backend in Triton."""

    def call(*arguments, **named):
        with ops.backend("triton"):
            return function(*arguments, **named)

    return call


def contenders_of(case):
    op = case.op
    if case.is_tuned:
        return {"ours": op.ours, "max-autotune": compiled(op.reference, MAX_AUTOTUNE)}
    return {
        "ours": op.ours,
        "eager": op.reference,
        "compile": compiled(op.reference),
        "triton": by_triton(op.ours),
    }


def draw_cold(case, bench):
    """As many problems as are larger than the cache."""
    bytes_of_one = 2 * case.rows * case.dim * (len(case.op.rows) + (case.direction == FORWARD_BACKWARD))
    count = max(2, -(-bench.cold_bytes // bytes_of_one))
    return [
        draw_rows(
            case.op, case.rows, case.dim, case.inner, torch.bfloat16, case.weight_dtype, device=bench.device, seed=seed
        )
        for seed in range(count)
    ]


def calls_of(case, problems, function, count):
    step = DIRECTIONS[case.direction]
    return lambda: [step(problems[index % len(problems)], function) for index in range(count)]


def copies_of(bytes_moved, bench, count):
    """Two ways to read and write `bytes_moved` bytes in all: the runtime's copy, and a kernel that reads and writes."""
    elements = bytes_moved // 2 // 2
    buffers = [
        torch.randn(2, elements, device=bench.device, dtype=torch.bfloat16)
        for _ in range(max(2, -(-bench.cold_bytes // bytes_moved)))
    ]

    def repeat(copy):
        return lambda: [copy(*buffers[index % len(buffers)]) for index in range(count)]

    return {
        "copy": repeat(lambda source, target: target.copy_(source)),
        "copy kernel": repeat(lambda source, target: torch.neg(source, out=target)),
    }


def relative_errors(case, problem, function, oracle):
    results = DIRECTIONS[case.direction](problem, function)
    return {
        name: float((result.double() - oracle[name]).norm() / oracle[name].norm()) for name, result in results.items()
    }


def wrong_results(case, problem, ours):
    """Name to relative error of what is not right, at the very sizes that are measured."""
    oracle = DIRECTIONS[case.direction](problem.double(), case.op.reference)
    our_errors, eager_errors = (relative_errors(case, problem, f, oracle) for f in (ours, case.op.reference))
    # Written so that NaN is wrong.
    return {
        name: our_error
        for name, our_error in our_errors.items()
        if not our_error <= max(2 * eager_errors[name], MOST_ERROR)
    }


def capture_all(queues, bench):
    """(name to replay, name to what went wrong)"""
    replays, failures = {}, {}
    for name, queue in queues.items():
        try:
            replays[name] = bench.capture(queue)
        # Whatever ails another contender, or the compiler, must not hide our own times.
        except Exception as error:
            failures[name] = f"{type(error).__name__}: {error}"[:500]
    return replays, failures


def compare(case, contenders, bench):
    """The record of one case.

    Args:
        contenders: name to function with the op's signature; "ours" is one of them.
    """
    problems = draw_cold(case, bench)
    wrong = wrong_results(case, problems[0], contenders["ours"])
    count = -(-bench.fewest_calls // len(problems)) * len(problems)
    sizes = (case.rows, case.dim, case.inner)
    least, own = LEAST[case.op.name, case.direction], OWN[case.op.name, case.direction]
    queues = {name: calls_of(case, problems, function, count) for name, function in contenders.items()}
    queues |= copies_of(least.bytes(*sizes), bench, count)
    replays, failures = capture_all(queues, bench)
    result = {
        "name": str(case),
        "op": case.op.name,
        "direction": case.direction,
        "rows": case.rows,
        "dim": case.dim,
        "inner": case.inner,
        "weights": case.weights,
        "bound_microseconds": bound_of(case.op.name, case.direction, case.rows, case.inner, case.weights),
        "wrong": wrong,
        "failures": failures,
        "calls_per_graph": count,
        "least_bytes": least.bytes(*sizes),
        "least_bytes_formula": str(least),
        "own_bytes": own.bytes(*sizes),
        "own_bytes_formula": str(own),
    }
    if "ours" not in replays:
        return result
    return result | speeds(case, race(replays, bench.rounds, bench.clock), count, result)


def speeds(case, seconds, count, sizes):
    """What follows from the seconds that `count` calls took in each round."""
    per_call = {name: statistics.median(of_one) / count for name, of_one in seconds.items()}
    fastest_copy = min(("copy", "copy kernel"), key=per_call.get)
    others = [name for name in seconds if name not in ("ours", "copy", "copy kernel")]
    speed_ups = {f"vs {name}": speed_up(seconds, over=name, of="ours") for name in others}
    share_of_least = per_call[fastest_copy] / per_call["ours"]
    share_of_own = share_of_least * sizes["own_bytes"] / sizes["least_bytes"]
    return {
        "microseconds": {name: round(1e6 * value, 2) for name, value in per_call.items()},
        "speed_up": speed_ups,
        "own_gigabytes_per_second": round(1e-9 * sizes["own_bytes"] / per_call["ours"], 1),
        "copy_gigabytes_per_second": round(1e-9 * sizes["least_bytes"] / per_call[fastest_copy], 1),
        "share_of_least": round(share_of_least, 3),
        "share_of_own": round(share_of_own, 3),
        "goals": verdicts(case.op.name, case.direction, case.inner, round(share_of_own, 3), speed_ups),
    }


def on_the_gpu():
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    return Bench("cuda", captured, cuda_clock, cold_bytes=4 * cache)


def main():
    end = time.monotonic() + seconds_granted(default=600)
    bench = on_the_gpu()
    measured, left_out, flawed, lost = 0, [], [], []
    for case in cases():
        if time.monotonic() > end - case.most_seconds:
            left_out.append(str(case))
            continue
        try:
            result = compare(case, contenders_of(case), bench)
        # One op that cannot be run must not hide the times of the others.
        except Exception as error:
            traceback.print_exc()
            record("failed comparison", name=str(case), error=str(error)[:500])
            flawed.append(str(case))
            continue
        record("comparison", **result)
        measured += 1
        if words := triton_in_words(result):
            lost.append(f"{case}: {words}")
        if result["wrong"] or "ours" in result["failures"]:
            flawed.append(str(case))
        torch.cuda.empty_cache()
    record("left out for lack of time", cases=left_out)
    faults = f", failed, wrong or not captured: {', '.join(flawed)}" if flawed else ""
    faults += "".join(f"; {words}" for words in lost)
    record("summary", text=f"{measured} comparisons, {len(left_out)} left out for lack of time{faults}")
    return 1 if flawed or not measured else 0


if __name__ == "__main__":
    sys.exit(main())
