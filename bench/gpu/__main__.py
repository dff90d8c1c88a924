"""PYTHONPATH=bench python -m gpu: builds, tests and measures petl_ext on this machine's GPU.

All steps use this Python as it is, and no network. Each is a process of its own with a time limit; a step that fails
does not keep the others from running. What they tell is in one JSON, which is written anew after every step.
"""

import argparse
import datetime
import os
import platform
import sys
from pathlib import Path

import torch
from results import RESULTS, commit, file_stem, machine_name

from gpu import summary
from gpu.runner import Files, Runner
from gpu.steps import PYTHON_PATH, ROOT, steps

BUDGET = 470  # seconds: the results are there in eight minutes


def parse(arguments):
    parser = argparse.ArgumentParser(prog="make gpu", description=__doc__)
    parser.add_argument("--out", type=Path, help="folder of the results (default: bench/results/<GPU>)")
    parser.add_argument("--budget", type=float, default=BUDGET, help="seconds for all steps together")
    return parser.parse_args(arguments)


def describe_gpu():
    gpu = torch.cuda.get_device_properties(0)
    return {
        "name": gpu.name,
        "capability": f"{gpu.major}.{gpu.minor}",
        "multiprocessors": gpu.multi_processor_count,
        "memory_bytes": gpu.total_memory,
        "l2_bytes": gpu.L2_cache_size,
    }


def describe(gpu):
    return {
        "date": datetime.date.today().isoformat(),
        "commit": commit(),
        "gpu": gpu,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "cores": os.cpu_count(),
    }


def run(all_steps, runner):
    """Returns the exit code."""
    for step in all_steps:
        print(f"{step.name} ...", flush=True)
        print(summary.of_step(runner.run(step)), flush=True)
    runner.finish()
    print(f"\n{chr(10).join(summary.lines(runner.document))}\n\n{runner.files.result}\n{runner.files.log}")
    return 0 if runner.document["passed"] else 1


def main(arguments=None):
    options = parse(arguments)
    if not torch.cuda.is_available():
        print(
            f"make gpu needs an NVIDIA GPU that torch can use; this is torch {torch.__version__}, which finds none.",
            file=sys.stderr,
        )
        return 1
    gpu = describe_gpu()
    folder = (options.out or RESULTS / machine_name(gpu["name"])).absolute()
    result = folder / f"{file_stem()}.json"
    files = Files(result, result.with_suffix(".log"), ROOT / "build" / "gpu")
    os.environ["PYTHONPATH"] = PYTHON_PATH
    os.chdir(ROOT)
    return run(steps(folder / f"{file_stem()}-counters.txt"), Runner(describe(gpu), files, options.budget))


if __name__ == "__main__":
    sys.exit(main())
