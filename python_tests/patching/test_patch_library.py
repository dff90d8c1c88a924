"""The library `adapters` itself, which pins its transformers and so lives in a folder of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(sys.prefix) / "adapters"
SUPPORT = Path(__file__).parents[1] / "support"


@pytest.mark.skipif(not FOLDER.is_dir(), reason=f"the library adapters is not in {FOLDER}; `make test` puts it there")
def test_bottlenecks_of_the_library_compute_the_same():
    path = os.pathsep.join(map(str, (FOLDER, SUPPORT.parents[1], SUPPORT)))
    script = SUPPORT / "adapters_library_check.py"
    run = subprocess.run(
        [sys.executable, script], env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines()[-1] == "all computed the same"
