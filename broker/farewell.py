"""The end of a broker: everybody is told to stop, and what was on its way is still heard and written down."""

import time
from collections.abc import Callable
from typing import Any

from broker.door import Door
from broker.peers import Peer
from common import wire

LOOK_S = 0.05  # at the socket
HELD_S = 0.001  # between two looks at the disk
FAREWELL_S = 3.0  # how long to wait for Byes
LAST_STEP_S = 50.0  # ... for that of a learner that is stopped within a step; tools.launch gives both a minute
HEARD = wire.Trajectories | wire.Commit | wire.Checkpointed


class Farewell:
    """Told once; ``hear`` takes what peers still say, ``answer`` follows every look at the socket."""

    def __init__(self, door: Door, hear: Callable[[bytes, Any], None], answer: Callable[[], None]) -> None:
        self._door, self._hear, self._answer = door, hear, answer

    def say(self, reason: str) -> None:
        """Tell everybody ``reason`` ("finished": nothing more is to come) and wait until they have left."""
        for peer in self._door.roster.all():
            self._tell(peer, wire.Stop(reason))
        began = time.monotonic()
        self._drain()
        while self._awaits_byes(began, reason):
            self._door.pong(time.monotonic())  # who hears nothing for long says nothing more
            for identity, message in self._door.receive(LOOK_S):
                self._hear_out(identity, message, reason)
            self._answer()
        self._drain()

    def _tell(self, peer: Peer, message: Any) -> None:
        """To ``peer``, who is still waited for if it is cut off: it will say Hello again."""

        def action() -> None:
            self._door.router.send(peer.identity, message)

        self._door.outlet.do(action)

    def _drain(self) -> None:
        """Let go what waits for the disk."""
        deadline, outlet = time.monotonic() + FAREWELL_S, self._door.outlet
        while outlet.holding and time.monotonic() < deadline:
            outlet.release()
            time.sleep(HELD_S)

    def _awaits_byes(self, began: float, reason: str) -> bool:
        """Everybody's for a moment; a living learner's until it has committed its step and written a checkpoint."""
        now, roster = time.monotonic(), self._door.roster
        if now - began < FAREWELL_S:
            return bool(roster.all())
        if reason == "finished" or now - began > LAST_STEP_S:
            return False
        silent_s = max(FAREWELL_S, 3 * self._door.section.heartbeat_s)
        return any(peer.leads and now - peer.heard < silent_s for peer in roster.role("learner"))

    def _hear_out(self, identity: bytes, message: Any, reason: str) -> None:
        peer = self._door.roster.get(identity)
        if peer is None:
            if isinstance(message, wire.Hello):  # lost shortly before the end, with what it has still to say
                self._door.hello(identity, message)
                if (joined := self._door.roster.get(identity)) is not None:
                    self._tell(joined, wire.Stop(reason))
            return
        peer.heard = time.monotonic()
        if isinstance(message, wire.Bye):
            self._door.roster.remove(identity)
        elif isinstance(message, wire.Hello):  # its connection broke, and what it was told may be lost
            self._tell(peer, self._door.greeting())
            self._tell(peer, wire.Stop(reason))
        elif isinstance(message, HEARD):
            self._hear(identity, message)
