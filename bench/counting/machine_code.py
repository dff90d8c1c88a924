"""The kernels as nvcc compiles them for an H200: their code, and the registers and shared memory that they take."""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import cuda_kernels
import cuda_toolkit
import register_report

from counting import sass
from counting.emulated import FOLDER

ARCHITECTURE = "90a"


class Missing(Exception):
    """No nvcc, or none of the tools that read what it makes."""


class Compiled(NamedTuple):
    code: sass.Kernel
    registers: int
    static_shared_bytes: int


def _tool(toolkit, name):
    packaged = [path for entry in sys.path if entry for path in Path(entry).glob(f"nvidia/cu*/bin/{name}")]
    for candidate in [*packaged, toolkit.folder / "bin" / name, shutil.which(name)]:
        if candidate and os.access(candidate, os.X_OK):
            return str(candidate)
    raise Missing(f"needs {name}: pip install nvidia-cuda-{name}")


def compilation():
    """That of all architectures where its objects are there already, as after a build or its tests; else of one."""
    toolkit, flaws = cuda_toolkit.find(None)
    if toolkit is None:
        raise Missing(f"needs nvcc, 12.4 or later, of a CUDA toolkit or as locks/build.txt has it: {'; '.join(flaws)}")
    everything = register_report.every_architecture()
    sources = cuda_kernels.sources_for(everything.architectures)
    objects = [everything.folder / f"{source.stem}.o" for source in sources]
    if all(cuda_kernels.is_current(path, everything) for path in objects):
        return everything
    return everything._replace(architectures=(ARCHITECTURE,))


def version(compilation):
    """As nvcc tells it."""
    told = subprocess.run([compilation.toolkit.nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    return re.search(r"release .*", told)[0]


def text_of_code(object_file, toolkit):
    """What nvdisasm writes, kept for the next time."""
    folder = FOLDER / "code"
    folder.mkdir(parents=True, exist_ok=True)
    kept, key = folder / f"{object_file.stem}.sass", object_file.with_suffix(".key").read_text()
    if kept.exists():
        old_key, _, text = kept.read_text().partition("\n")
        if old_key == key:
            return text
    texts = []
    with tempfile.TemporaryDirectory() as cubins:
        command = [_tool(toolkit, "cuobjdump"), "-xelf", f"sm_{ARCHITECTURE}", object_file.absolute()]
        subprocess.run(command, cwd=cubins, capture_output=True, check=True)
        for cubin in sorted(Path(cubins).iterdir()):
            command = [_tool(toolkit, "nvdisasm"), "-hex", cubin]
            texts.append(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    kept.write_text("\n".join([key, *texts]))
    return "\n".join(texts)


class Kernels:
    """Of one compilation, by their readable names."""

    def __init__(self, compilation):
        self._code, self._uses = {}, {}
        for object_file in cuda_kernels.compile_all(compilation):
            if not re.search(r"Compiling entry function", object_file.with_suffix(".ptxas").read_text()):
                continue
            kernels = sass.parse(text_of_code(object_file, compilation.toolkit))
            for name, symbol in zip(register_report.readable(list(kernels)), kernels, strict=True):
                self._code[name] = kernels, symbol
        for use in register_report.uses_of(self._objects(compilation)):
            if use.architecture == ARCHITECTURE:
                self._uses[use.kernel] = use

    @staticmethod
    def _objects(compilation):
        return sorted(compilation.folder.glob("*.o"))

    def __getitem__(self, name):
        kernels, symbol = self._code[name]
        use = self._uses[name]
        return Compiled(kernels[symbol], use.registers, use.static_shared_memory)
