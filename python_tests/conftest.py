import os

if "PYTEST_XDIST_WORKER" in os.environ:
    # Each worker and each process that it starts has one core; torch reads this when it is imported.
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
from devices import DEVICES

# The longest, so that no process is left alone with one of them at the end.
FIRST = ("test_cuda_build", "test_kernels_cpp", "test_every_op")


def pytest_collection_modifyitems(items):
    positions = {name: position for position, name in enumerate(FIRST)}
    items.sort(key=lambda item: positions.get(item.path.stem, len(FIRST)))


@pytest.fixture(params=DEVICES, ids=str)
def device(request):
    """A test that asks for it runs on every CPU path, on the emulator, and on a GPU if there is one."""
    with request.param.entered():
        yield request.param
