"""Compiles csrc/kernels/cuda/*.cu: for which architectures, by which command, and only what has changed.

PETL_CUDA_ARCHS  such as "80 90a"; default: the GPUs of this machine, or else DEFAULT_ARCHITECTURES
CUDAHOSTCXX      the C++ compiler for nvcc, which takes none that is much newer than itself
MAX_JOBS         how many processes compile at a time

Beside each object lie the names of the files it was made from, a key to their contents and to the command, and what
ptxas says: registers, shared memory, spills.
"""

import hashlib
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import cuda_toolkit
from cuda_toolkit import Toolkit, text_of

ROOT = Path(__file__).resolve().parent.parent
DEFAULT_ARCHITECTURES = ("80", "90a", "100")
HOPPER = "90a"  # without the letter, wgmma is missing
WITHOUT_HOPPER = "without_hopper"  # the file that stands in for those of the Hopper path, *_hopper.cu
OLDEST_ARCHITECTURE = 80  # asynchronous copies, bfloat16 products
FLAGS = ("-std=c++17", "-O3", "-Icsrc", "-Xcompiler=-fPIC,-fvisibility=hidden", "-Xptxas=-v")


class Compilation(NamedTuple):
    toolkit: Toolkit
    host_compiler: str
    architectures: tuple

    @property
    def folder(self):
        return ROOT / "build" / "cuda" / "-".join(self.architectures)

    def flags_for(self, file):
        """Of a source or an object. No other architecture knows the instructions of the Hopper path."""
        if is_for_hopper(file):
            codes = {HOPPER: [f"sm_{HOPPER}"]}
        else:
            codes = {name: [f"sm_{name}"] for name in self.architectures}
            newest = number_of(self.architectures[-1])  # without its letter: such code runs on no later card
            # One option for both codes of an architecture, since the compiler proper runs once per option.
            codes.setdefault(str(newest), []).append(f"compute_{newest}")
        return [*FLAGS, *(f"-gencode=arch=compute_{name},code=[{','.join(codes[name])}]" for name in codes)]


def is_for_hopper(source):
    return source.stem.endswith("_hopper") and source.stem != WITHOUT_HOPPER


def sources_for(architectures):
    """The files to compile, in the order of their names."""
    sources = sorted((ROOT / "csrc/kernels/cuda").glob("*.cu"))
    if HOPPER in architectures:
        return [source for source in sources if source.stem != WITHOUT_HOPPER]
    return [source for source in sources if not is_for_hopper(source)]


def number_of(architecture):
    return int(re.match(r"\d+", architecture)[0])


def jobs():
    return int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)


def known_architectures(toolkit):
    listed = subprocess.run([toolkit.nvcc, "--list-gpu-code"], capture_output=True, text=True, check=True).stdout
    return sorted(int(number) for number in re.findall(r"sm_(\d+)", listed))


def asked_architectures(known):
    names = re.split(r"[\s,;]+", os.environ["PETL_CUDA_ARCHS"].strip())
    wrong = [name for name in names if not re.fullmatch(r"\d+[af]?", name) or number_of(name) not in known]
    if wrong:
        raise SystemExit(
            "\n*** PETL_CUDA_ARCHS must name architectures as in PETL_CUDA_ARCHS='80 90a';\n"
            f"*** found {' '.join(wrong)}, and this nvcc knows {' '.join(map(str, known))}.\n"
            "*** Leave it unset to compile for the GPUs of this machine or, without any, for "
            f"{' '.join(DEFAULT_ARCHITECTURES)}.\n"
        )
    return names


def choose_architectures(toolkit, gpus):
    """Which, the newest last, and why. `gpus`: the capabilities of those in this machine, such as (9, 0)."""
    known = known_architectures(toolkit)
    present = {f"{major}{minor}" + "a" * ((major, minor) == (9, 0)) for major, minor in gpus}
    present = [name for name in present if number_of(name) in known and number_of(name) >= OLDEST_ARCHITECTURE]
    if os.environ.get("PETL_CUDA_ARCHS", "").strip():
        names, reason = asked_architectures(known), "PETL_CUDA_ARCHS"
    elif present:
        names, reason = present, "the GPUs of this machine"
    else:
        names, reason = [name for name in DEFAULT_ARCHITECTURES if number_of(name) in known], "the default"
    return tuple(sorted(set(names), key=lambda name: (number_of(name), name))), reason


