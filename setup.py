"""Compiles petl_ext/_C.abi3.so: which sources, which flags. Everything else is in pyproject.toml."""

import os
import re
import shutil
import sys
from pathlib import Path

from setuptools import setup

sys.path.insert(0, str(Path(__file__).resolve().parent / "build_backend"))
import cuda_kernels
import petl_build

ROOT = cuda_kernels.ROOT

# Metadata needs neither torch nor a compiler.
METADATA_ONLY = {"sdist", "egg_info", "dist_info"} & set(sys.argv)

COMPILE_FLAGS = [
    "-O3",
    # Contraction to fused multiply-add is off in strict ISO mode, and the kernels live on it.
    "-ffp-contract=fast",
    "-fvisibility=hidden",
    "-g0",
    # Whatever the environment's flags say: a NaN stays one, and sums are added in the order that is written.
    "-fno-fast-math",
    # The LibTorch stable ABI of torch 2.10: one file for all later versions.
    "-DTORCH_TARGET_VERSION=0x020a000000000000ULL",
]
LINK_FLAGS = ["-Wl,--exclude-libs,ALL", "-s"] if sys.platform == "linux" else []


def require_compiler():
    compiler = (os.environ.get("CXX") or "c++").split()[0]
    if shutil.which(compiler) is None and shutil.which("g++") is None:
        raise SystemExit(
            f"\n*** petl_ext compiles C++ kernels, but no C++ compiler was found ({compiler!r} is not on PATH).\n"
            "*** Install one (Debian, Ubuntu: apt-get install g++; Fedora: dnf install gcc-c++;\n"
            "*** macOS: xcode-select --install) or name it in the environment variable CXX.\n"
        )


# What of the user's flags would change results, in the compiler's or, as a start-up file, in the linker's command.
CHANGES_RESULTS = re.compile(
    r"(?<!\S)(-Ofast|-f(fast|associative|reciprocal|finite)-math(-only)?|-funsafe-math-optimizations|-fno-signed-zeros"
    r"|-ffp-model=\w+|-fp-model[= ]\w+)(?!\S)"
)


def leave_out_flags_that_change_results():
    for name in ("CC", "CXX", "CFLAGS", "CXXFLAGS", "CPPFLAGS", "LDFLAGS"):
        given = os.environ.get(name, "")
        kept = CHANGES_RESULTS.sub("", given).strip()
        if kept != given.strip():
            left_out = ", ".join(match[0] for match in CHANGES_RESULTS.finditer(given))
            print(f"petl_ext: {left_out} of {name} is left out, since it changes what the kernels compute", flush=True)
            os.environ[name] = kept


def cuda_link_flags(compilation):
    # libtorch.so brings libtorch_cuda.so, where there is one, for the weak symbols; the linker saw no need of it.
    torch = ["-Wl,--no-as-needed", "-ltorch", "-Wl,--as-needed"]
    return [*torch, str(compilation.toolkit.static_runtime), "-ldl", "-lrt", "-lpthread"]


def extension_arguments():
    petl_build.require_setuptools()
    require_compiler()
    leave_out_flags_that_change_results()
    import torch
    from torch.utils.cpp_extension import BuildExtension, CppExtension

    gpus = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
    compilation = cuda_kernels.plan([torch.cuda.get_device_capability(gpu) for gpu in gpus])
    folders = (ROOT / "csrc/ops", ROOT / "csrc/kernels/cpu")
    sources = sorted(str(path.relative_to(ROOT)) for folder in folders for path in folder.glob("*.cpp"))
    extension = CppExtension(
        "petl_ext._C",
        sources,
        include_dirs=[str(ROOT / "csrc")],
        extra_compile_args={"cxx": COMPILE_FLAGS + (["-DPETL_WITH_CUDA"] if compilation else [])},
        extra_link_args=LINK_FLAGS + (cuda_link_flags(compilation) if compilation else []),
        depends=[str(path.relative_to(ROOT)) for path in sorted((ROOT / "csrc").rglob("*.*"))],
        py_limited_api=True,
    )

    class Build(BuildExtension):
        def build_extensions(self):
            if compilation:
                extension.extra_objects += map(str, cuda_kernels.compile_all(compilation))
            super().build_extensions()

    return {
        "ext_modules": [extension],
        "cmdclass": {"build_ext": Build},
        "options": {"bdist_wheel": {"py_limited_api": "cp310"}},
    }


setup(**({} if METADATA_ONLY else extension_arguments()))
