import os

if "PYTEST_XDIST_WORKER" in os.environ:
    # Each worker and each process that it starts has one core; torch reads this when it is imported.
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
from places import PLACES


@pytest.fixture(params=PLACES, ids=str)
def place(request):
    """A test that asks for it runs on every CPU path, on the emulator, and on a GPU if there is one."""
    with request.param.entered():
        yield request.param
