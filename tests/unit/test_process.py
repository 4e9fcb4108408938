"""Stop signals."""

import signal

import pytest

from common import process
from common.process import StopFlag


@pytest.fixture(autouse=True)
def handlers():
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_a_signal_that_is_passed_on_is_the_same_stop_and_a_later_one_ends_the_process(monkeypatch):
    stop = StopFlag().install()
    signal.raise_signal(signal.SIGTERM)
    assert stop.is_set and stop.reason == "SIGTERM"
    signal.raise_signal(signal.SIGTERM)  # torchrun's, to a rank that had one from Slurm
    monkeypatch.setattr(process, "SAME_STOP_S", 0.0)
    with pytest.raises(SystemExit) as ended:
        signal.raise_signal(signal.SIGINT)
    assert ended.value.code == 128 + signal.SIGINT


def test_a_signal_that_follows_another_reason_to_stop_is_the_first():
    stop = StopFlag().install()
    stop.set("the broker said stop")
    signal.raise_signal(signal.SIGTERM)
    assert stop.is_set
