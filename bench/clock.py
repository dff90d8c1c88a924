"""The clocks: contenders run in turns in one process, and are compared round by round.

Machines are shared and their speed drifts within seconds; a ratio of neighbors in time survives that, an absolute
time does not.

A clock is called with what is to be timed, and returns a function that says how many seconds it took.
"""

import statistics
import time

import torch

WARM_UP = 3


def host_clock(run):
    """For work that is done when `run` returns."""
    start = time.perf_counter()
    run()
    seconds = time.perf_counter() - start
    return lambda: seconds


def thread_clock(run):
    """Time that this thread has had of a processor: what work on one thread costs, however busy the machine."""
    start = time.thread_time()
    run()
    seconds = time.thread_time() - start
    return lambda: seconds


def cuda_clock(run):
    """Device time, between two events in the current stream.

    Nothing is waited for: the next run is in the queue before this one ends, so that host time does not count.
    """
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()

    def seconds():
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    return seconds


def call_clock(run):
    """Host time of putting work into the queue of a GPU that has nothing to do."""
    torch.cuda.synchronize()
    return host_clock(run)


def race(contenders, rounds, clock=host_clock):
    """Seconds of each contender in each round.

    Args:
        contenders: name to function without arguments.
        rounds: how often each runs, after a few runs to warm up.
        clock: one of those above.
    """
    for run in contenders.values():
        for _ in range(WARM_UP):
            run()
    readings = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, run in contenders.items():
            readings[name].append(clock(run))
    return {name: [seconds() for seconds in of_one] for name, of_one in readings.items()}


def speed_up(seconds, over, of):
    """How many times faster `of` is than `over`: the median over the rounds, and the 10th and 90th percentile."""
    ratios = [slow / fast for slow, fast in zip(seconds[over], seconds[of], strict=True)]
    tenths = statistics.quantiles(ratios, n=10)
    return {"median": round(statistics.median(ratios), 2), "p10": round(tenths[0], 2), "p90": round(tenths[-1], 2)}
