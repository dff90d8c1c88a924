"""PEP 517/660 backend: setuptools.build_meta, compiling against the torch of the environment that is installed into.

pip's build isolation hides that environment's site-packages but runs its interpreter, so sysconfig still names them.
They are appended to the end of sys.path: whatever pip put into the isolated environment wins. setuptools is requested
only where the environment has none that is new enough, and a CUDA compiler only where CUDA kernels are to be built and
the machine has no nvcc for them, which makes `pip install .` work without any index elsewhere.
"""

import importlib
import importlib.util
import os
import site
import sys
import sysconfig
from importlib import metadata

import cuda_toolkit

MIN_TORCH = (2, 10)
MIN_SETUPTOOLS = (70, 1)  # the first to build wheels without the package wheel


def _sees_system_packages():
    try:
        with open(os.path.join(sys.prefix, "pyvenv.cfg")) as file:
            lines = [line.replace(" ", "").strip().lower() for line in file]
    except OSError:
        return True
    return "include-system-site-packages=true" in lines


def _target_directories():
    directories = os.environ.get("PETL_TORCH_SITE", "").split(os.pathsep)
    directories += [sysconfig.get_path("platlib"), sysconfig.get_path("purelib")]
    if _sees_system_packages():
        base = dict.fromkeys(("base", "platbase", "installed_base", "installed_platbase"), sys.base_prefix)
        directories += [sysconfig.get_path("platlib", vars=base), sysconfig.get_path("purelib", vars=base)]
        directories += [site.getusersitepackages(), *site.getsitepackages([sys.base_prefix])]
    return list(dict.fromkeys(d for d in directories if d and os.path.isdir(d)))


def _expose_target():
    sys.path.extend(d for d in _target_directories() if d not in sys.path)
    importlib.invalidate_caches()


def _release(package):
    """The first two components of the version, (0, 0) where the package is missing."""
    try:
        return tuple(int(part) for part in metadata.version(package).split(".")[:2])
    except metadata.PackageNotFoundError:
        return (0, 0)


def _has_new_setuptools():
    return _release("setuptools") >= MIN_SETUPTOOLS


def require_setuptools():
    """pip has brought one where the build is isolated."""
    if not _has_new_setuptools():
        raise SystemExit(
            f"\n*** petl_ext is built by setuptools {'.'.join(map(str, MIN_SETUPTOOLS))} or later, found "
            f"{'.'.join(map(str, _release('setuptools')))}.\n"
            "*** Upgrade it (pip install --upgrade setuptools), or leave --no-build-isolation out:\n"
            "*** then pip brings one for the build alone.\n"
        )


def _check_writable():
    source = os.getcwd()
    if not os.access(source, os.W_OK):
        raise SystemExit(
            f"\n*** petl_ext is built in its source folder, and {source} cannot be written to.\n"
            "*** Copy it to where it can, and install the copy:\n"
            f"*** cp -r {source} petl_ext-copy && pip install ./petl_ext-copy\n"
        )


def _check_torch():
    wanted = "{}.{}".format(*MIN_TORCH)
    remedy = (
        "*** Install PyTorch there first; where the build cannot see the environment (uv, python -m build),\n"
        "*** set PETL_TORCH_SITE to the site-packages folder that holds torch."
    )
    if importlib.util.find_spec("torch") is None:
        looked = ", ".join(_target_directories())
        raise SystemExit(
            f"\n*** petl_ext is compiled against the PyTorch (>= {wanted}) of the environment it is installed into;\n"
            f"*** none found in {looked}.\n{remedy}\n"
        )
    if _release("torch") < MIN_TORCH:
        raise SystemExit(
            f"\n*** petl_ext needs PyTorch >= {wanted}, found {metadata.version('torch')}.\n"
            f"*** Its C++ part uses the LibTorch stable ABI of {wanted}.\n{remedy}\n"
        )


def _hook(name):
    """setuptools' own, looked up at the call: pip asks which hooks there are before it has brought a new setuptools."""

    def call(*arguments, **named_arguments):
        from setuptools import build_meta

        _check_writable()
        return getattr(build_meta, name)(*arguments, **named_arguments)

    return call


_expose_target()

build_sdist = _hook("build_sdist")
build_wheel = _hook("build_wheel")
build_editable = _hook("build_editable")
prepare_metadata_for_build_wheel = _hook("prepare_metadata_for_build_wheel")
prepare_metadata_for_build_editable = _hook("prepare_metadata_for_build_editable")


def _requirements():
    return [] if _has_new_setuptools() else ["setuptools>={}.{}".format(*MIN_SETUPTOOLS)]


def get_requires_for_build_sdist(config_settings=None):
    return _requirements()


def get_requires_for_build_wheel(config_settings=None):
    _check_torch()
    return _requirements() + cuda_toolkit.packages()


get_requires_for_build_editable = get_requires_for_build_wheel
