"""What `make gpu` does, step by step, the most important first: what is right, how fast it is, then all else."""

import glob
import os
import shutil
import sys
from pathlib import Path

import torch

from gpu.runner import Step

ROOT = Path(__file__).resolve().parent.parent.parent
# Where NVIDIA's tools lie that need not be on PATH.
TOOL_PATTERNS = {
    "compute-sanitizer": ("{cuda}/bin", "{cuda}/compute-sanitizer"),
    "ncu": ("{cuda}/bin", "{cuda}/nsight-compute*", "/opt/nvidia/nsight-compute/*"),
}
PYTHON_PATH = os.pathsep.join(str(ROOT / folder) for folder in ("bench", "python_tests/support"))


def find_tool(name):
    """Its path, "" where there is none."""
    cuda = os.environ.get("CUDA_HOME") or "/usr/local/cuda"
    folders = [folder for pattern in TOOL_PATTERNS[name] for folder in glob.glob(pattern.format(cuda=cuda))]
    return shutil.which(name) or shutil.which(name, path=os.pathsep.join(folders)) or ""


def build():
    cores = str(os.cpu_count())
    install = ["-m", "pip", "install", "--verbose", "--no-index", "--no-build-isolation", "--no-deps", "--editable"]
    return Step(
        "build",
        ([sys.executable, *install, ROOT], [sys.executable, ROOT / "python_tests" / "support" / "emulated_build.py"]),
        limit=200,
        expected=100,
        environment={"PETL_CUDA": "1", "MAX_JOBS": cores, "PYTHONUNBUFFERED": "1"},
    )


def tests(name, paths, limit, expected, *options):
    command = [sys.executable, "-m", "pytest", "-p", "gpu.pytest_plugin", "-p", "no:cacheprovider", *options, *paths]
    return Step(name, (command,), limit, expected)


def sanitizers():
    """Both at the same time, hence the ports. What they look for is in our kernels alone."""
    tool = find_tool("compute-sanitizer")
    checks = {"memcheck": "--padding 256 --report-api-errors no", "racecheck": ""}
    program = [sys.executable, "-m", "gpu.every_kernel", "--every-activation"]
    commands = []
    for index, (name, options) in enumerate(checks.items()):
        general = (
            f"--tool {name} --kernel-name kns=petl --error-exitcode 9 --launch-timeout 0 --port {49152 + 100 * index}"
        )
        commands.append([tool, *general.split(), *options.split(), *program])
    return Step(
        "sanitizers",
        tuple(commands),
        limit=100,
        expected=60,
        least=30,
        # Each tensor is an allocation: whoever leaves it is found.
        environment={"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        obstacle="" if tool else "compute-sanitizer was not found",
    )


def module(name, title, limit, expected, least):
    return Step(title, ([sys.executable, "-m", f"gpu.{name}"],), limit, expected, least)


def hopper_obstacle():
    capability = torch.cuda.get_device_capability() if torch.cuda.is_available() else None
    return "" if capability == (9, 0) else "needs a GPU of compute capability 9.0"


def hopper(name, command, limit, expected):
    """Of the path that is off unless PETL_HOPPER=1: what it tells decides whether it will be on."""
    asked, obstacle = {"PETL_HOPPER": "1"}, hopper_obstacle()
    return Step(name, (command,), limit, expected, environment=asked, obstacle=obstacle, is_check=False)


def hopper_steps():
    test = ROOT / "python_tests" / "building" / "test_hopper_device.py"
    pytest = [sys.executable, "-m", "pytest", "-p", "gpu.pytest_plugin", "-p", "no:cacheprovider", "-x", test]
    return (
        hopper("hopper questions", [sys.executable, "-m", "gpu.hopper_questions"], limit=40, expected=15),
        hopper("hopper tests", pytest, limit=50, expected=20),
        hopper("hopper speed", [sys.executable, "-m", "gpu.hopper_speed"], limit=60, expected=30),
    )


def counters(report):
    tool = find_tool("ncu")
    kernels = "--clock-control none --kernel-name-base demangled --kernel-name regex:petl"
    shown = "--set basic --section ComputeWorkloadAnalysis --section MemoryWorkloadAnalysis --section WarpStateStats"
    program = "-m gpu.every_kernel --rows 61440 --dims 768 --dtypes mixed --measured-sizes"
    command = [
        *(tool, *kernels.split(), *shown.split(), "--print-details", "all", "--log-file", report),
        *(sys.executable, *program.split()),
    ]
    obstacle = "" if tool else "ncu was not found"
    return Step("hardware counters", (command,), limit=90, expected=40, least=30, obstacle=obstacle, is_check=False)


def steps(counter_report):
    # Not asked of petl_ext, which is about to be built.
    names = ["every_op", *(source.stem for source in (ROOT / "csrc/kernels").glob("*.h"))]
    op_tests = [ROOT / "python_tests" / "ops" / f"test_{name}.py" for name in names]
    op_tests = sorted(path for path in op_tests if path.exists())
    on_this_gpu = ROOT / "python_tests" / "building"
    return (
        build(),
        *hopper_steps(),
        tests("op tests", op_tests, 90, 50, "--on", "cuda"),
        module("speed", "speed", limit=120, expected=110, least=45),
        tests("graphs", [on_this_gpu / "test_cuda_graphs.py"], 45, 25, "--on", "cuda"),
        module("vilt", "vilt", limit=45, expected=20, least=20),
        tests("device tests", [on_this_gpu / "test_cuda_device.py"], 90, 40),
        sanitizers(),
        module("calls", "calls", limit=60, expected=25, least=20),
        counters(counter_report),
        module("kernel_times", "kernel times", limit=45, expected=20, least=20),
        module("cupy_contender", "cupy", limit=30, expected=15, least=15),
    )
