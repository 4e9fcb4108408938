"""Slow verifiers in threads: bounded, late ones left behind, dropped ones not told of, nothing left over."""

import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from actor.scoring.breaker import Breaker
from actor.scoring.pool import LEFT_BEHIND, Done, Pool
from common.errors import TaskError

PATIENCE_S = 5.0


def drain(pool: Pool, until: Callable[[list[Done]], bool]) -> list[Done]:
    found: list[Done] = []
    deadline = time.monotonic() + PATIENCE_S
    while not until(found):
        assert time.monotonic() < deadline
        found += pool.poll()
        time.sleep(0.001)
    return found


def test_work_is_done_by_a_bounded_number_of_threads_and_told_of_once() -> None:
    pool, lock, state = Pool(3, PATIENCE_S), threading.Lock(), {"now": 0, "most": 0}

    def work(n: int) -> int:
        with lock:
            state["now"] += 1
            state["most"] = max(state["most"], state["now"])
        time.sleep(0.002)
        with lock:
            state["now"] -= 1
        if n == 7:
            raise ValueError("seven")
        return n * n

    owners = [object() for _ in range(40)]
    for n, owner in enumerate(owners):
        pool.submit(owner, lambda n=n: work(n))
    assert pool.pending == 40
    found = drain(pool, lambda f: len(f) == 40)
    assert state["most"] == 3 and pool.pending == 0 and pool.poll() == []
    by_owner = {id(done.owner): done for done in found}
    for n, owner in enumerate(owners):
        done = by_owner[id(owner)]
        assert str(done.error) == "seven" if n == 7 else done.result == n * n
    pool.close()


def test_polling_never_waits_for_what_runs() -> None:
    pool, go = Pool(1, PATIENCE_S), threading.Event()
    pool.submit("a", go.wait)
    assert [pool.poll() for _ in range(100)] == [[]] * 100
    go.set()
    assert drain(pool, bool)[0].result is True
    pool.close()


def test_what_is_late_is_left_behind_and_another_thread_serves() -> None:
    pool, stuck = Pool(1, 1.0), threading.Event()
    pool.submit("stuck", stuck.wait)
    pool.submit("next", lambda: 5)
    found = drain(pool, lambda f: len(f) == 2)
    assert [done.owner for done in found] == ["stuck", "next"]
    assert isinstance(found[0].error, TimeoutError) and "reward.deadline_s=1" in str(found[0].error)
    assert found[1].result == 5 and pool.left_behind == 1
    stuck.set()  # its answer comes too late to be told of
    deadline = time.monotonic() + PATIENCE_S
    while pool.left_behind:
        assert time.monotonic() < deadline
        time.sleep(0.001)
    assert pool.poll() == [] and pool.pending == 0
    pool.close()


def test_too_many_left_behind_end_the_actor_with_a_remedy() -> None:
    pool, stuck = Pool(1, 0.01), threading.Event()
    with pytest.raises(TaskError, match="cannot be stopped from outside: give the task's own work a deadline"):
        for n in range(LEFT_BEHIND + 1):
            pool.submit(n, stuck.wait)
            drain(pool, bool)
    stuck.set()
    pool.close()


def test_what_is_dropped_is_not_told_of_and_takes_no_thread() -> None:
    pool, go, ran = Pool(1, PATIENCE_S), threading.Event(), list[Any]()
    first, second, third = object(), object(), object()
    pool.submit(first, go.wait)
    pool.submit(second, lambda: ran.append(2))
    pool.submit(third, lambda: ran.append(3))
    pool.drop(first)
    pool.drop(second)
    pool.drop(object())
    assert pool.pending == 1
    go.set()
    assert [done.owner for done in drain(pool, bool)] == [third] and ran == [3] and pool.pending == 0
    pool.close()


def test_closing_leaves_no_thread() -> None:
    before = set(threading.enumerate())
    pool = Pool(4, PATIENCE_S)
    for n in range(20):
        pool.submit(n, lambda: time.sleep(0.001))
    pool.close()
    assert set(threading.enumerate()) - before == set()


def test_a_breaker_goes_down_tries_now_and_then_and_comes_up() -> None:
    breaker = Breaker(down_after=3, probe_s=10.0)
    assert not breaker.failed(0.0) and not breaker.failed(1.0)
    assert not breaker.succeeded()  # the row is broken
    assert not breaker.failed(2.0) and not breaker.failed(3.0) and breaker.admits(3.0)
    assert breaker.failed(4.0) and breaker.is_down  # said once
    assert not breaker.failed(5.0)
    assert not breaker.admits(13.9) and breaker.wait_s(9.0) == 5.0
    assert breaker.admits(14.0) and not breaker.admits(14.1)  # one try, then rest again
    assert breaker.admits(24.0) and breaker.succeeded() and breaker.admits(24.0) and not breaker.is_down
