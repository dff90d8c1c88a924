"""The lean path and the Hopper path, side by side, after a look at whether their results are right."""

import statistics
import sys
from contextlib import contextmanager

import torch
from clock import race, speed_up
from problems import ADAPTER, APT

from gpu import speed
from gpu.step_log import record
from gpu.traffic import FORWARD, FORWARD_BACKWARD

# The most important first.
RUNS = (
    (15360, FORWARD),
    (15360, FORWARD_BACKWARD),
    (61440, FORWARD),
    (61440, FORWARD_BACKWARD),
    (1920, FORWARD),
)
SIZES = {APT: (50, 200), ADAPTER: (96, 192)}
ROUNDS = 15
PATHS = {"lean": "0", "hopper": "1"}


@contextmanager
def by(path):
    before = torch.ops.petl_ext.hopper_state("")
    torch.ops.petl_ext.hopper_state(PATHS[path])
    try:
        yield
    finally:
        torch.ops.petl_ext.hopper_state("1" if before.startswith("on") else "0")


def cases():
    for rows, direction in RUNS:
        for op, sizes in SIZES.items():
            for inner in sizes:
                yield speed.Case(op, direction, rows, 768, inner, torch.bfloat16)


def compare(case, bench):
    """The record of one case."""
    problems = speed.draw_cold(case, bench)
    count = -(-bench.fewest_calls // len(problems)) * len(problems)
    wrong, replays = {}, {}
    for path in PATHS:
        with by(path):
            wrong[path] = speed.wrong_results(case, problems[0], case.op.ours)
            replays[path] = bench.capture(speed.calls_of(case, problems, case.op.ours, count))
    seconds = race(replays, ROUNDS, bench.clock)
    microseconds = {path: round(1e6 * statistics.median(seconds[path]) / count, 2) for path in PATHS}
    faster = speed_up(seconds, over="lean", of="hopper")
    return {"name": str(case), "wrong": wrong, "microseconds": microseconds, "hopper over lean": faster}


def main():
    bench, flawed, told = speed.on_the_gpu(), [], []
    for case in cases():
        result = compare(case, bench)
        record("hopper comparison", **result)
        told.append(f"{case}: {result['microseconds']['lean']} -> {result['microseconds']['hopper']} us")
        if any(result["wrong"].values()):
            flawed.append(str(case))
        torch.cuda.empty_cache()
    record("summary", text="; ".join([*told, *(f"WRONG: {name}" for name in flawed)]))
    return 1 if flawed else 0


if __name__ == "__main__":
    sys.exit(main())
