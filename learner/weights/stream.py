"""One model's versions on their way to those who hold it; a run may have two such streams (docs/joint.md)."""

import logging
from collections.abc import Callable
from typing import Any

from common.trace import Tracer
from learner.model.decoder import Decoder
from learner.weights.gather import Snapshot, WeightGather
from learner.weights.publish import WeightPublisher

log = logging.getLogger("learner.weights")


class WeightStream:
    """Gathers every version from the mesh; rank 0 sends it, and again to who came late."""

    def __init__(
        self,
        name: str,
        model: Decoder,
        frozen: frozenset[str],
        bucket_bytes: int,
        publisher: WeightPublisher | None,
        published: int,
        tracer: Tracer,
    ) -> None:
        """``publisher`` is rank 0's; ``published`` is the newest version that the receivers were sent before."""
        self.name, self.published = name, published
        self.resync = ""  # why somebody asked to be sent the present version again
        self._publisher = publisher
        self._tracer = tracer
        self._gather = WeightGather(model, bucket_bytes, frozen)  # who holds what: the same for every version
        self._snapshot: Snapshot | None = None  # the present version, whole on rank 0

    def publish(self, version: int, other: Callable[[Any], None], should_stop: Callable[[], bool]) -> float:
        """Take the present weights, on every rank, and send them if nobody has had them; the seconds it took."""
        self._tracer.state("gather" if self._publisher is not None else "idle.ranks", version - 1)
        self._snapshot = Snapshot(self._gather)
        wanted = version > self.published or (bool(self.resync) and version == self.published)
        try:
            seconds = self._send(version, other, should_stop) if wanted and self._publisher is not None else 0.0
        finally:  # the other ranks take part to the end
            self._snapshot.finish()
        self.published = max(self.published, version)
        return seconds

    def catch_up(self, version: int, other: Callable[[Any], None], should_stop: Callable[[], bool]) -> None:
        """Send the present version again if somebody asked for it. Rank 0 alone."""
        if self.resync and self._publisher is not None and version >= self.published:
            log.info("sending version %d of the %s again: %s", version, self.name, self.resync)
            self._send(version, other, should_stop)

    def _send(self, version: int, other: Callable[[Any], None], should_stop: Callable[[], bool]) -> float:
        assert self._publisher is not None and self._snapshot is not None, "published before anybody asked"
        self.resync = ""  # whoever asked gets it now
        return self._publisher.publish(version, self._snapshot, other, should_stop)
