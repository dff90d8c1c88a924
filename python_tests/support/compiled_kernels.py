"""The CUDA kernels' objects of every architecture, compiled once for all test processes."""

import cuda_kernels
import register_report
from filelock import FileLock


def compile_kernels():
    """Their compilation and the objects, where setup.py looks for them too. Needs nvcc."""
    compilation = register_report.every_architecture()
    compilation.folder.mkdir(parents=True, exist_ok=True)
    with FileLock(compilation.folder / "lock"):
        return compilation, cuda_kernels.compile_all(compilation)
