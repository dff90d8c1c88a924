"""Which kernels a forward and backward call consists of, and what each takes: where tuning begins."""

from collections import defaultdict

import torch
from problems import OPS

from gpu.kernel_log import kernels_of
from gpu.speed import DIRECTIONS, Case, calls_of, draw_cold, on_the_gpu
from gpu.step_log import record

ROWS = 61440


def measure(case, bench):
    """Prints and records each kernel of a case; its inputs are cold, as in speed.py."""
    problems = draw_cold(case, bench)
    calls = 2 * len(problems)
    run = calls_of(case, problems, case.op.ours, calls)
    run()
    kernels_of(run)
    microseconds = defaultdict(list)
    for name, time in kernels_of(run):
        microseconds[name].append(time)
    for name, times in microseconds.items():
        mean, per_call = round(sum(times) / len(times), 2), len(times) / calls
        print(f"{case!s:60} {mean:9.2f} us x {per_call:g}  {name[:160]}")
        record("kernel", case=str(case), name=name, microseconds=mean, launches_per_call=per_call)


def main():
    bench = on_the_gpu()
    for op in OPS.values():
        for inner in op.sizes:
            for direction in DIRECTIONS:
                measure(Case(op, direction, op.whole(ROWS), 768, inner, torch.float32), bench)
    record("summary", text=f"of {', '.join(OPS)} at {ROWS} rows")


if __name__ == "__main__":
    main()
