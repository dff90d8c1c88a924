"""Makes an environment with petl_ext and the versions of the locks in it, or says in three lines why not.

    python locks/install.py .venv            everything that make demo, test, bench and lint use
    python locks/install.py .venv-lock lock  only what lock.txt names, or docs.txt or wheel.txt

A lock is given to pip as constraints: it names more than one platform takes, such as the libraries of a CUDA torch.
An environment is made anew wherever a lock or the interpreter has changed or something was left half done; otherwise
only petl_ext is built again.
"""

import hashlib
import os
import re
import subprocess
import sys
import sysconfig
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LOCKS = ROOT / "locks"
PYTHONS = ("3.10", "3.11", "3.12", "3.13")
THIS_PYTHON = "{}.{}".format(*sys.version_info[:2])
DEVELOP, BUILD, WEIGHTS, ADAPTERS, LOCK = (
    LOCKS / f"{name}.txt" for name in ("develop", "build", "weights", "adapters", "lock")
)
ENVIRONMENT_LOCKS = DEVELOP, BUILD, WEIGHTS, ADAPTERS  # of .venv


class Refused(SystemExit):
    def __init__(self, *lines):
        super().__init__("\n" + "\n".join(f"*** {line}" for line in lines) + "\n")


def locked_versions(*locks):
    """{name: all its versions, of which the markers of a lock leave one per platform and Python}."""
    versions = {}
    for lock in locks:
        for name, version in re.findall(r"^([\w.-]+)==([^\s;]+)", lock.read_text(), re.MULTILINE):
            versions.setdefault(name, set()).add(version)
    return versions


def unlocked_packages(site_packages, *locks):
    """What lies there in a version that no lock names, as ["name==version"]."""
    versions = locked_versions(*locks)
    found = []
    for distribution in metadata.distributions(path=[str(site_packages)]):
        name = re.sub(r"[-_.]+", "-", distribution.metadata["Name"]).lower()
        public_version = distribution.version.partition("+")[0]  # of 2.13.0+cpu 2.13.0
        if name != "petl-ext" and public_version not in versions.get(name, ()):
            found.append(f"{name}=={distribution.version}")
    return sorted(found)


def diagnose(output):
    """What of a lock pip could not follow, in its words; None where it failed otherwise."""
    missing = re.search(r"No matching distribution found for ([^\s;]+)", output)
    causes = re.search(r"The conflict is caused by:\n((?: +\S.*\n)+)", output)
    pins = re.findall(r"The user requested \(constraint\) (\S+)", output)
    if missing:
        return f"the package index has no {missing[1]}"
    if causes and " depends on " in causes[1]:
        return f"cannot be satisfied ({'; '.join(line.strip() for line in causes[1].splitlines())})"
    return f"the package index has no {', '.join(pins)}" if causes else None


class Environment:
    """A virtual environment; the file made-from in it says of what, and whether it is complete."""

    def __init__(self, folder, *locks):
        self.folder, self.locks = Path(folder).absolute(), locks
        self.record, self.log = self.folder / "made-from", self.folder / "install.log"
        self.programs = self.folder / ("Scripts" if os.name == "nt" else "bin")

    @property
    def site_packages(self):
        return sysconfig.get_path("purelib", "venv", {"base": str(self.folder)})

    @property
    def complete_record(self):
        texts = b"".join(lock.read_bytes() for lock in self.locks)
        return f"Python {sys.version}\nlocks {hashlib.sha256(texts).hexdigest()}\n"

    def is_complete(self):
        return self.record.exists() and self.record.read_text() == self.complete_record

    def begin(self):
        """Leaves the locked pip and setuptools in it and nothing else."""
        if self.folder.exists() and any(self.folder.iterdir()) and not self.record.exists():
            raise Refused(
                f"{self.folder} is no environment that was made from the locks, so it is left as it is.",
                "Remove it, as `make clean` does with .venv,",
                "or name another folder: make VENV=folder",
            )
        subprocess.run([sys.executable, "-m", "venv", "--clear", self.folder], check=True)
        self.record.write_text("incomplete\n")
        self.install(LOCK, "pip", "setuptools")  # what Python brings

    def end(self, *more_folders):
        for folder in (self.site_packages, *more_folders):
            unlocked = unlocked_packages(folder, *self.locks, LOCK)
            if unlocked:
                raise Refused(
                    f"No lock names {', '.join(unlocked)}, which pip put into {folder}.",
                    "Renew the locks: make lock",
                    "Until then nothing counts as installed.",
                )
        self.record.write_text(self.complete_record)

    def install(self, lock, *arguments):
        """pip install with the versions of one lock."""
        print(f"petl_ext: pip install {' '.join(map(str, arguments))}", file=sys.stderr, flush=True)
        command = [
            self.programs / "python",
            "-m",
            "pip",
            "install",
            "--progress-bar=off",
            "--constraint",
            lock,
            *arguments,
        ]
        # ninja is in the environment, and torch looks for it on PATH.
        path = os.pathsep.join([str(self.programs), os.environ.get("PATH", "")])
        streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        result = subprocess.run(command, cwd=ROOT, env={**os.environ, "PATH": path}, **streams)
        if result.returncode != 0:
            self.log.write_text(" ".join(map(str, command)) + "\n" + result.stdout)
            self.refuse(lock, result.stdout)

    def refuse(self, lock, output):
        diagnosis = diagnose(output)
        if diagnosis is None:
            raise SystemExit(f"{output}\n*** pip failed, so nothing counts as installed; its words are in {self.log}\n")
        raise Refused(
            f"{lock.name}, for Python {THIS_PYTHON} on {sysconfig.get_platform()}: {diagnosis}.",
            "Name an index that has it in PIP_INDEX_URL, or lock what yours has: make lock",
            f"Nothing counts as installed; pip's own words are in {self.log}",
        )


def make(folder):
    environment = Environment(folder, *ENVIRONMENT_LOCKS)
    adapters = environment.folder / "adapters"
    if not environment.is_complete():
        environment.begin()
        environment.install(DEVELOP, "torch", "ninja", "setuptools")
        environment.install(WEIGHTS, "--no-deps", *locked_versions(WEIGHTS))
        environment.install(ADAPTERS, "--target", adapters, "adapters")
        environment.install(DEVELOP, "--only-deps", ".[test,bench,lint]")
        environment.end(adapters)
    environment.install(DEVELOP, "--no-deps", "--build-constraint", BUILD, "--editable", ".")


def make_only(folder, lock):
    environment = Environment(folder, LOCKS / f"{lock}.txt")
    if not environment.is_complete():
        environment.begin()
        environment.install(environment.locks[0], "--requirement", environment.locks[0])
        environment.end()


def require_locked_python():
    if THIS_PYTHON not in PYTHONS:
        raise Refused(
            f"There are locks for Python {', '.join(PYTHONS)}; {sys.executable} is {THIS_PYTHON}.",
            f"Name one of these: make PYTHON=python{PYTHONS[-1]}",
            "petl_ext itself may do with a later one, and with whatever versions pip chooses: pip install .",
        )


if __name__ == "__main__":
    require_locked_python()
    (make if len(sys.argv) == 2 else make_only)(*sys.argv[1:])
