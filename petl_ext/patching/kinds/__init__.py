"""The kinds of modules that `patch` knows: every `Kind` in a file of this folder, one file for each code base."""

import importlib
import pkgutil

from petl_ext.patching.kind import Kind

_FILES = [importlib.import_module(f"{__name__}.{file.name}") for file in pkgutil.iter_modules(__path__)]
KINDS = [
    kind
    for file in _FILES
    for kind in vars(file).values()
    if isinstance(kind, type) and issubclass(kind, Kind) and kind.__module__ == file.__name__
]
