"""A wait for messages ends when another thread says so."""

import threading
import time

import zmq

from common.process import free_port
from common.sockets import RouterSocket
from common.waker import Waker


def test_a_wait_ends_when_another_thread_wakes_it_and_the_next_one_lasts():
    router = RouterSocket(f"tcp://127.0.0.1:{free_port()}")
    try:
        threading.Timer(0.05, router.wake).start()
        began = time.monotonic()
        assert not router.wait(20)  # nothing has arrived
        assert time.monotonic() - began < 10
        assert not router.wait(0)
        router.wake()
        router.wake()  # before the wait begins, and twice
        began = time.monotonic()
        assert not router.wait(20)
        assert time.monotonic() - began < 10
        began = time.monotonic()
        assert not router.wait(0.05)
        assert time.monotonic() - began >= 0.04  # no wake is left over
    finally:
        router.close()
    router.wake()  # nobody waits any more


def test_more_wakes_than_a_socket_holds_are_one():
    context = zmq.Context()
    waker = Waker(context)
    waker.clear()  # of nothing
    for _ in range(100_000):
        waker.wake()
    assert waker.seen.poll(0)
    waker.clear()
    assert not waker.seen.poll(0)
    waker.close()
    waker.wake()  # nobody is
    context.destroy(linger=0)