def choose_host_compiler(toolkit):
    """nvcc is asked, since each release takes others."""
    named = os.environ.get("CUDAHOSTCXX")
    usual = [*os.environ.get("CXX", "").split()[:1], "c++", "g++", *(f"g++-{version}" for version in range(15, 8, -1))]
    answers = []
    for compiler in filter(shutil.which, [named] if named else [*usual, "clang++"]):
        probe = [toolkit.nvcc, "-ccbin", compiler, "-std=c++17", "-E", "-x", "cu", os.devnull]
        result = subprocess.run(probe, capture_output=True, text=True)
        if result.returncode == 0:
            return compiler
        why = re.search(r"(?:unsupported|fatal).*?[.!]", result.stderr)
        answers.append(f"{compiler}: {why[0] if why else result.stderr.strip()}")
    raise SystemExit(
        f"\n*** nvcc {text_of(toolkit.release)} ({toolkit.nvcc}) needs a C++ compiler that it takes; it refused\n"
        f"*** {'; '.join(answers) or named or 'none, since none is on PATH'}.\n"
        "*** Install an older one (Debian, Ubuntu: apt-get install g++-12) and name it in CUDAHOSTCXX,\n"
        "*** or set PETL_CUDA=0 to build for the CPU alone.\n"
    )


def refuse_flags_that_change_results():
    for name in ("NVCC_PREPEND_FLAGS", "NVCC_APPEND_FLAGS"):
        wrong = re.findall(r"--?(?:use_fast_math|ftz=true|prec-(?:div|sqrt)=false)", os.environ.get(name, ""))
        if wrong:
            raise SystemExit(
                f"\n*** {name} holds {' '.join(wrong)}, which changes what the kernels compute.\n"
                "*** Take it out for this build, as in\n"
                f"*** {name}= pip install .\n"
            )


def plan(gpus):
    """How the CUDA kernels are compiled, None without them; prints which, and why."""
    decision = cuda_toolkit.decide()
    if not decision.with_cuda:
        print(f"petl_ext: no CUDA kernels, since {decision.reason}", flush=True)
        return None
    refuse_flags_that_change_results()
    toolkit = cuda_toolkit.require(decision)
    architectures, why_these = choose_architectures(toolkit, gpus)
    compilation = Compilation(toolkit, choose_host_compiler(toolkit), architectures)
    print(
        f"petl_ext: CUDA kernels, since {decision.reason}: for sm_{', sm_'.join(architectures)} ({why_these}) "
        "and, as PTX, for later cards\n"
        f"petl_ext: compiled by {toolkit.nvcc} (CUDA {text_of(toolkit.release)}) with {compilation.host_compiler}",
        flush=True,
    )
    return compilation


def key_of(object_file, compilation):
    """What an object that lies there would be made from today; None where one of its files is gone.

    Where the compiler and the tree lie does not count: pip puts its compiler into a new folder each time.
    """
    surroundings = [os.environ.get(name, "") for name in ("NVCC_PREPEND_FLAGS", "NVCC_APPEND_FLAGS")]
    command = [
        text_of(compilation.toolkit.release),
        compilation.host_compiler,
        *compilation.flags_for(object_file),
        *surroundings,
    ]
    digest = hashlib.sha256("\n".join(command).encode())
    ours = [ROOT / name for name in object_file.with_suffix(".d").read_text().split() if name.startswith("csrc/")]
    if not all(path.exists() for path in ours):
        return None
    for path in ours:
        digest.update(path.read_bytes())
    return digest.hexdigest()


def is_current(object_file, compilation):
    key_file = object_file.with_suffix(".key")  # written last
    return key_file.exists() and key_file.read_text() == key_of(object_file, compilation)


def compile_one(source, compilation, threads):
    """The object of one file for all architectures."""
    object_file = compilation.folder / f"{source.stem}.o"
    if is_current(object_file, compilation):
        return object_file
    object_file.with_suffix(".key").unlink(missing_ok=True)
    files = ["-MMD", "-MF", object_file.with_suffix(".d"), "-c", source.relative_to(ROOT), "-o", object_file]
    toolkit_flags = ["-ccbin", compilation.host_compiler, f"-t{threads}"]
    command = [compilation.toolkit.nvcc, *toolkit_flags, *compilation.flags_for(source), *map(str, files)]
    print(" ".join(command), file=sys.stderr, flush=True)
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if result.returncode != 0:
        raise SystemExit(f"\n*** nvcc failed on {source.relative_to(ROOT)}:\n{result.stdout}{result.stderr}")
    object_file.with_suffix(".ptxas").write_text(result.stdout + result.stderr)
    object_file.with_suffix(".key").write_text(key_of(object_file, compilation))
    return object_file


def compile_all(compilation):
    """The objects, in the order of their names."""
    compilation.folder.mkdir(parents=True, exist_ok=True)
    # Rather all architectures of one file at a time than several files: these differ more in how long they take.
    threads = min(jobs(), len(compilation.architectures))
    with ThreadPoolExecutor(jobs() // threads) as pool:
        return list(
            pool.map(lambda source: compile_one(source, compilation, threads), sources_for(compilation.architectures))
        )
