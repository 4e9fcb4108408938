"""Who is behind the socket: greeting, refusing, losing and quarantining peers.

A peer that misbehaves again and again is not listened to for a while
(``broker.quarantine_after``, ``broker.quarantine_s``); everybody else goes on undisturbed.
"""

import logging
import time
from collections.abc import Callable
from typing import Any

from broker.conduct import Conduct
from broker.figures import Figures
from broker.identities import Identities
from broker.outlet import Outlet
from broker.peers import Peer, Roster, name_of
from common import wire
from common.config import BrokerSection
from common.curve import Seldom
from common.errors import RevokedError
from common.sockets import RouterSocket

SHOWN = 500  # characters of what a peer says, in the log

log = logging.getLogger("broker.door")


class Door:
    """The roster of live peers, and the way to them."""

    def __init__(
        self,
        section: BrokerSection,
        router: RouterSocket,
        outlet: Outlet,
        figures: Figures,
        run_id: str,
        identities: Identities,
    ) -> None:
        self.identities = identities
        self.section, self.router, self.outlet, self.figures, self.run_id = section, router, outlet, figures, run_id
        self.roster = Roster()
        self.conduct = Conduct(section.quarantine_after, quarantine_s=section.quarantine_s)
        self.version = 0  # the newest published, for Pong and Welcome
        self.objection: Callable[[wire.Hello], str] = lambda hello: ""  # to what a peer says of itself
        self.on_joined: Callable[[Peer, bool], None] = lambda peer, known: None
        self.on_left: Callable[[Peer], str] = lambda peer: ""
        self._next_pong = 0.0
        self._may_say = Seldom()

    def receive(self, timeout_s: float) -> list[tuple[bytes, Any]]:
        """See :meth:`RouterSocket.receive`; what comes from a peer in quarantine is dropped unread."""
        now, heard = time.monotonic(), list[tuple[bytes, Any]]()
        for identity, message in self.router.receive(
            timeout_s, lambda identity: self.conduct.is_quarantined(self.who(identity), now)
        ):
            if isinstance(message, RevokedError):
                self._shut_out(identity, str(message))
            else:
                heard.append((identity, message))
        return heard

    def _shut_out(self, identity: bytes, reason: str) -> None:
        """Its key was revoked: nobody waits for it any more, and it is told."""
        peer = self.roster.get(identity)
        if peer is not None:
            self.lose(peer, "its key is no longer allowed")
        elif self._may_say((self.who(identity), "revoked")):
            log.warning("dropped a message from %s: its key is no longer allowed", self.who(identity)[:80])
        self.router.send(identity, wire.Refused(reason))

    def who(self, identity: bytes) -> str:
        """By whom an offence is remembered: the name that a key stands for, or else one process of that name."""
        text = identity[: wire.MAX_TEXT].decode(errors="replace")
        return text.partition("/")[0] if self.section.keys else text

    def send(self, peer: Peer, message: Any) -> None:
        """To ``peer``, once everything decided so far is on disk; an unreachable peer is lost."""

        def action() -> None:
            if not self.router.send(peer.identity, message) and self.roster.get(peer.identity) is peer:
                self.lose(peer, "its connection closed")

        self.outlet.do(action)

    def bad_message(self, identity: bytes, what: str, error: Exception) -> None:
        """A message that could not be taken; counted, and an offence. Said once a minute about each kind and peer."""
        self._misdeed(identity, type(error).__name__, f"{what} from {self.who(identity)[:80]}: {error}")

    def _misdeed(self, identity: bytes, kind: str, words: str) -> None:
        self.figures.errors[kind] += 1
        if self._may_say((self.who(identity), kind)):
            log.warning("%s", words)
        self.offence(identity, kind)

    def warn(self, peer: Peer, kind: str, words: str, *values: Any) -> None:
        """Log what ``peer`` said went wrong, once a minute about each kind and peer; texts are cut short."""
        if self._may_say((peer.name, kind)):
            log.warning(words, *(value[:SHOWN] if isinstance(value, str) else value for value in values))

    def offence(self, identity: bytes, kind: str, times: int = 1) -> None:
        """Count what ``identity`` did wrong; it is lost and muted if it goes on."""
        now, who = time.monotonic(), self.who(identity)
        if not any([self.conduct.offence(who, kind, now) for _ in range(times)]):
            return
        self.figures.errors["quarantined"] += 1
        log.warning(
            "%s is not listened to for %.0f s, after more than %d offences in %.0f s (broker.quarantine_after); "
            "they were: %s", who[:80], self.conduct.quarantine_s, self.conduct.limit, self.conduct.window_s,
            ", ".join(f"{k} {n}" for k, n in self.conduct.counts[who].items()),
        )  # fmt: skip
        peer = self.roster.get(identity)
        if peer is not None:
            self.lose(peer, "quarantined")

    def hello(self, identity: bytes, hello: wire.Hello) -> None:
        """Greet a new peer, or say why not."""
        reason = self._objection(identity, hello)
        if reason:
            self.router.send(identity, wire.Refused(reason))
            self._misdeed(identity, "refused_hello", f"refused {hello.role} {hello.name}: {reason}")
            return
        known = self.roster.get(identity)
        peer = Peer(identity, hello, time.monotonic(), hello.version)
        self.roster.add(peer)
        self.on_joined(peer, known is not None)
        if known is None:
            log.info(
                "%s %s joined (version %d, %s pid %d)", hello.role, hello.name, hello.version, hello.host, hello.pid
            )

    def welcome(self, peer: Peer) -> None:
        """The answer to a Hello."""
        self.send(peer, self.greeting())

    def greeting(self) -> wire.Welcome:
        """What a Hello is answered with."""
        return wire.Welcome(self.run_id, self.version, self.section.heartbeat_s)

    def _objection(self, identity: bytes, hello: wire.Hello) -> str:
        if hello.role not in ("actor", "replica", "learner"):
            return f"unknown role {hello.role!r}"
        if hello.role == "learner" and hello.name != "learner":  # a key stands for a name: no actor's is the learner's
            return f"a learner is named 'learner', not {hello.name!r}"
        if hello.run_id and hello.run_id != self.run_id:
            return (
                f"it belongs to run {hello.run_id}, this broker serves run {self.run_id}; "
                "restart it, or give it this run's checkpoint"
            )
        return self.identities.objection(hello) or self.objection(hello) or self._displaced(identity, hello)

    def _displaced(self, identity: bytes, hello: wire.Hello) -> str:
        """Who stands where the new one would, in words; one whose connection is gone is lost instead."""
        for other in self.roster.all():
            if other.identity == identity or not _are_rivals(hello, other):
                continue
            if self.router.send(other.identity, wire.Pong(self.version)):
                where = f"is connected ({other.hello.host} pid {other.hello.pid})"
                if other.role != hello.role:
                    return f"{other.role} {other.name!r} {where}: give one of them another --name"
                what = "another learner" if hello.role == "learner" else f"another {hello.role} named {hello.name!r}"
                return f"{what} {where}; stop it first, or start a broker of its own for this one (broker.address)"
            self.lose(other, "replaced by a new process")
        return ""

    def look_after(self, now: float) -> None:
        """Pong to everybody in time; lose who is gone or silent."""
        for peer in self.pong(now):
            self.lose(peer, "its connection closed")
        for peer in self.roster.silent(now, self.section.peer_timeout_s):
            self.lose(peer, f"silent for {now - peer.heard:.0f} s (broker.peer_timeout_s)")

    def pong(self, now: float) -> list[Peer]:
        """To everybody, once a heartbeat; returns those whose connection is gone."""
        if now < self._next_pong:
            return []
        self._next_pong = now + self.section.heartbeat_s
        return [peer for peer in self.roster.all() if not self.router.send(peer.identity, wire.Pong(self.version))]

    def lose(self, peer: Peer, reason: str, orderly: bool = False) -> None:
        """``peer`` is gone."""
        if self.roster.remove(peer.identity) is None:
            return
        self.router.forget(peer.identity)
        loss = self.on_left(peer)
        level = logging.INFO if orderly else logging.WARNING
        log.log(level, "%s %s left: %s%s", peer.role, peer.name, reason, f"; {loss}" if loss else "")


def _are_rivals(hello: wire.Hello, other: Peer) -> bool:
    """Whether who says ``hello`` would stand where ``other`` does. Ranks of one learner stand side by side."""
    if other.role != hello.role:
        return other.name == name_of(hello)
    if other.hello.session == hello.session:
        return False
    return other.hello.rank == 0 if hello.role == "learner" else other.hello.name == hello.name
