"""What tests of every kind share."""

import hypothesis
import pytest

from tests.integration.fleet import make_model

hypothesis.settings.register_profile("repeatable", derandomize=True, database=None)
hypothesis.settings.load_profile("repeatable")


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> object:
    """The quick start's tokenizer and shape with barely warmed-up weights; made once, read only."""
    return make_model(tmp_path_factory.mktemp("model") / "sort6")
