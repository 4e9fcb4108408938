"""Real sockets: Hello, reconnection, refusal, hostile bytes."""

import contextlib
import time

import numpy as np
import pytest
import zmq

from common import sockets, wire
from common.codec import encode
from common.errors import ConfigError, DeadlineError, ProtocolError, WireError
from common.keys import ClientKeys
from common.link import BrokerLink, parting
from common.sockets import RouterSocket
from tests.integration.fleet import free_address


def hello(name="a0"):
    return wire.Hello("actor", name, "", "s", 0, 1, 0, 4, "host", 1)


def until(condition, seconds=5.0):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():
            return True
    return False


def collect(router, wanted, seconds=5.0):
    got = []
    assert until(lambda: got.extend(router.receive(0.02)) or len(got) >= wanted, seconds), got
    return got


def greeted(router):
    """The first Hello and whose it is; heartbeats that waited for the connection may be ahead of it."""
    got = []
    assert until(lambda: got.extend(router.receive(0.02)) or any(isinstance(m, wire.Hello) for _, m in got)), got
    return next((identity, m) for identity, m in got if isinstance(m, wire.Hello))


@pytest.fixture
def address():
    return free_address()


def test_a_link_waits_for_a_broker_that_starts_later_and_greets_one_that_comes_back(address):
    link = BrokerLink(address, hello())
    try:
        time.sleep(0.3)
        for life in (1, 2):
            router = RouterSocket(address)
            identity, greeting = greeted(router)  # unasked, on every new connection
            assert greeting.name == "a0"
            router.send(identity, wire.Welcome("run", 3, 0.1))
            assert link.wait_welcome(5.0).version == 3
            if life == 1:
                router.send(identity, wire.WhoAreYou())
                assert until(lambda r=router: any(isinstance(m, wire.Hello) for _, m in r.receive(0.05)))
                router.send(identity, wire.Welcome("run", 3, 0.1))
            link.send(wire.GroupFailed(5, "x"))
            assert until(lambda r=router: any(getattr(m, "group", None) == 5 for _, m in r.receive(0.05)))
            router.close()
        assert link.run_id == "run"
    finally:
        link.close()


def test_after_an_outage_the_owner_hears_of_one_welcome_however_often_hello_was_said(address):
    link, said, welcomes = BrokerLink(address, hello()), [], 0
    try:
        router = RouterSocket(address)
        identity, _ = greeted(router)
        router.send(identity, wire.Welcome("run", 3, 0.02))
        assert link.wait_welcome(5.0)
        router.close()
        time.sleep(0.6)  # heartbeats wait in the link's socket meanwhile
        router = RouterSocket(address)
        known = False
        deadline = time.monotonic() + 1.5
        while time.monotonic() < deadline:
            for identity, message in router.receive(0.02):
                said.append(type(message))
                if isinstance(message, wire.Hello):
                    known = True
                    router.send(identity, wire.Welcome("run", 3, 0.02))
                elif not known:
                    router.send(identity, wire.WhoAreYou())
            while (message := link.receive()) is not None:
                welcomes += isinstance(message, wire.Welcome)
        assert said.count(wire.Heartbeat) > 10
        assert welcomes == 1 and said.count(wire.Hello) <= 3
    finally:
        link.close()
        router.close()


def test_a_link_that_fails_says_so_to_its_owner(address):
    link = BrokerLink(address, hello())
    router = RouterSocket(address)
    try:
        identity, _ = greeted(router)
        router.send(identity, wire.Welcome("run", 3, 0.02))
        assert link.wait_welcome(5.0)
        link.counters = {"tokens": np.int64(3)}
        beats = []
        assert until(lambda: beats.extend(m for _, m in router.receive(0.02) if m.counters) or beats)
        assert beats[0].counters == {"tokens": 3.0}
        link.counters = {"tokens": "three"}
        with pytest.raises(ValueError, match="three"):
            while True:
                link.receive(5.0)
    finally:
        link.close()
        router.close()


def test_an_address_that_only_a_broker_can_have_is_refused():
    with pytest.raises(ConfigError, match="tcp://HOST:PORT"):
        BrokerLink("tcp://*:5555", hello(), keys=ClientKeys("a0", *zmq.curve_keypair(), zmq.curve_keypair()[0]))


@pytest.mark.parametrize("error", [None, ValueError("oh no")])
def test_a_bye_says_what_ended_its_sender(error):
    said = []
    with contextlib.suppress(ValueError):
        try:
            if error:
                raise error
        finally:
            said.append(parting("stopped"))
    assert said == ["failed: ValueError: oh no" if error else "stopped"]
    assert wire.Bye(said[0]).orderly == (error is None)


