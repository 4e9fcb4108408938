"""What tests of every kind share."""

import os

import hypothesis
import pytest

from tests.integration.fleet import make_model

# No deadline: a busy machine takes longer over an example, and that says nothing.
hypothesis.settings.register_profile("repeatable", derandomize=True, database=None, deadline=None)
hypothesis.settings.load_profile("repeatable")


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> object:
    """The quick start's tokenizer and shape with barely warmed-up weights; made once for all workers, read only."""
    place = tmp_path_factory.getbasetemp()
    return make_model((place.parent if "PYTEST_XDIST_WORKER" in os.environ else place) / "model" / "sort6")
