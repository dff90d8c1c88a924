import pytest
from places import PLACES


@pytest.fixture(params=PLACES, ids=str)
def place(request):
    """A test that asks for it runs on every CPU path, on the emulator, and on a GPU if there is one."""
    with request.param.entered():
        yield request.param
