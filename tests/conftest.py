"""What tests of every kind share."""

import pytest

from tests.integration.fleet import make_model


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> object:
    """The quick start's tokenizer and shape with barely warmed-up weights; made once, read only."""
    return make_model(tmp_path_factory.mktemp("model") / "sort6")
