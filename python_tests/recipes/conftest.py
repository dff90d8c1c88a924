import pytest
from transformers.utils import logging

from petl_ext.demo.digits.for_recipes import write_for_recipes


@pytest.fixture(scope="session", autouse=True)
def quiet():
    logging.set_verbosity_error()
    logging.disable_progress_bar()


@pytest.fixture(scope="session")
def digits(tmp_path_factory):
    """What `petl-ext demo digits --quick` writes."""
    folder = tmp_path_factory.mktemp("recipes") / "digits"
    write_for_recipes(folder, quick=True, progress=False)
    return folder
