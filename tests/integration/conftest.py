"""What tests of running processes share."""

import pytest

from tests.integration.harness import make_broker


@pytest.fixture
def make(tmp_path):
    """Brokers in ``tmp_path / name`` with whole ``sections`` of their own; all are ended with the test."""
    brokers = []

    def build(name="", **sections):
        (tmp_path / name).mkdir(exist_ok=True)
        brokers.append(make_broker(tmp_path / name, **sections))
        return brokers[-1]

    yield build
    for broker in brokers:
        broker.end()
