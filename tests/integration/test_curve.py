"""Keys over real sockets: who is let in, under which name, and what the others are told."""

import socket
import time

import pytest

from common import keys as key_files
from common import wire
from common.config import BrokerSection
from common.errors import ConfigError, DeadlineError, ProtocolError
from common.link import BrokerLink
from common.sockets import RouterSocket
from tests.integration.harness import Peer, make_broker
from tools import keys


@pytest.fixture
def fleet(tmp_path, request):
    """A broker with keys; a test may add to its section."""
    keys.make(tmp_path / "keys", ["learner", "a0", "a1"])
    broker = make_broker(tmp_path, broker={"keys": str(tmp_path / "keys"), **getattr(request, "param", {})})
    yield broker, tmp_path / "keys"
    broker.end()


def hello(role, name):
    return wire.Hello(role, name, "", "t", 0, 1, 0, 8, "host", 1)


def test_the_allowed_are_served_and_the_others_told_why(fleet, tmp_path):
    broker, _ = fleet
    learner, actor = Peer(broker, "learner", "learner"), Peer(broker, "actor", "a0")
    actor.expect(wire.Grant)
    address, server = broker.config.broker.address, key_files.broker_keys(broker.config.broker).public
    keys.make(tmp_path / "strange", ["x"])
    stranger = key_files.client_keys(BrokerSection(address=address, keys=str(tmp_path / "strange")), "x")
    cases = {
        "tools.keys allow DIR x FILE": key_files.ClientKeys("x", stranger.public, stranger.secret, server),
        "server.pub": stranger,  # believes in another broker
        "without keys": None,
    }
    for words, mine in cases.items():
        link = BrokerLink(address, hello("actor", "x"), keys=mine)
        try:
            with pytest.raises(DeadlineError, match=words):
                link.wait_welcome(0.8)
        finally:
            link.close()
    for peer in (learner, actor):
        peer.link.close()


@pytest.mark.parametrize("tries", [1, 3])
def test_a_key_that_is_let_in_later_needs_no_new_process(fleet, tmp_path, monkeypatch, tries):
    monkeypatch.setattr(key_files, "LOOK_AGAIN_S", 0.0)
    monkeypatch.setattr("common.link.REFUSED_S", 0.2)
    broker, directory = fleet
    server = key_files.broker_keys(broker.config.broker).public
    keys.make(tmp_path / "strange", ["x"])
    stranger = key_files.client_keys(BrokerSection(keys=str(tmp_path / "strange")), "x")
    mine = key_files.ClientKeys("x", stranger.public, stranger.secret, server)
    link = BrokerLink(broker.config.broker.address, hello("actor", "x"), keys=mine)
    deadline = time.monotonic() + 10.0
    while "allow DIR x FILE" not in link._hint:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    time.sleep(0.3 * tries)
    assert not link.welcomed
    keys.allow(directory, "x", tmp_path / "strange" / "allowed" / "x.pub")
    assert link.wait_welcome(5.0) is not None
    link.close()


def test_an_answer_that_is_none_is_not_the_end(tmp_path, monkeypatch):
    """A load balancer's, before the broker behind it is up: libzmq gives up after one such."""
    monkeypatch.setattr("common.link.REFUSED_S", 0.2)
    keys.make(tmp_path / "keys", ["a0"])
    with socket.create_server(("127.0.0.1", 0)) as balancer:
        section = {"address": f"tcp://127.0.0.1:{balancer.getsockname()[1]}", "keys": str(tmp_path / "keys")}
        mine = key_files.client_keys(BrokerSection(**section), "a0")
        link = BrokerLink(section["address"], hello("actor", "a0"), keys=mine)
        balancer.settimeout(10.0)
        for _ in range(3):
            peer, _ = balancer.accept()
            with peer:
                peer.sendall(b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\n\r\n")
    assert "or is no broker" in link._hint
    broker = make_broker(tmp_path, broker=section)
    assert link.wait_welcome(10.0) is not None and link._hint == ""
    link.close()
    broker.end()


def test_nobody_speaks_under_another_s_name(fleet):
    broker, _ = fleet
    learner, honest = Peer(broker, "learner", "learner"), Peer(broker, "actor", "a0")
    section = broker.config.broker
    liar = BrokerLink(section.address, hello("actor", "a0"), keys=key_files.client_keys(section, "a1"))
    with pytest.raises(DeadlineError):
        liar.wait_welcome(0.6)
    liar.close()
    assert broker.service.router.impostors["a1"] > 0
    honest.expect(wire.Grant)
    ranked = BrokerLink(section.address, hello("replica", "a1.3"), keys=key_files.client_keys(section, "a1"))
    assert ranked.wait_welcome(3) is not None  # a rank of its own name
    for link in (ranked, honest.link, learner.link):
        link.close()


def test_a_list_that_cannot_be_asked_costs_one_connection_and_not_all_that_follow(fleet, monkeypatch):
    monkeypatch.setattr("common.link.REFUSED_S", 0.2)
    broker, _ = fleet
    section = broker.config.broker
    with monkeypatch.context() as m:
        m.setattr(broker.service.router._allowed, "name_of", lambda _: 1 / 0)
        link = BrokerLink(section.address, hello("actor", "a0"), keys=key_files.client_keys(section, "a0"))
        with pytest.raises(DeadlineError, match="could not read its allow-list, which its log tells more of"):
            link.wait_welcome(0.5)
    Peer(broker, "actor", "a1").link.close()
    assert link.wait_welcome(5.0) is not None  # it has knocked again
    link.close()


def test_a_revoked_key_is_shut_out_at_once_and_its_owner_told(fleet, monkeypatch):
    monkeypatch.setattr(key_files, "LOOK_AGAIN_S", 0.0)
    broker, directory = fleet
    actor = Peer(broker, "actor", "a0")
    keys.revoke(directory, "a0")
    with pytest.raises(ProtocolError, match=r"no longer allowed.*tools\.keys allow"):  # long before peer_timeout_s
        while True:
            actor.link.receive(10.0)
    assert not broker.service.door.roster.role("actor")
    assert broker.service.router.impostors["revoked"] > 0
    actor.link.close(None)
    keys.allow(directory, "a0", directory / "revoked" / "a0.pub")
    again = Peer(broker, "actor", "a0", session="again")
    again.link.close()


def test_no_address_beyond_the_machine_without_keys(tmp_path):
    for make in (lambda a: RouterSocket(a), lambda a: BrokerLink(a, hello("actor", "a0"))):
        with pytest.raises(ConfigError, match=r"broker\.keys=DIR"):
            make("tcp://0.0.0.0:5555")
    with pytest.raises(ConfigError, match=r"tools\.keys make"):
        make_broker(tmp_path, broker={"address": "tcp://*:5555"})
