"""The kernels without torch: CMake builds them with the address and undefined-behaviour sanitizers, ctest runs them."""

import os
import shutil
import subprocess
import sysconfig
from pathlib import Path

ROOT = Path(__file__).parent.parent


def run(*command):
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def test_kernels_under_sanitizers(tmp_path):
    search = os.pathsep.join([sysconfig.get_path("scripts"), os.environ["PATH"]])
    cmake, ctest = shutil.which("cmake", path=search), shutil.which("ctest", path=search)
    assert cmake and ctest, "CMake is missing: pip install cmake"
    # With the sanitizers, -O3 compiles for minutes.
    run(cmake, "-S", ROOT, "-B", tmp_path, "-DPETL_SANITIZE=ON", "-DCMAKE_CXX_FLAGS_RELEASE=-O1")
    run(cmake, "--build", tmp_path, "-j2")
    report = run(ctest, "--test-dir", tmp_path, "--output-on-failure")
    assert "1/1 Test #1: apt" in report and "100% tests passed" in report
