"""What a call costs besides the time on the device: host time, launches, memory."""

import sys

import torch
from clock import call_clock, race, speed_up
from memory import saved_for_backward
from problems import OPS, draw_rows, forward, forward_backward

from gpu.bounds import counted_launches
from gpu.kernel_log import kernels_of
from gpu.speed import compiled
from gpu.step_log import record

FEW_ROWS = 240  # of one picture with its question: the device is faster than the host
MANY_ROWS = 15360
CALLS = 20  # eager's launches for as many calls still fit into the queue, so that nothing waits for the device
ROUNDS = 15


def functions_of(op):
    return {"ours": op.ours, "eager": op.reference, "compile": compiled(op.reference)}


def host_time(op, inner, step):
    problem = draw_rows(op, FEW_ROWS, 768, inner, torch.bfloat16, torch.float32, device="cuda")

    def repeat(function):
        def run():
            for _ in range(CALLS):
                step(problem, function)

        return run

    seconds = race({name: repeat(f) for name, f in functions_of(op).items()}, ROUNDS, call_clock)
    record(
        "host time per call",
        op=op.name,
        inner=inner,
        rows=FEW_ROWS,
        direction=step.__name__,
        microseconds={name: round(1e6 * sorted(s)[ROUNDS // 2] / CALLS, 2) for name, s in seconds.items()},
        speed_up={f"vs {name}": speed_up(seconds, name, "ours") for name in ("eager", "compile")},
    )


def launches(op, inner, rows):
    """(of one forward call of ours, as they were counted)"""
    problem = draw_rows(op, rows, 768, inner, torch.bfloat16, torch.float32, device="cuda")
    forward(problem, op.ours)
    kernels_of(lambda: forward(problem, op.ours))
    names = [name for name, _ in kernels_of(lambda: forward(problem, op.ours))]
    counted = counted_launches(op.name, "forward", rows, inner, "float32")
    record("launches of a forward call", op=op.name, inner=inner, rows=rows, count=len(names), names=names)
    return len(names), len(counted)


def saved_bytes(problem, function):
    """For backward, beyond the inputs themselves."""
    return sum(saved_for_backward(lambda: problem.call(function), problem.tensors.values()))


def peak_bytes(problem, function):
    """That forward and backward need beside the inputs, at most at a time."""
    forward_backward(problem, function)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    forward_backward(problem, function)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def memory(op, inner):
    problem = draw_rows(op, MANY_ROWS, 768, inner, torch.bfloat16, torch.float32, device="cuda")
    functions = functions_of(op)
    record(
        "memory",
        op=op.name,
        inner=inner,
        rows=MANY_ROWS,
        peak_bytes={name: peak_bytes(problem, f) for name, f in functions.items()},
        saved_bytes={name: saved_bytes(problem, f) for name, f in functions.items()},
    )


def main():
    counts = {
        f"{op} {op.inner}={inner} M={rows}": launches(op, inner, rows)
        for op in OPS.values()
        for inner in op.sizes
        for rows in map(op.whole, (FEW_ROWS, MANY_ROWS))
    }
    wrong = [f"{name}: {count} for {counted}" for name, (count, counted) in counts.items() if count != counted]
    text = f"launches of a forward call: {', '.join(wrong) or 'as counted'}"
    # Before the rest: if the time is not enough, what could be wrong is known.
    record("summary", text=text)
    for op in OPS.values():
        # One size is enough where the compiler takes longest.
        largest = max(op.sizes)
        for step in (forward, forward_backward):
            host_time(op, largest, step)
        memory(op, largest)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