def test_no_broker_is_a_deadline_error_that_names_the_address(address):
    link = BrokerLink(address, hello())
    try:
        with pytest.raises(DeadlineError, match=address):
            link.wait_welcome(0.3)
    finally:
        link.close()


def test_a_broker_that_falls_silent_is_a_deadline_error_and_one_that_is_back_in_time_is_not(address):
    router = RouterSocket(address)
    link = BrokerLink(address, hello())

    def serve(seconds, enough=lambda: False):
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and not enough():
            for identity, message in router.receive(0.05):
                answer = wire.Welcome("run", 0, 0.1) if isinstance(message, wire.Hello) else wire.Pong(0)
                router.send(identity, answer)

    try:
        serve(5.0, lambda: link.welcomed)
        link.wait_welcome(2.0)
        time.sleep(1.0)
        serve(1.2)
        while link.receive() is not None:
            pass
        deadline = time.monotonic() + 10.0
        with pytest.raises(DeadlineError, match=r"silent for .* start it again"):
            while time.monotonic() < deadline:
                link.receive(0.05)
    finally:
        link.close(None)
        router.close()


def test_refusal_reaches_the_peer(address):
    router = RouterSocket(address)
    link = BrokerLink(address, hello())
    try:
        (identity, _), *_ = collect(router, 1)
        router.send(identity, wire.Refused("another learner"))
        with pytest.raises(ProtocolError, match="another learner"):
            link.wait_welcome(5.0)
    finally:
        link.close()
        router.close()


def test_address_in_use_names_the_key_and_the_remedy(address):
    router = RouterSocket(address)
    try:
        with pytest.raises(ProtocolError, match=r"broker\.address=.*another broker"):
            RouterSocket(address)
    finally:
        router.close()


def test_hostile_bytes_are_errors_beside_good_messages_and_the_sender_lost_is_noticed(address):
    router = RouterSocket(address)
    context = zmq.Context()
    peer = context.socket(zmq.DEALER)
    peer.setsockopt(zmq.IDENTITY, b"evil")
    peer.setsockopt(zmq.LINGER, 0)
    peer.connect(address)
    try:
        peer.send_multipart([b"\x80\x04pickle"])
        peer.send_multipart([b""])
        peer.send_multipart(encode(wire.Bye("x")))
        got = collect(router, 3)
        assert [type(m) for _, m in got] == [WireError, WireError, wire.Bye]
        assert router.send(b"evil", wire.Pong(0))
        peer.close()
        assert until(lambda: not router.send(b"evil", wire.Pong(0)))
        assert not router.send(b"nobody", wire.Pong(0))
    finally:
        context.destroy(linger=0)
        router.close()


def test_a_peer_that_stops_reading_counts_as_gone_and_what_waits_for_it_is_bounded(address, monkeypatch):
    monkeypatch.setattr(sockets, "WAITING_MESSAGES", 200)
    router = RouterSocket(address)
    with zmq.Context() as context, context.socket(zmq.DEALER) as deaf:
        deaf.setsockopt(zmq.LINGER, 0)
        deaf.setsockopt(zmq.RCVHWM, 10)
        deaf.setsockopt(zmq.IDENTITY, b"deaf")
        deaf.connect(address)
        deaf.send_multipart(encode(wire.Bye("x")))
        collect(router, 1)
        grant = wire.Grant(0, -1, 0, np.arange(500), np.arange(500))  # 8 kB
        sent = next(n for n in range(20_000) if not router.send(b"deaf", grant))
        assert sent > 1000  # the socket's own buffers come first
    router.close()


def test_large_arrays_survive_and_a_slow_peer_does_not_lose_messages(address):
    router = RouterSocket(address)
    link = BrokerLink(address, hello())
    try:
        (identity, _), *_ = collect(router, 1)
        router.send(identity, wire.Welcome("run", 0, 1.0))
        link.wait_welcome(5.0)
        count = 3000  # three times the high-water mark
        for n in range(count):
            assert router.send(identity, wire.Grant(n, -1, 0, np.arange(20), np.arange(20)))
        got = []

        def pump():
            router.receive(0.0)
            while (m := link.receive(0.01)) is not None:
                got.append(m)
            return len(got) == count

        assert until(pump, 20.0), len(got)
        assert [g.min_version for g in got] == list(range(count))
        big = wire.ScoreRequest(1, 0, 1.0, np.array([0, 500_000], np.int32), np.arange(500_000, dtype=np.int32),
                                np.ones(500_000, np.uint8), np.zeros((500_000, 0), np.int32))  # fmt: skip
        router.send(identity, big)
        assert (link.receive(5.0).token_ids == big.token_ids).all()
    finally:
        link.close()
        router.close()
