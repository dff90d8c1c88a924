"""Counts many calls, on all cores."""

import os
from concurrent.futures import ProcessPoolExecutor
from functools import lru_cache
from typing import NamedTuple

from counting import analysis, emulated, hopper, machine_code, model


class Task(NamedTuple):
    case: tuple
    rows: int


@lru_cache(maxsize=1)
def _counter():
    return emulated.Counter(emulated.build())


@lru_cache(maxsize=1)
def _kernels(compilation):
    return machine_code.Kernels(compilation)


def _count(task, compilation):
    """The entries of a call, one for each launch."""
    entries = []
    for launch in _counter().launches(*task):
        entry = analysis.of_emulator(launch)
        entry["code"] = analysis.of_code(launch, _kernels(compilation)[launch.kernel]) if compilation else None
        entry["bounds"] = analysis.bounds(entry)
        entries.append(entry if task.rows in task.case.detailed else analysis.without_details(entry))
    return entries


def _count_hopper(task, _):
    return [hopper.of_launch(launch) for launch in _counter().launches(*task)]


def _model(task, compilation):
    """{machine: the nanoseconds of a call's launches}."""
    launches = _counter().launches(*task)
    return model.of_launches(launches, [_kernels(compilation)[launch.kernel] for launch in launches])


def _of_all(function, tasks, compilation):
    """{case: {rows: result}}; what has to be built is built before the processes begin."""
    _counter()
    if compilation:
        _kernels(compilation)
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        results = list(pool.map(function, tasks, [compilation] * len(tasks)))
    found = {}
    for task, result in zip(tasks, results, strict=True):
        found.setdefault(task.case, {})[task.rows] = result
    return found


def count(tasks, compilation):
    """{case: {rows: [entry]}}. Without a compilation only what the emulator counts."""
    return _of_all(_count, tasks, compilation)


def count_hopper(tasks):
    """The same of the Hopper path, whose entries are others (hopper.py)."""
    return _of_all(_count_hopper, tasks, None)


def run_model(tasks, compilation):
    """{case: {rows: {machine: [nanoseconds of each launch]}}}."""
    return _of_all(_model, tasks, compilation)


def compilers(compilation):
    host = emulated.host_compiler()
    return {"host": host, "device": machine_code.version(compilation) if compilation else None}
