"""What the peers do with their time, by role, and what keeps a parked learner waiting: for people who watch.

Sums only ever grow while the broker lives; whoever reads takes differences. A peer's first heartbeat sets
its mark and counts for nothing, so one that joins again is not counted twice.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

from broker.peers import Peer, Roster
from common.frozen import POLICY
from common.trace import STATES

PEERS_SHOWN = 64  # of each role in status.json, which is written twice a second
SILENT_S = 3.0  # three heartbeats
NAMES_SHOWN = 8
UNFILLED, DECODING = "seconds_unfilled", "seconds_decode"  # an actor's counters

# What a learner that has asked for its shard waits for: groups; scores of them; coins and packing; the version
# that shall score them.
ROLLOUTS, SCORING, PACKING, PUBLISH = "rollouts", "scoring", "packing", "publish"


class Fleet:
    """Seconds by role and state, the learner's parked seconds by cause."""

    def __init__(self, own: Callable[[], dict[str, float]] = dict) -> None:
        """``own``: the broker's seconds by state."""
        self.seconds: defaultdict[str, defaultdict[str, float]] = defaultdict(lambda: defaultdict(float))  # by role
        self.policy_seconds: defaultdict[str, float] = defaultdict(float)  # of the replicas of the policy alone
        self.unfilled_s = 0.0  # of actors that sampled: their time times the share of their slots that stayed empty
        self.decoding_s = 0.0  # of actors
        self.parked: defaultdict[str, float] = defaultdict(float)  # cause -> seconds
        self._own = own
        self._waits: tuple[str, float] = ("", 0.0)  # for what, seen when

    def heard(self, peer: Peer, seconds: dict[str, float], counters: dict[str, float] | None = None) -> None:
        """A heartbeat told ``seconds`` in each state since the peer's start, and its ``counters``; kept where sound."""
        sound = known_states(peer.role, seconds)
        total = self.seconds[peer.role]
        of_policy = peer.role == "replica" and peer.hello.serves == POLICY
        if peer.seconds:
            for state, value in sound.items():
                grown = max(0.0, value - peer.seconds.get(state, 0.0))
                total[state] += grown
                if of_policy:
                    self.policy_seconds[state] += grown
            if peer.role == "actor":
                self.unfilled_s += _grown(UNFILLED, peer.counters, counters or {})
                self.decoding_s += _grown(DECODING, peer.counters, counters or {})
        peer.seconds, peer.counters = sound, counters or {}

    def waits(self, cause: str, now: float) -> None:
        """A learner is parked for want of ``cause``, "" for none; asked again every turn of the broker."""
        before, since = self._waits
        if before:
            self.parked[before] += now - since
        self._waits = (cause, now)

    def line(self) -> dict[str, Any]:
        """For the step's line in metrics.jsonl: sums so far."""
        states = {role: rounded(seconds) for role, seconds in self.seconds.items()}
        if own := known_states("broker", self._own()):
            states["broker"] = rounded(own)
        return {"states": states, "parked": rounded(self.parked)}

    def status(self, roster: Roster, now: float) -> dict[str, Any]:
        """For status.json: each peer of the first PEERS_SHOWN of a role, and all of them added up."""
        roles = sorted({peer.role for peer in roster.all()})
        return {
            "peers": [row(peer, now) for role in roles for peer in roster.role(role)[:PEERS_SHOWN]],
            "fleet": {role: summary(roster.role(role), now) for role in roles},
            **self.line(),
        }


def _grown(counter: str, before: dict[str, float], now: dict[str, float]) -> float:
    grown = now.get(counter, 0.0) - before.get(counter, 0.0)
    return grown if 0 < grown < math.inf else 0.0


def known_states(role: str, seconds: dict[str, float]) -> dict[str, float]:
    """What of a heartbeat's seconds names a state of that role and is a number of seconds."""
    return {
        state: float(seconds[state])
        for state in STATES.get(role, ())
        if state in seconds and math.isfinite(seconds[state]) and seconds[state] >= 0
    }


def rounded(seconds: dict[str, float]) -> dict[str, float]:
    """To hundredths."""
    return {state: round(value, 2) for state, value in seconds.items()}


def row(peer: Peer, now: float) -> dict[str, Any]:
    """One peer of status.json. ``tokens``: sampled since its start, for an actor."""
    return {
        "peer": peer.name,
        "role": peer.role,
        "serves": peer.hello.serves,
        "version": peer.version,
        "silent_s": round(now - peer.heard, 2),
        "seconds": rounded(peer.seconds),
        "tokens": peer.counters.get("tokens"),
    }


def summary(peers: Sequence[Peer], now: float) -> dict[str, Any]:
    """Every peer of a role, however many: their versions, and who is silent."""
    silent = [peer.name for peer in peers if now - peer.heard > SILENT_S]
    return {
        "count": len(peers),
        "oldest_version": min(peer.version for peer in peers),
        "newest_version": max(peer.version for peer in peers),
        "silent": len(silent),
        "silent_names": silent[:NAMES_SHOWN],
    }
