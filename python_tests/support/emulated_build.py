"""Builds petl_emulated, the CUDA kernels on the CPU as a Python module: python emulated_build.py

It imports no petl_ext, so that both can be built at the same time.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import torch
from filelock import FileLock

ROOT = Path(__file__).resolve().parents[2]


def folder():
    return ROOT / "build" / f"emulated-{sys.implementation.cache_tag}-torch-{torch.__version__}"


def build(**options):
    """What is not up to date.

    Args:
        options: of subprocess.run.
    """
    search = os.pathsep.join([sysconfig.get_path("scripts"), os.environ["PATH"]])
    cmake = shutil.which("cmake", path=search)
    assert cmake, "CMake is missing: pip install cmake"
    definitions = ["-DPETL_EMULATED_MODULE=ON", f"-DPython_EXECUTABLE={sys.executable}"]
    folder().mkdir(parents=True, exist_ok=True)
    with FileLock(folder() / "lock"):  # tests run in several processes
        for command in (
            [cmake, "-S", ROOT, "-B", folder(), *definitions],
            [cmake, "--build", folder(), "--target", "petl_emulated", "--parallel"],
        ):
            result = subprocess.run(command, env={**os.environ, "PATH": search}, **options)
            assert result.returncode == 0, (result.stdout or "") + (result.stderr or "")


if __name__ == "__main__":
    build()
