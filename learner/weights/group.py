"""A weight group: rank 0 is the learner, the others are receivers (actors, SGLang ranks, replicas).

Groups stand beside torch's default process group and know nothing of it; one exists per
membership epoch and finds its members through the learner's TCPStore.
"""

from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from common.weights import Bucket
from common.wire import Prepare

DIGEST_BYTES = 16


class WeightGroup:
    """One epoch's process group on ``device`` (gloo or NCCL), with a deadline on every operation."""

    def __init__(
        self,
        store: "dist.TCPStore",
        epoch: int,
        rank: int,
        world: int,
        backend: str,
        deadline_s: float,
        device: torch.device,
    ) -> None:
        timeout = timedelta(seconds=deadline_s)
        prefix = dist.PrefixStore(f"weights/{epoch}", store)
        self.device = device if backend == "nccl" else torch.device("cpu")  # of what is sent and received
        self._store = store
        self._group: Any
        if backend == "nccl":
            options = dist.ProcessGroupNCCL.Options()
            options._timeout = timeout
            self._group = dist.ProcessGroupNCCL(prefix, rank, world, options)
        else:
            self._group = dist.ProcessGroupGloo(prefix, rank, world, timeout)

    def broadcast(self, tensor: torch.Tensor) -> None:
        """From rank 0 into ``tensor``, in place."""
        self._group.broadcast([tensor]).wait()

    def receive(self, nbytes: int) -> torch.Tensor:
        """One broadcast from the learner: uint8 ``[nbytes]``."""
        tensor = torch.empty(nbytes, dtype=torch.uint8, device=self.device)
        self.broadcast(tensor)
        return tensor

    def view(self, tensor: torch.Tensor) -> memoryview:
        """The bytes of a bucket."""
        return tensor.cpu().numpy().data

    def receive_digest(self) -> str:
        """The learner's digest, in hex."""
        return self.receive(DIGEST_BYTES).cpu().numpy().tobytes().hex()

    def send_digest(self, digest: str) -> None:
        """The learner's side of :meth:`receive_digest`."""
        self.broadcast(torch.tensor(list(bytes.fromhex(digest)), dtype=torch.uint8, device=self.device))

    def close(self) -> None:
        """Leave the group."""
        self._group = None


def join(prepare: Prepare, deadline_s: float, device: torch.device) -> WeightGroup:
    """A receiver joins the group that ``prepare`` describes."""
    publish = prepare.publish
    store = dist.TCPStore(publish["host"], publish["port"], is_master=False, timeout=timedelta(seconds=deadline_s))
    return WeightGroup(store, prepare.epoch, prepare.rank, prepare.world, publish["backend"], deadline_s, device)


def unpack(buckets: list[tuple[Bucket, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, tensor) of every slot, views into the received buckets."""
    for bucket, flat in buckets:
        for slot in bucket.slots:
            part = flat[slot.offset : slot.offset + slot.nbytes]
            yield slot.name, part.view(getattr(torch, slot.dtype)).view(slot.shape)
