"""Publishing a version: rank 0 of the learner, through the broker's handshake and one collective.

::

    Publish -> (broker: Prepare/Ready with every receiver) -> Go -> buckets -> digest -> Published
"""

import contextlib
import logging
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from common.config import MEGABYTE
from common.deadlines import brief
from common.errors import DeadlineError
from common.joint import POLICY_STREAM
from common.trace import Tracer, silent
from common.weights import AHEAD, BROKEN, WeightDigest
from common.wire import Go, Publish, PublishDone, Published, PublishFailed, Welcome
from learner.weights.gather import Snapshot
from learner.weights.group import WeightGroup
from learner.weights.pack import as_one, flatten

POLL_S = 0.2
BROKER_ATTEMPTS = 6  # preparation deadlines that the broker may use up before it answers
LAST_ATTEMPT = 2  # of them for an attempt that begins when those are used up: to connect, and to send

log = logging.getLogger("learner.weights")


def longest_s(deadline_s: float, seconds: float) -> float:
    """What :meth:`WeightPublisher.publish` may take; ``seconds`` are what the version's size may take."""
    return (BROKER_ATTEMPTS + LAST_ATTEMPT) * (deadline_s + seconds)


class WeightPublisher:
    """Offers versions to the fleet. ``receive`` yields the broker's messages (None on timeout)."""

    def __init__(
        self,
        send: Callable[[Any], None],
        receive: Callable[[float], Any | None],
        host: str,
        bucket_mb: float,
        deadline_s: float,
        device: torch.device,
        backend: str = "gloo",
        least_mb_s: float = 100.0,
        stream: str = POLICY_STREAM,
        tracer: Tracer | None = None,
    ) -> None:
        """``device`` holds the tensors; ``backend`` is gloo, which sends buckets from memory, or nccl."""
        self._tracer = tracer or silent()
        self._receivers = 0  # of the last collective
        self._stream = stream
        self._send = send
        self._receive = receive
        self._host = host
        self.bucket_bytes = int(bucket_mb * MEGABYTE)
        self._deadline_s = deadline_s
        self._device = device
        self._least_bytes_s = least_mb_s * MEGABYTE
        self._backend = backend
        self._store = dist.TCPStore(
            host, 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=deadline_s)
        )
        self._group: tuple[int, WeightGroup] | None = None
        self._spare: list[torch.Tensor] = []  # where buckets are laid out; fresh memory is slow

    def publish(
        self, version: int, weights: Snapshot, other: Callable[[Any], None], should_stop: Callable[[], bool]
    ) -> float:
        """Offer ``version`` and send it to all who are ready; returns the seconds it took.

        Messages that belong to nobody here go to ``other``. A collective that breaks is reported
        and tried again in the epoch that the broker forms without the culprit. Raises
        :class:`DeadlineError` when the broker does not answer.
        """
        began, cpu = self._tracer.now(), self._tracer.cpu()
        self._receivers = 0
        with self._tracer.within("idle.receivers", version - 1):
            self._offer(version, weights, other, should_stop)
        took, nbytes = self._tracer.now() - began, sum(bucket.nbytes for bucket in weights.buckets)
        self._tracer.span(
            "publish", "publish", began, began + took, version=version, bytes=nbytes,
            receivers=self._receivers, stream=self._stream,
        )  # fmt: skip
        self._tracer.tally("publish", self._receivers, took, self._tracer.cpu() - cpu, nbytes)
        return took / 1e9

    def _offer(
        self, version: int, weights: Snapshot, other: Callable[[Any], None], should_stop: Callable[[], bool]
    ) -> None:
        began = time.perf_counter()
        listing = weights.listing
        seconds = self._seconds(weights)
        offer = Publish(
            version, self._host, self._store.port, self._backend, self.bucket_bytes, listing, seconds, self._stream
        )
        self._send(offer)
        waited = BROKER_ATTEMPTS * (self._deadline_s + seconds)
        deadline = time.monotonic() + waited
        while time.monotonic() < deadline:
            if should_stop():
                return
            message = self._receive(POLL_S)
            if isinstance(message, Go) and (message.version, message.stream) == (version, self._stream):
                with self._tracer.within("send", version - 1):
                    sent = self._collective(message, weights, began)
                if sent:
                    self._receivers = message.world - 1
                    return
            elif isinstance(message, Welcome):  # a broker that came back knows of no offer
                self._send(offer)
                other(message)
            elif isinstance(message, PublishDone):
                if (message.version, message.stream) == (version, self._stream):  # nobody to send to, or nobody left
                    return
            elif message is not None:
                other(message)
        raise DeadlineError(
            f"version {version}: the broker did not start the publish within {waited:.0f} s "
            "(weights.deadline_s, weights.least_mb_s); its log names the receiver that it waits for"
        )

    def _seconds(self, weights: Snapshot) -> float:
        """What the size may take."""
        return sum(bucket.nbytes for bucket in weights.buckets) / self._least_bytes_s

    def _collective(self, go: Go, weights: Snapshot, began: float) -> bool:
        try:
            if self._group is None or self._group[0] != go.epoch:
                self._close_group()
                deadline_s = self._deadline_s + self._seconds(weights)
                group = WeightGroup(self._store, go.epoch, 0, go.world, self._backend, deadline_s, self._device)
                self._group = (go.epoch, group)
            digest = self._broadcast(self._group[1], weights)
            self._group[1].send_digest(digest, go.version)
        except (RuntimeError, DeadlineError) as error:  # what groups raise for a lost or late member
            if self._group is not None:
                with contextlib.suppress(RuntimeError):  # for those who had everything and wait for the digest alone
                    self._group[1].send_digest(BROKEN, go.version)
            self._close_group()
            reason = brief(error)
            log.warning("publish of version %d to %s broke: %s", go.version, ", ".join(go.members), reason)
            self._send(PublishFailed(go.epoch, go.version, reason))
            return False
        self._send(Published(go.epoch, go.version, digest, time.perf_counter() - began))
        return True

    def _broadcast(self, group: WeightGroup, weights: Snapshot) -> str:
        """Every bucket; while one is on the wire the next is gathered, laid out and summed up."""
        digest = WeightDigest()
        under_way: list[tuple[Any, torch.Tensor]] = []
        for index, bucket in enumerate(weights.buckets):
            tensors = weights.tensors(index, group.device)
            flat = as_one(bucket, tensors, group.device)
            if flat is None:
                room = next((t for t in self._spare if len(t) >= bucket.nbytes), None)
                self._spare = [t for t in self._spare if t is not room]
                room = group.allocate(max(bucket.nbytes, self.bucket_bytes)) if room is None else room
                lies = next(iter(tensors.values())).device
                there = as_one(bucket, tensors, lies) if lies != group.device else None
                flat = room[: bucket.nbytes]
                flat = flatten(bucket, tensors, flat) if there is None else flat.copy_(there)
            under_way.append((group.start(flat), flat))
            digest.update(group.sums(flat))
            if len(under_way) > AHEAD:
                self._done(*under_way.pop(0))
        for work, flat in under_way:
            self._done(work, flat)
        return digest.hex()

    def _done(self, work: Any, flat: torch.Tensor) -> None:
        work.wait()
        base = flat._base
        if base is not None and base.dtype == torch.uint8:  # a room of ours, not a slice of the parameters
            self._spare.append(base)

    def _close_group(self) -> None:
        if self._group is not None:
            self._group[1].close()
            self._group = None
            self._spare.clear()  # a broken broadcast may still read from the others
