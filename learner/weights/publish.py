"""Publishing a version: rank 0 of the learner, through the broker's handshake and one collective.

::

    Publish -> (broker: Prepare/Ready with every receiver) -> Go -> buckets -> digest -> Published
"""

import logging
import time
from collections.abc import Callable, Iterable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from common.config import MEGABYTE
from common.errors import DeadlineError
from common.weights import Bucket, WeightDigest, brief, plan_buckets
from common.wire import Go, Publish, PublishDone, Published, PublishFailed, Welcome
from learner.weights.group import WeightGroup

POLL_S = 0.2
BROKER_ATTEMPTS = 6  # preparation deadlines that the broker may use up before it answers

log = logging.getLogger("learner.weights")
NamedTensors = Iterable[tuple[str, torch.Tensor]]


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
    ) -> None:
        """``device`` holds the tensors; ``backend`` is gloo, which sends buckets from memory, or nccl."""
        self._send = send
        self._receive = receive
        self._host = host
        self._bucket_bytes = int(bucket_mb * MEGABYTE)
        self._deadline_s = deadline_s
        self._device = device
        self._backend = backend
        self._store = dist.TCPStore(
            host, 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=deadline_s)
        )
        self._group: tuple[int, WeightGroup] | None = None

    def publish(
        self, version: int, tensors: NamedTensors, other: Callable[[Any], None], should_stop: Callable[[], bool]
    ) -> float:
        """Offer ``version`` and send it to all who are ready; returns the seconds it took.

        Messages that belong to nobody here go to ``other``. A collective that breaks is reported
        and tried again in the epoch that the broker forms without the culprit. Raises
        :class:`DeadlineError` when the broker does not answer.
        """
        began = time.perf_counter()
        named = [(name, tensor.detach()) for name, tensor in tensors]
        listing = [[name, str(t.dtype).removeprefix("torch."), list(t.shape)] for name, t in named]
        offer = Publish(version, self._host, self._store.port, self._backend, self._bucket_bytes, listing)
        self._send(offer)
        deadline = time.monotonic() + BROKER_ATTEMPTS * self._deadline_s
        while time.monotonic() < deadline:
            if should_stop():
                return time.perf_counter() - began
            message = self._receive(POLL_S)
            if isinstance(message, Go) and message.version == version:
                if self._collective(message, listing, dict(named), began):
                    return time.perf_counter() - began
            elif isinstance(message, Welcome):  # a broker that came back knows of no offer
                self._send(offer)
            elif isinstance(message, PublishDone):
                if message.version == version:  # nobody to send to, or nobody left
                    return time.perf_counter() - began
            elif message is not None:
                other(message)
        waited = BROKER_ATTEMPTS * self._deadline_s
        raise DeadlineError(
            f"version {version}: the broker did not start the publish within {waited:.0f} s "
            "(weights.deadline_s); its log names the receiver that it waits for"
        )

    def _collective(self, go: Go, listing: list[list[Any]], tensors: dict[str, torch.Tensor], began: float) -> bool:
        try:
            if self._group is None or self._group[0] != go.epoch:
                self._close_group()
                world = len(go.members) + 1
                group = WeightGroup(self._store, go.epoch, 0, world, self._backend, self._deadline_s, self._device)
                self._group = (go.epoch, group)
            digest = WeightDigest()
            for bucket in plan_buckets(listing, self._bucket_bytes):
                flat = flatten(bucket, tensors, self._group[1].device)
                self._group[1].broadcast(flat)
                digest.update(self._group[1].view(flat))
            self._group[1].send_digest(digest.hex())
        except RuntimeError as error:  # what torch's process groups raise for a lost or late member
            self._close_group()
            reason = brief(error)
            log.warning("publish of version %d to %s broke: %s", go.version, ", ".join(go.members), reason)
            self._send(PublishFailed(go.epoch, go.version, reason))
            return False
        self._send(Published(go.epoch, go.version, digest.hex(), time.perf_counter() - began))
        return True

    def _close_group(self) -> None:
        if self._group is not None:
            self._group[1].close()
            self._group = None


def flatten(bucket: Bucket, tensors: dict[str, torch.Tensor], device: torch.device) -> torch.Tensor:
    """The bucket's tensors in one uint8 tensor, padding zeroed."""
    flat = torch.zeros(bucket.nbytes, dtype=torch.uint8, device=device)
    for slot in bucket.slots:
        source = tensors[slot.name].contiguous().view(-1).view(torch.uint8)
        flat[slot.offset : slot.offset + slot.nbytes].copy_(source)
    return flat
