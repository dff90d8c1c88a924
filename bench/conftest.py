"""Turns pytest-benchmark's report into rows of this machine's table: what was compared, where, and the ratios."""

import datetime
import os
import platform

import pytest
import torch
from clock import host_clock, race, speed_up
from results import RESULTS, commit, keep, processor

import petl_ext


def pytest_addoption(parser):
    parser.addoption("--rounds", type=int, default=15, help="interleaved rounds per comparison")
    parser.addoption("--keep", action="store_true", help="write the ratios to the machine's table in bench/results")


def pytest_configure(config):
    # torch.compile's own compiler causes it when it is loaded.
    config.addinivalue_line("filterwarnings", "ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")
    if config.getoption("--rounds") < 2:
        raise pytest.UsageError(f"--rounds must be at least 2, got {config.getoption('--rounds')}")


@pytest.fixture
def rounds(request):
    return request.config.getoption("--rounds")


@pytest.fixture
def compare(rounds, benchmark, record_property):
    """Lets contenders run in turns, and keeps how many times faster than each of the others one of them is."""

    def run(name, shape, contenders, ours="ours", clock=host_clock, **more):
        """
        Args:
            name: of the comparison.
            shape: one of shapes.py.
            contenders: name to function without arguments.
            ours: name of the contender that is compared with all others.
            clock: one of clock.py.
            more: what else is to be kept.
        """
        seconds = race(contenders, rounds, clock)
        comparison = {
            "name": name,
            "rows": shape.rows,
            "dim": shape.dim,
            "milliseconds": round(1e3 * sorted(seconds[ours])[rounds // 2], 3),
            "speed_up": {f"vs {other}": speed_up(seconds, other, ours) for other in contenders if other != ours},
        }
        record_property("comparison", comparison | more)
        benchmark.pedantic(contenders[ours], rounds=rounds)

    return run


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def pytest_terminal_summary(terminalreporter):
    reports = terminalreporter.getreports("passed")
    rows = [dict(report.user_properties)["comparison"] for report in reports if report.user_properties]
    if not rows:
        return
    terminalreporter.section("times faster than the contender: median of the rounds [10th, 90th percentile]")
    for row in rows:
        ratios = "   ".join(
            f"{name} {ratio['median']:.2f} [{ratio['p10']:.2f}, {ratio['p90']:.2f}]"
            for name, ratio in row["speed_up"].items()
        )
        terminalreporter.write_line(f"{row['name']:60} {row['milliseconds']:9.2f} ms   {ratios}")
    if terminalreporter.config.getoption("--keep"):
        terminalreporter.write_line(f"written to {_write(rows)}")


def _write(rows):
    run = {
        "date": datetime.date.today().isoformat(),
        "commit": commit(),
        "cpu_path": petl_ext.ops.cpu_path(),
        "onednn_isa_limit": os.environ.get("ONEDNN_MAX_CPU_ISA"),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "threads": 1,
    }
    return keep(processor(), [{"name": row["name"]} | run | row for row in rows]).relative_to(RESULTS.parent.parent)
