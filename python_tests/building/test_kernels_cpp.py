"""The kernels without torch: CMake builds them with sanitizers, ctest runs them. CUDA kernels run on the emulator."""

import os
import re
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CUDA_TESTS = (
    "emulator",
    "hopper",
    "cuda_apt",
    "cuda_apt_hopper",
    "cuda_adapter",
    "cuda_adapter_hopper",
    "cuda_attention_pool",
)
CPU_TESTS = ("apt", "adapter", "attention_pool")
ARM_COMPILER, ARM_EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"
# Addresses are the same in each mode; the tests of the ops compare the results of all four.
MODE, OTHER_MODES = "reverse_lazy", ("forward_lazy", "forward_eager", "reverse_eager")


def run(*command):
    search = os.pathsep.join([sysconfig.get_path("scripts"), os.environ["PATH"]])
    program = shutil.which(command[0], path=search)
    assert program, "CMake is missing: pip install cmake"
    result = subprocess.run([program, *command[1:]], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def passed(folder, option, targets=("all",)):
    """The tests of ctest that passed, among those of the targets. With sanitizers, -O3 compiles for minutes."""
    run("cmake", "-S", ROOT, "-B", folder, option, "-DCMAKE_CXX_FLAGS_RELEASE=-O1")
    run("cmake", "--build", folder, "-j2", "--target", *targets)
    names = "|".join(target.removesuffix("_test") for target in targets if target != "all")
    report = run(
        "ctest",
        "--test-dir",
        folder,
        "--output-on-failure",
        "-j2",
        "-R",
        f"^({names})",
        "-E",
        f"({'|'.join(OTHER_MODES)})$",
    )
    return set(re.findall(r"Test +#\d+: (\w+) \.+ +Passed", report))


def test_no_address_and_no_undefined_behavior_is_reported(tmp_path):
    planted = ("shared_overrun", "shared_underrun", "global_overrun", "copy_overrun")
    planted_by_hopper = ("bulk_copy_overrun", "tile_overrun", "store_overrun")
    assert passed(tmp_path, "-DPETL_SANITIZE=ON") >= {
        *CPU_TESTS,
        *(f"{name}_{MODE}" for name in CUDA_TESTS),
        *(f"emulator_{fault}" for fault in planted),
        *(f"hopper_{fault}" for fault in planted_by_hopper),
    }
    if "avx512_bf16" in Path("/proc/cpuinfo").read_text():
        assert run(tmp_path / "apt_test").startswith("amx avx512_bf16 ")  # its registers are emulated


def test_no_race_between_cuda_threads_is_reported(tmp_path):
    planted = ("no_barrier_after_wait", "no_barrier_before_reuse", "no_syncwarp", "lost_update")
    planted_by_hopper = ("read_before_wait", "release_before_read", "release_before_products")
    targets = [f"{name}_test" for name in CUDA_TESTS]
    assert passed(tmp_path, "-DPETL_FIND_RACES=ON", targets) >= {
        *(f"{name}_races" for name in CUDA_TESTS),
        *(f"emulator_{fault}" for fault in planted),
        *(f"hopper_{fault}" for fault in planted_by_hopper),
    }


@pytest.mark.skipif(
    not (shutil.which(ARM_COMPILER) and shutil.which(ARM_EMULATOR)),
    reason=f"needs {ARM_COMPILER} and {ARM_EMULATOR}: apt-get install g++-aarch64-linux-gnu qemu-user",
)
def test_the_cpu_kernels_of_64_bit_arm(tmp_path):
    target = ["-DCMAKE_SYSTEM_NAME=Linux", "-DCMAKE_SYSTEM_PROCESSOR=aarch64", f"-DCMAKE_CXX_COMPILER={ARM_COMPILER}"]
    level = ["-DCMAKE_CXX_FLAGS_RELEASE=-O1", "-DCMAKE_EXE_LINKER_FLAGS=-static"]
    run("cmake", "-S", ROOT, "-B", tmp_path, *target, *level)
    run("cmake", "--build", tmp_path, "-j2", "--target", *(f"{name}_test" for name in CPU_TESTS))
    for name in CPU_TESTS:
        report = run(ARM_EMULATOR, "-cpu", "max", tmp_path / f"{name}_test")
        assert re.fullmatch(r"neon_bf16 portable: \d+ checked, 0 failed\n", report)
