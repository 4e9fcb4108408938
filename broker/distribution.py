"""New weights on their way to the fleet: carries what the publish coordinators decide."""

import time
from collections import deque
from collections.abc import Callable
from typing import Any

from broker.door import Door
from broker.peers import Peer
from broker.publishing import LEARNER, Outgoing, PublishCoordinator
from broker.recorder import Recorder
from broker.runfiles import RunFiles
from broker.streams import Streams
from common import wire
from common.errors import ProtocolError
from common.joint import JointSection


class Distribution:
    """Versions: offered, sent and settled; who missed one is served again."""

    def __init__(self, deadline_s: float, joint: JointSection, recorder: Recorder, door: Door, files: RunFiles) -> None:
        self.recorder, self.door, self.files = recorder, door, files
        self.streams = Streams(deadline_s, files.generation, joint)
        self.sending = 0  # newest version of the actors whose collective was started
        self._noted = {stream.stream: 0 for stream in self.streams.all}  # versions of each history in the journal
        self._resync_asked: dict[str, tuple[str, int, float]] = {}  # stream -> who lacked which version, and when
        self._outgoing: deque[tuple[str, Any]] = deque()
        self._dispatching = False
        self.handlers: dict[type[Any], Callable[[Peer, Any], None]] = {
            wire.Publish: self._on_publish,
            wire.Published: self._on_published,
            wire.PublishFailed: self._on_publish_failed,
            wire.Ready: self._on_ready,
            wire.Applied: self._on_applied,
            wire.ReceiveFailed: self._on_receive_failed,
        }

    def newest_version(self) -> int:
        """The newest that anybody may have sampled with."""
        rollout = self.streams.rollout
        return max(rollout.published, rollout.under_way, self.sending)

    def restore(self, published: dict[str, list[int]], sending: int) -> None:
        """Versions that an earlier life of the broker settled, by stream, and the newest that it began to send."""
        for stream in self.streams.all:
            stream.restore(published.get(stream.stream, []))
            self._noted[stream.stream] = len(stream.history)
        self.sending = sending
        self.door.version = self.streams.published

    def state(self) -> dict[str, list[int]]:
        """What :meth:`restore` needs of versions that were settled."""
        return {stream.stream: stream.history for stream in self.streams.all}

    def learner_joined(self, version: int) -> None:
        """``version`` is out, says the learner; of a stream that it is not, it will be offered again.

        So it is of whatever was under way: what was said of it may be lost with a connection.
        """
        for stream in self.streams.all:
            stream.on_learner_lost()
            stream.known(version)
        self._note_published()

    def left(self, peer: Peer, now: float) -> None:
        """It receives nothing more, or sends nothing more."""
        if peer.leads:
            for stream in self.streams.all:
                stream.on_learner_lost()
        elif (theirs := self.streams.of_role(peer.role)) is not None:
            self._dispatch(theirs, theirs.on_lost(peer.name, self._receivers(theirs), now))

    def tick(self, now: float) -> None:
        """Deadlines."""
        for stream in self.streams.all:
            self._dispatch(stream, stream.on_tick(self._receivers(stream), now))

    def _receivers(self, stream: PublishCoordinator) -> list[str]:
        """Who holds weights and lacks the version under way: one that comes again is for those who missed it."""
        return self.door.roster.receivers(stream.newest_offered, self.streams.roles(stream))

    # ---- the learner ----------------------------------------------------------------------------

    def _on_publish(self, peer: Peer, message: wire.Publish) -> None:
        if peer is not self.door.roster.learner():
            raise ProtocolError(f"{peer.role} {peer.name} offers version {message.version}; only rank 0 may")
        stream = self.streams.named(message.stream)
        newest = stream.newest_offered
        if message.version not in (newest, newest + 1):
            raise ProtocolError(f"version {message.version} offered after {newest}: versions come in order")
        lacking = self.door.roster.receivers(message.version, self.streams.roles(stream))
        self._dispatch(stream, stream.on_publish(message, lacking, time.monotonic()))

    def _on_published(self, peer: Peer, message: wire.Published) -> None:
        line = {"version": message.version, "seconds": message.seconds, "digest": message.digest}
        stream = self.streams.of_epoch(message.epoch)
        if len(self.streams.all) > 1 and stream is not None:
            line["stream"] = stream.stream
        self.files.metric("publish", line)
        if stream is not None:
            self._dispatch(stream, stream.on_published(message))

    def _on_publish_failed(self, peer: Peer, message: wire.PublishFailed) -> None:
        stream = self.streams.of_epoch(message.epoch)
        if stream is not None:
            self._dispatch(stream, stream.on_publish_failed(message, self._receivers(stream), time.monotonic()))

    # ---- receivers ------------------------------------------------------------------------------

    def _stream_of(self, peer: Peer) -> PublishCoordinator:
        stream = self.streams.of_role(peer.role)
        if stream is None:
            raise ProtocolError(f"the weights of {peer.role}s never change in this run (joint.train=false)")
        return stream

    def _on_ready(self, peer: Peer, message: wire.Ready) -> None:
        stream = self._stream_of(peer)
        self._dispatch(stream, stream.on_ready(message, peer.name, self._receivers(stream), time.monotonic()))

    def _on_applied(self, peer: Peer, message: wire.Applied) -> None:
        stream = self._stream_of(peer)
        peer.holds(max(peer.version, message.version))
        self._dispatch(stream, stream.on_applied(message, peer.name))

    def _on_receive_failed(self, peer: Peer, message: wire.ReceiveFailed) -> None:
        stream = self._stream_of(peer)
        self._dispatch(stream, stream.on_receive_failed(message, peer.name))

    # ---- what follows ---------------------------------------------------------------------------

    def _dispatch(self, stream: PublishCoordinator, outgoing: Outgoing) -> None:
        """Send, in the order of the decisions: one that a peer lost on the way brings about comes behind the others."""
        going = [message.version for _, message in outgoing if isinstance(message, wire.Go)]
        if stream is self.streams.rollout and going and max(going) > self.sending:
            self.sending = max(going)  # written down before anybody can have it
            self.recorder.note("sending", {"version": self.sending})
        self._outgoing += outgoing
        if self._dispatching:
            return
        self._dispatching = True
        try:
            while self._outgoing:
                name, message = self._outgoing.popleft()
                peer = self.door.roster.learner() if name == LEARNER else self.door.roster.named(name)
                if peer is not None:
                    self.door.send(peer, message)
        finally:
            self._dispatching = False
        self._note_published()
        self._resync(stream)

    def _note_published(self) -> None:
        for stream in self.streams.all:
            for version in stream.history[self._noted[stream.stream] :]:
                self.recorder.note("published", {"version": version, "stream": stream.stream})
            self._noted[stream.stream] = len(stream.history)
        self.door.version = self.streams.published

    def _resync(self, stream: PublishCoordinator) -> None:
        """Ask the learner for its current version again when a receiver lacks it."""
        learner, version = self.door.roster.learner(), stream.published
        if learner is None or stream.busy:
            return
        now = time.monotonic()
        behind = [
            name
            for name in self.door.roster.receivers(version, self.streams.roles(stream))
            if not stream.is_suspended(name)
        ]
        names = ", ".join(behind)
        *asked, when = self._resync_asked.get(stream.stream, ("", -1, 0.0))
        if behind and (asked != [names, version] or now - when > stream.deadline_s):
            self._resync_asked[stream.stream] = (names, version, now)
            self.door.send(learner, wire.Resync(f"{names} lack version {version}", stream.stream))
