"""Whether there are to be CUDA kernels, and which nvcc compiles them: a toolkit of this machine or NVIDIA's packages.

The build backend and setup.py both ask here, so they decide alike. Nothing here imports torch.

PETL_CUDA       auto (default): where torch is built for CUDA; 1: always; 0: never
PETL_CUDA_HOME  the toolkit's folder, or `pip`: no toolkit of this machine, NVIDIA's packages by pip
"""

import importlib.util
import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

OLDEST_TOOLKIT = (12, 4)
# The first whose packages hold nvcc itself; those for CUDA 12 have but parts of it.
OLDEST_PACKAGES = (13, 0)
USUAL_NVCC = "/usr/local/cuda/bin/nvcc"


class Decision(NamedTuple):
    with_cuda: bool
    release: tuple | None  # of the CUDA that torch is built for
    reason: str


class Toolkit(NamedTuple):
    nvcc: str
    folder: Path
    release: tuple

    @property
    def static_runtime(self):
        folders = ("lib64", "lib", "targets/*/lib")
        found = (path for folder in folders for path in self.folder.glob(f"{folder}/libcudart_static.a"))
        return next(found, None)


def text_of(release):
    return "{}.{}".format(*release)


def release_in(text):
    match = re.search(r"(\d+)\.(\d+)", text or "")
    return (int(match[1]), int(match[2])) if match else None


def torch_release():
    """The CUDA that the installed torch is built for, None for a torch without CUDA."""
    (folder,) = importlib.util.find_spec("torch").submodule_search_locations
    return release_in(runpy.run_path(os.path.join(folder, "version.py"))["cuda"])


def decide():
    setting = os.environ.get("PETL_CUDA") or "auto"
    release = torch_release()
    decisions = {
        "0": Decision(False, release, "PETL_CUDA=0"),
        "1": Decision(True, release, "PETL_CUDA=1"),
        "auto": Decision(True, release, f"torch is built for CUDA {text_of(release)}")
        if release
        else Decision(False, release, "torch is built without CUDA (PETL_CUDA=1 compiles them all the same)"),
    }
    if setting not in decisions:
        raise SystemExit(
            "\n*** PETL_CUDA says whether petl_ext compiles its CUDA kernels: 0, 1 or auto;\n"
            f"*** found PETL_CUDA={setting}.\n"
            "*** Leave it unset to compile them where torch is built for CUDA.\n"
        )
    return decisions[setting]


def _named_folder():
    return os.environ.get("PETL_CUDA_HOME") or None


def _candidates():
    """Every nvcc to try, best first."""
    # pip appends its isolated environment, and NVIDIA's packages share one folder in it.
    packaged = [str(nvcc) for entry in sys.path if entry for nvcc in Path(entry).glob("nvidia/cu*/bin/nvcc")]
    if _named_folder() == "pip":
        return packaged
    if _named_folder():
        return [os.path.join(_named_folder(), "bin", "nvcc")]
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    on_path = shutil.which("nvcc")
    return [*(os.path.join(home, "bin", "nvcc") for home in homes), *filter(None, [on_path]), USUAL_NVCC, *packaged]


def _output(*command):
    result = subprocess.run(command, capture_output=True, text=True)
    return result.stdout + result.stderr


def _inspect(nvcc):
    """nvcc may be a script in some other folder than the toolkit's: it tells itself where it lives."""
    if not os.access(nvcc, os.X_OK):
        return None
    release = release_in(_output(nvcc, "--version").rpartition("release")[2])
    folder = re.search(r"^#\$ TOP=(.*)$", _output(nvcc, "--dryrun", "-E", "-x", "cu", os.devnull), re.MULTILINE)
    return Toolkit(nvcc, Path(folder[1].strip()).resolve(), release) if release and folder else None


def _flaw(toolkit, release):
    if toolkit is None:
        return "no nvcc that runs"
    if toolkit.release < OLDEST_TOOLKIT or (release and toolkit.release[0] != release[0]):
        return f"is CUDA {text_of(toolkit.release)}"
    return None if toolkit.static_runtime else f"has no libcudart_static.a in {toolkit.folder}"


def find(release):
    """The first toolkit for a torch of that CUDA, None where there is none, and what does not fit."""
    flaws = []
    for nvcc in dict.fromkeys(_candidates()):
        toolkit = _inspect(nvcc)
        flaw = _flaw(toolkit, release)
        if flaw is None:
            return toolkit, flaws
        flaws.append(f"{nvcc}: {flaw}")
    return None, flaws


def _refuse(decision, flaws):
    release = decision.release or OLDEST_TOOLKIT
    before = f" and before {release[0] + 1}.0" if decision.release else ""
    packaged = "pip brings one where the build is isolated"
    if decision.release and decision.release < OLDEST_PACKAGES:
        packaged = f"pip could bring one from CUDA {text_of(OLDEST_PACKAGES)} on"
    raise SystemExit(
        f"\n*** petl_ext needs an nvcc from CUDA {text_of(max(OLDEST_TOOLKIT, (release[0], 0)))} on{before}, "
        f"since {decision.reason};\n"
        f"*** found {'; '.join(flaws) or 'none'}.\n"
        f"*** Install that CUDA toolkit and name its folder in PETL_CUDA_HOME ({packaged}),\n"
        "*** or set PETL_CUDA=0 to build for the CPU alone.\n"
    )


def require(decision):
    toolkit, flaws = find(decision.release)
    return toolkit or _refuse(decision, flaws)


def packages():
    """What pip has to put into the isolated build environment."""
    decision = decide()
    if not decision.with_cuda:
        return []
    toolkit, flaws = find(decision.release)
    if toolkit:
        return []
    release = decision.release or OLDEST_PACKAGES
    if release < OLDEST_PACKAGES or _named_folder() not in (None, "pip"):
        _refuse(decision, flaws)
    same = [f"nvidia-{name}=={text_of(release)}.*" for name in ("cuda-nvcc", "nvvm", "cuda-crt", "cuda-runtime")]
    # Headers whose minor versions soon left the others' behind.
    return [*same, f"nvidia-cuda-cccl=={release[0]}.*"]
