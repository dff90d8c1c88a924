"""Where the time of a call on the CPU goes: what share of the processor's peak the products reach, and what all else
takes.

    python bench/cpu_shares.py [--only apt] [--rounds 40] [--keep]

compiles the kernels with PETL_TIME_WORK (csrc/kernels/cpu/work.h) into build/timed, beside the installed ones, and runs
the ops with them on one thread, at the sizes of ViLT with batch 8. --keep writes bench/results/<machine>-shares.md.

The peak is that of the processor's own product instruction in a loop without memory, in the same run. Products are
counted as eager needs them: two forward, four backward; what a kernel computes again does not count, and so lowers its
share. "outside" is all that is not the kernels: Python, allocation, copies by PyTorch.
"""

import argparse
import ctypes
import importlib.util
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch

ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / "build" / "timed"
WORK = ["outside", "rest", "products", "packing", "conversions", "normalization", "activations", "results"]
WORK += ["column sums"]


def build():
    """Compiles the timed kernels, and lets `import petl_ext` find them instead of the installed ones."""
    command = [sys.executable, "setup.py", "--quiet", "build_ext"]
    folders = ["--build-lib", str(BUILD), "--build-temp", f"{BUILD}-objects"]
    environment = {**os.environ, "PETL_CUDA": "0", "CFLAGS": "-DPETL_TIME_WORK"}
    subprocess.run([*command, *folders], cwd=ROOT, env=environment, check=True, stdout=subprocess.DEVNULL)
    (path,) = (BUILD / "petl_ext").glob("_C*.so")
    spec = importlib.util.spec_from_file_location("petl_ext._C", path)
    sys.modules["petl_ext._C"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules["petl_ext._C"])
    library = ctypes.CDLL(str(path))
    library.petl_peak_of_floats.restype = library.petl_peak_of_pairs.restype = ctypes.c_double
    return library


LIBRARY = build()

# They import petl_ext, which must find the timed kernels.
from problems import ADAPTER, APT, ATTENTION_POOL, draw, forward, forward_backward  # noqa: E402
from results import RESULTS, commit, machine_name, processor  # noqa: E402
from shapes import VILT  # noqa: E402

from petl_ext.ops.kernels import cpu_path  # noqa: E402


class Case(NamedTuple):
    """A call: of an op, with this inner size in this form, and the dtypes of its tensors."""

    op: object
    inner: int
    form: str
    x: torch.dtype
    stream: torch.dtype  # of y, or of the residual
    weights: torch.dtype
    is_autocast: bool = False

    def __str__(self):
        dtypes = [str(dtype).removeprefix("torch.") for dtype in (self.x, self.stream, self.weights)]
        if self.is_autocast:
            dtypes.append("autocast")
        form = f" {self.form}" if len(self.op.forms) > 1 and self.op is not APT else ""
        return f"{self.op.name} {self.op.inner}={self.inner}{form}, {'/'.join(dtypes)}"

    def problem(self):
        sizes = self.op.sizes_of(VILT.rows, VILT.dim, self.inner)
        problem = draw(self.op, *sizes, dtype=self.x, weight_dtype=self.weights, **self.op.forms[self.form])
        stream = {"apt": "y", "adapter": "residual"}.get(self.op.name)
        if stream in problem.tensors:
            problem = problem.change(**{stream: problem[stream].to(self.stream)})
        return problem.trained()


def cases():
    full, half = torch.float32, torch.bfloat16
    plain = [(full, full, full, False), (half, half, half, False)]
    mixed = [(half, half, full, True), (half, full, full, True), (full, half, full, True), (full, full, full, True)]
    for op, inners, forms, mixtures in (
        (APT, (50, 200), ("relu",), plain + mixed),
        (ADAPTER, (96, 192, 288), ("parallel", "sequential"), plain),
        (ADAPTER, (96,), ("parallel", "sequential"), mixed[::3]),
        (ADAPTER, (96,), ("other residual",), mixed),
        (ATTENTION_POOL, (12,), ("all tokens",), plain),
    ):
        for inner in inners:
            for form in forms:
                for dtypes in mixtures:
                    yield Case(op, inner, form, *dtypes)


def measure(case, direction, rounds):
    """Ticks of each work, medians of the rounds."""
    problem, taken, readings = case.problem(), (ctypes.c_uint64 * len(WORK))(), []
    for _ in range(rounds + 5):
        LIBRARY.petl_take_ticks(taken)
        with torch.autocast("cpu", torch.bfloat16, enabled=case.is_autocast):
            direction(problem, case.op.ours)
        LIBRARY.petl_take_ticks(taken)
        readings.append(list(taken))
    readings = sorted(readings[5:], key=sum)[: rounds // 2]  # the machine is shared: those that were disturbed least
    return dict(zip(WORK, map(statistics.median, zip(*readings, strict=True)), strict=True))


def products_of(case, direction):
    """Floating-point operations of the products that eager needs."""
    # Rows, width and inner size; of attention pooling the forward product with the tokens is one of the two as well.
    return 2 * VILT.rows * VILT.dim * case.inner * (2 if direction is forward else 6)


def peak_of_halves():
    """Of the products that the path in use makes in bfloat16."""
    if cpu_path() != "amx":
        return LIBRARY.petl_peak_of_pairs()
    LIBRARY.petl_peak_of_matrices.restype = ctypes.c_double
    return LIBRARY.petl_peak_of_matrices()


def row_of(case, direction, ticks, ticks_per_ms):
    is_half = case.is_autocast or case.x is torch.bfloat16
    peak = peak_of_halves() if is_half else LIBRARY.petl_peak_of_floats()
    share = products_of(case, direction) / (peak * ticks["products"]) if ticks["products"] else 0
    kernel = sum(ticks.values()) - ticks["outside"]
    parts = [sum(ticks.values()), kernel, *(ticks[work] for work in WORK if work not in ("outside", "rest"))]
    name = f"{case}, {'forward' if direction is forward else 'forward + backward'}"
    return [name, f"{100 * share:.0f} %", *(f"{part / ticks_per_ms:.2f}" for part in parts)]


def ticks_per_ms():
    taken = (ctypes.c_uint64 * len(WORK))()
    LIBRARY.petl_take_ticks(taken)
    begin = time.perf_counter()
    while time.perf_counter() < begin + 0.05:
        pass
    LIBRARY.petl_take_ticks(taken)
    return sum(taken) / 50


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", default="", help="cases whose name holds this")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--keep", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    speed = ticks_per_ms()
    columns = ["", "share of peak", "call", "kernel", *(work for work in WORK if work not in ("outside", "rest"))]
    lines = [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
    print(lines[0], flush=True)
    for case in cases():
        if arguments.only in str(case):
            for direction in (forward, forward_backward):
                ticks = measure(case, direction, arguments.rounds)
                lines.append(f"| {' | '.join(row_of(case, direction, ticks, speed))} |")
                print(lines[-1], flush=True)
    if arguments.keep:
        path = RESULTS / f"{machine_name(processor())}-shares.md"
        floats, pairs = (peak() * speed / 1e6 for peak in (LIBRARY.petl_peak_of_floats, peak_of_halves))
        head = (
            f"Made by `python bench/cpu_shares.py --keep`, which says what it counts, at {commit()}, on {processor()}."
            f" Peak: {floats:.0f} GFLOP/s in float32, {pairs:.0f} in bfloat16. Times are milliseconds.\n\n"
        )
        path.write_text(head + "\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
