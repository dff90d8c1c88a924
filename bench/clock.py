"""The one clock: contenders run in turns in one process, and are compared round by round.

Machines are shared and their speed drifts within seconds; a ratio of neighbours in time survives that, an absolute
time does not.
"""

import statistics
import time

WARM_UP = 3


def race(contenders, rounds, synchronize=lambda: None):
    """Seconds of each contender in each round.

    Args:
        contenders: name to function without arguments.
        rounds: how often each runs, after a few runs to warm up.
        synchronize: waits for the device.
    """
    for run in contenders.values():
        for _ in range(WARM_UP):
            run()
    seconds = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, run in contenders.items():
            synchronize()
            start = time.perf_counter()
            run()
            synchronize()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def speed_up(seconds, over, of):
    """How many times faster `of` is than `over`: the median over the rounds, and the 10th and 90th percentile."""
    ratios = [slow / fast for slow, fast in zip(seconds[over], seconds[of], strict=True)]
    tenths = statistics.quantiles(ratios, n=10)
    return {"median": round(statistics.median(ratios), 2), "p10": round(tenths[0], 2), "p90": round(tenths[-1], 2)}
