"""New weights on their way to the fleet: carries what the publish coordinator decides."""

import time
from collections.abc import Callable
from typing import Any

from broker.door import Door
from broker.peers import Peer
from broker.publishing import LEARNER, Outgoing, PublishCoordinator
from broker.recorder import Recorder
from broker.runfiles import RunFiles
from common import wire
from common.errors import ProtocolError


class Distribution:
    """Versions: offered, sent and settled; who missed one is served again."""

    def __init__(self, deadline_s: float, recorder: Recorder, door: Door, files: RunFiles) -> None:
        self.recorder, self.door, self.files = recorder, door, files
        self.weights = PublishCoordinator(deadline_s, files.generation)
        self.sending = 0  # newest version whose collective was started
        self._noted = 0  # versions of the history that the journal has
        self._resync_asked: dict[str, tuple[int, float]] = {}
        self.handlers: dict[type[Any], Callable[[Peer, Any], None]] = {
            wire.Publish: self._on_publish,
            wire.Published: self._on_published,
            wire.PublishFailed: lambda peer, m: self._dispatch(
                self.weights.on_publish_failed(m, self._receivers(), time.monotonic())
            ),
            wire.Ready: lambda peer, m: self._dispatch(
                self.weights.on_ready(m, peer.name, self._receivers(), time.monotonic())
            ),
            wire.Applied: self._on_applied,
            wire.ReceiveFailed: lambda peer, m: self._dispatch(self.weights.on_receive_failed(m, peer.name)),
        }

    def newest_version(self) -> int:
        """The newest that anybody may have."""
        return max(self.weights.published, self.weights.under_way, self.sending)

    def restore(self, published: list[int], sending: int) -> None:
        """Versions that an earlier life of the broker settled, and the newest that it started to send."""
        self.weights.restore(published)
        self.sending, self._noted = sending, len(self.weights.history)
        self.door.version = self.weights.published

    def learner_joined(self, version: int) -> None:
        """``version`` is out, says the learner."""
        self.weights.known(version)
        self._note_published()

    def left(self, peer: Peer, now: float) -> None:
        """It receives nothing more, or sends nothing more."""
        if peer.leads:
            self.weights.on_learner_lost()
        else:
            self._dispatch(self.weights.on_lost(peer.name, self._receivers(), now))

    def tick(self, now: float) -> None:
        """Deadlines."""
        self._dispatch(self.weights.on_tick(self._receivers(), now))

    def _receivers(self) -> list[str]:
        """Who holds weights and lacks the version under way: one that comes again is for those who missed it."""
        return self.door.roster.receivers(self.weights.newest_offered)

    def _on_publish(self, peer: Peer, message: wire.Publish) -> None:
        if peer is not self.door.roster.learner():
            raise ProtocolError(f"{peer.role} {peer.name} offers version {message.version}; only rank 0 may")
        newest = self.weights.newest_offered
        if message.version not in (newest, newest + 1):
            raise ProtocolError(f"version {message.version} offered after {newest}: versions come in order")
        lacking = self.door.roster.receivers(message.version)
        self._dispatch(self.weights.on_publish(message, lacking, time.monotonic()))

    def _on_published(self, peer: Peer, message: wire.Published) -> None:
        self.files.metric("publish", {"version": message.version, "seconds": message.seconds, "digest": message.digest})
        self._dispatch(self.weights.on_published(message))

    def _on_applied(self, peer: Peer, message: wire.Applied) -> None:
        peer.version = max(peer.version, message.version)
        self._dispatch(self.weights.on_applied(message, peer.name))

    def _dispatch(self, outgoing: Outgoing) -> None:
        going = [message.version for _, message in outgoing if isinstance(message, wire.Go)]
        if going and max(going) > self.sending:
            self.sending = max(going)  # written down before anybody can have it
            self.recorder.note("sending", {"version": self.sending})
        for name, message in outgoing:
            peer = self.door.roster.learner() if name == LEARNER else self.door.roster.named(name)
            if peer is not None:
                self.door.send(peer, message)
        self._note_published()
        self._resync()

    def _note_published(self) -> None:
        for version in self.weights.history[self._noted :]:
            self.recorder.note("published", {"version": version})
        self._noted = len(self.weights.history)
        self.door.version = self.weights.published

    def _resync(self) -> None:
        """Ask the learner for its current version again when a receiver lacks it."""
        learner, version = self.door.roster.learner(), self.weights.published
        if learner is None or self.weights.busy:
            return
        now = time.monotonic()
        behind = [name for name in self.door.roster.receivers(version) if not self.weights.is_suspended(name)]
        key = ",".join(behind)
        asked, when = self._resync_asked.get(key, (-1, 0.0))
        if behind and (asked != version or now - when > self.weights.deadline_s):
            self._resync_asked = {key: (version, now)}
            self.door.send(learner, wire.Resync(f"{', '.join(behind)} lack version {version}"))
