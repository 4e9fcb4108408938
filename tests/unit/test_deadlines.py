"""Waits that end, with operations and groups that never do."""

import os
import threading
from types import SimpleNamespace

import pytest

from common.deadlines import NO_WATCHDOG, Watched, answered, connected, without_watchdog
from common.errors import DeadlineError


def test_a_gpu_operation_that_never_ends_is_given_up_and_its_communicator_freed():
    aborted = []
    stuck = Watched(SimpleNamespace(is_completed=lambda: False), 0.05, lambda: aborted.append(True))
    with pytest.raises(RuntimeError, match="not done within 0 s"):
        stuck.wait()
    assert aborted == [True]
    answers = iter([False, False, True])
    done = SimpleNamespace(
        is_completed=lambda: next(answers), exception=lambda: None, wait=lambda: aborted.append("waited")
    )
    Watched(done, 5.0, lambda: aborted.append("never")).wait()
    assert aborted == [True, "waited"]


def test_a_gpu_operation_that_broke_is_not_taken_for_done():
    """It says that it is completed, and whether its wait raises depends on how torch was told to wait."""
    aborted = []
    broke = SimpleNamespace(
        is_completed=lambda: True,
        exception=lambda: RuntimeError("[nccl.cpp:1] remote process exited"),
        wait=lambda: True,
    )
    with pytest.raises(RuntimeError, match="a broadcast broke: remote process exited"):
        Watched(broke, 5.0, lambda: aborted.append(True)).wait()
    assert aborted == [True]


def test_an_answer_is_waited_for_as_long_as_it_may_take():
    assert answered(lambda: 7, 0.0, "host:1") == 7
    with pytest.raises(KeyError, match="gone"):
        answered(lambda: {}["gone"], 1.0, "host:1")
    late = threading.Event()
    with pytest.raises(DeadlineError, match="host:1 has not answered"):
        answered(late.wait, -0.9, "host:1")
    late.set()


def test_torch_is_asked_for_no_watchdog_only_while_a_group_is_made(monkeypatch):
    first, second = NO_WATCHDOG
    monkeypatch.setenv(first, "0")
    monkeypatch.delenv(second, raising=False)
    with pytest.raises(KeyError), without_watchdog():
        assert {name: os.environ[name] for name in NO_WATCHDOG} == NO_WATCHDOG
        raise KeyError
    assert os.environ[first] == "0" and second not in os.environ


def test_a_group_is_made_without_a_watchdog_and_connected_with_a_deadline():
    seen, never = [], threading.Event()

    def make(connect):
        seen.append({name: os.environ.get(name) for name in NO_WATCHDOG})
        return SimpleNamespace(eager_connect_single_device=connect)

    group = connected(lambda: make(seen.append), "cuda:3", 1.0, "weights/1/1")
    assert seen == [NO_WATCHDOG, "cuda:3"] and group.eager_connect_single_device("cuda:4") is None
    with pytest.raises(DeadlineError, match=r"communicator of weights/1/2 has not answered .*weights\.deadline_s"):
        connected(lambda: make(lambda _: never.wait()), "cuda:3", -0.9, "weights/1/2")
    never.set()
