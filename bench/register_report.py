"""What ptxas says of every CUDA kernel, as a table: python bench/register_report.py > bench/results/cuda-registers.md

It needs nvcc, but no GPU.
"""

import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "build_backend"))
import cuda_kernels
import cuda_toolkit


class Use(NamedTuple):
    """What one kernel takes on one architecture: per thread but for the shared memory, which is a block's."""

    kernel: str
    architecture: str
    registers: int
    static_shared_memory: int
    stack: int  # local memory: arrays that are indexed at run time
    spilled: int


def every_architecture():
    toolkit = cuda_toolkit.require(cuda_toolkit.Decision(True, None, "every kernel is to be compiled"))
    host_compiler = cuda_kernels.choose_host_compiler(toolkit)
    return cuda_kernels.Compilation(toolkit, host_compiler, cuda_kernels.DEFAULT_ARCHITECTURES)


def readable(mangled):
    """The kernels' names without parameters and namespaces, in their order."""
    names = subprocess.run(["c++filt", "-p"], input="\n".join(mangled), capture_output=True, text=True, check=True)
    return [re.sub(r"petl::(cuda::)?|\(anonymous namespace\)::", "", name) for name in names.stdout.splitlines()]


def uses_in(ptxas_report):
    """By mangled names. Each kernel's lines stand together, also where ptxas ran several times at once."""
    for part in ptxas_report.split("Compiling entry function ")[1:]:
        kernel, architecture = re.match(r"'(\w+)' for 'sm_(\w+)'", part).groups()
        numbers = {
            "registers": r"Used (\d+) registers",
            "static_shared_memory": r"(\d+) bytes smem",
            "stack": r"(\d+) bytes stack frame",
            "spill stores": r"(\d+) bytes spill stores",
            "spill loads": r"(\d+) bytes spill loads",
        }
        found = {name: re.search(pattern, part) for name, pattern in numbers.items()}
        number = {name: int(match[1]) if match else 0 for name, match in found.items()}
        spilled = number["spill stores"] + number["spill loads"]
        yield Use(kernel, architecture, number["registers"], number["static_shared_memory"], number["stack"], spilled)


def uses_of(objects):
    uses = [use for path in objects for use in uses_in(path.with_suffix(".ptxas").read_text())]
    names = readable([use.kernel for use in uses])
    # A template may be instantiated in several files.
    named = {use._replace(kernel=name) for use, name in zip(uses, names, strict=True)}
    return sorted(named, key=lambda use: (use.kernel, cuda_kernels.number_of(use.architecture)))


def table(uses):
    lines = [
        "| kernel | architecture | registers | static shared memory | stack | spilled |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for use in uses:
        memory = f"{use.static_shared_memory} B | {use.stack} B | {use.spilled} B"
        lines.append(f"| `{use.kernel}` | sm_{use.architecture} | {use.registers} | {memory} |")
    return "\n".join(lines)


def main():
    compilation = every_architecture()
    release = cuda_toolkit.text_of(compilation.toolkit.release)
    print(f"By ptxas of CUDA {release}. Shared memory whose size is chosen at the launch is not in it.\n")
    print(table(uses_of(cuda_kernels.compile_all(compilation))))


if __name__ == "__main__":
    main()
