import pytest

from petl_ext.ops import floors


@pytest.fixture
def no_floors(monkeypatch):
    """Otherwise so few rows would go to the modules' own forward."""
    monkeypatch.setattr(floors, "FLOORS", {})
