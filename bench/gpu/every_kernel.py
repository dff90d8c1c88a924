"""Runs each CUDA kernel once, for compute-sanitizer and ncu to look at."""

import argparse
import itertools
import sys

import torch
from problems import OPS, draw_rows, forward, forward_backward

from gpu.step_log import record

# Of activations and weights.
DTYPES = {
    "float32": (torch.float32, torch.float32),
    "bfloat16": (torch.bfloat16, torch.bfloat16),
    "float16": (torch.float16, torch.float16),
    "mixed": (torch.bfloat16, torch.float32),
}


def problems(rows, dims, dtypes, measured_sizes, every_activation, device):
    """(name, problem) of each combination."""
    for op in OPS.values():
        activations = op.activations if every_activation else op.activations[:1]
        sizes = op.sizes if measured_sizes else op.every_size
        for dtype, dim, size, activation in itertools.product(dtypes, dims, sizes, activations):
            name = f"{op} {activation} {dtype} D={dim} {op.inner}={size}"
            yield name, draw_rows(op, rows, dim, size, *DTYPES[dtype], activation=activation, device=device)


def run_all(**choice):
    """How many problems were solved, and which of them with results that are no numbers."""
    solved, flawed = 0, []
    for name, problem in problems(**choice):
        results = [*forward(problem, problem.op.ours).values(), *forward_backward(problem, problem.op.ours).values()]
        solved += 1
        if not all(result.isfinite().all() for result in results):
            flawed.append(name)
    return solved, flawed


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=131)
    parser.add_argument("--dims", type=int, nargs="+", default=[72, 136])
    parser.add_argument("--dtypes", nargs="+", default=list(DTYPES), choices=DTYPES)
    parser.add_argument("--measured-sizes", action="store_true", help="not one for each shape of the kernels")
    parser.add_argument("--every-activation", action="store_true", help="not only each op's usual one")
    solved, flawed = run_all(**vars(parser.parse_args()), device="cuda")
    faults = f", not finite: {', '.join(flawed)}" if flawed else ""
    record("summary", text=f"{solved} problems of {', '.join(OPS)}{faults}")
    return 1 if flawed else 0


if __name__ == "__main__":
    sys.exit(main())
