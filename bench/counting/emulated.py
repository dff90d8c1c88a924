"""The kernels on the emulator, which counts what they ask of the machine."""

import json
import os
import re
import shutil
import subprocess
import sysconfig
from dataclasses import dataclass, field
from math import prod
from pathlib import Path

from register_report import readable

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "build" / "count"


@dataclass
class Launch:
    """One launch of a kernel.

    Attributes:
        kernel: its name, without namespaces and parameters.
        grid, threads: blocks, and threads of a block, by dimensions.
        cluster: blocks that run together.
        shared_bytes: dynamic shared memory of a block.
        parameters: the kernel's parameters as they lie in constant memory.
        memory: (name, begin, end) of each tensor.
        first_sectors: of each tensor, read or written, the number of sectors that the first block touches, by which of
            its neighbors touch them too: a bit for each axis of the grid.
        sectors: of each tensor, read or written, the number of sectors that any block which ran touches.
        counts: {index of a block: what it asked for}, of all blocks or of the first and its neighbors, the middle one
            and the last. The blocks of a cluster count together, under the first one's index.
    """

    kernel: str
    grid: tuple
    threads: tuple
    cluster: int
    shared_bytes: int
    parameters: bytes
    memory: list
    first_sectors: dict
    sectors: dict
    counts: dict = field(repr=False)

    @property
    def blocks(self):
        x, y, z = self.grid
        return x * y * z

    def number_of(self, index):
        return index[0] + self.grid[0] * (index[1] + self.grid[1] * index[2])

    @property
    def is_whole(self):
        return len(self.counts) == self.blocks

    @property
    def sizes(self):
        """{name: bytes}; several tensors may have one name."""
        names = {name for name, _, _ in self.memory}
        return {name: sum(end - begin for other, begin, end in self.memory if other == name) for name in sorted(names)}

    @property
    def middle(self):
        """The index of the block that stands for those that did not run."""
        return next(index for index in self.counts if self.number_of(index) == self.blocks // 2)

    @property
    def busiest(self):
        """The index of the block that asks for most."""
        return max(self.counts, key=lambda index: _weight(self.counts[index]))

    def sectors_of_all(self, name, way):
        """How many sectors of a tensor all blocks touch, if the others lie to their neighbors as the first does."""
        total = 0
        for axes, number in enumerate(self.first_sectors.get(f"{name} {way}", [])):
            total += number * prod(size for bit, size in enumerate(self.grid) if not axes >> bit & 1)
        return total

    def total(self, what):
        """Of all blocks; those that did not run count as the middle one."""
        ran = sum(counts.get(what, 0) for counts in self.counts.values())
        return ran + (self.blocks - len(self.counts)) * self.counts[self.middle].get(what, 0)


def _weight(counts):
    return sum(number for name, number in counts.items() if name.endswith((" wavefronts", " sectors")))


def host_compiler():
    """That of CMake's defaults, which compiles the kernels for the emulator."""
    command = [os.environ.get("CXX", "c++").split()[0], "--version"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[0]


def build(target="count_kernels"):
    """A program in FOLDER, brought up to date."""
    search = os.pathsep.join([sysconfig.get_path("scripts"), os.environ["PATH"]])
    cmake = shutil.which("cmake", path=search)
    if cmake is None:
        raise SystemExit("CMake is missing: pip install cmake")
    for command in (
        [cmake, "-S", ROOT, "-B", FOLDER, "-DPETL_COUNT=ON"],
        [cmake, "--build", FOLDER, "--target", target, "--parallel", str(os.cpu_count())],
    ):
        result = subprocess.run(command, env={**os.environ, "PATH": search}, capture_output=True, text=True)
        if result.returncode != 0:
            raise SystemExit(result.stdout + result.stderr)
    return FOLDER / target


def _symbols(program):
    """{offset from main: name}."""
    text = subprocess.run(["nm", program], capture_output=True, text=True, check=True).stdout
    addresses = {name: int(address, 16) for address, name in re.findall(r"^(\w+) [tTwW] (\S+)$", text, re.MULTILINE)}
    return {address - addresses["main"]: name for name, address in addresses.items()}


class Counter:
    """Runs count_kernels."""

    def __init__(self, program):
        self.program, self.symbols = program, _symbols(program)

    def launches(self, case, rows):
        result = subprocess.run([self.program, *case.words(rows)], capture_output=True, text=True)
        if result.returncode != 0:
            raise SystemExit(f"{case}, {rows} rows: {result.stderr}")
        found = [json.loads(line) for line in result.stdout.splitlines()]
        names = readable([self.symbols[launch["kernel"]] for launch in found])
        return [_launch(name, launch) for name, launch in zip(names, found, strict=True)]


def _launch(name, launch):
    return Launch(
        name,
        tuple(launch["grid"]),
        tuple(launch["block"]),
        launch["cluster"],
        launch["shared_bytes"],
        bytes.fromhex(launch["parameters"]),
        launch["memory"],
        launch["first_sectors"],
        launch["sectors"],
        {tuple(block.pop("index")): block for block in launch["blocks"]},
    )
