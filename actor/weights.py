"""The actor's end of the weight group: joins a gloo or NCCL group and receives buckets.

The learner is rank 0 and hosts the TCPStore; the layout of the buckets and the handshake are in
:mod:`common.weights`.
"""

from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from common.weights import Bucket
from common.wire import Prepare

DIGEST_BYTES = 16


class GroupCollective:
    """One epoch's process group, seen by a receiver on ``device``."""

    def __init__(self, prepare: Prepare, deadline_s: float, device: torch.device) -> None:
        publish = prepare.publish
        timeout = timedelta(seconds=deadline_s)
        self._device = device if publish["backend"] == "nccl" else torch.device("cpu")
        store = dist.TCPStore(publish["host"], publish["port"], is_master=False, timeout=timeout)
        prefix = dist.PrefixStore(f"weights/{prepare.epoch}", store)
        self._store = store
        self._group: Any
        if publish["backend"] == "nccl":
            options = dist.ProcessGroupNCCL.Options()
            options._timeout = timeout
            self._group = dist.ProcessGroupNCCL(prefix, prepare.rank, prepare.world, options)
        else:
            self._group = dist.ProcessGroupGloo(prefix, prepare.rank, prepare.world, timeout)

    def receive(self, nbytes: int) -> torch.Tensor:
        """One broadcast from the learner: uint8 ``[nbytes]``."""
        tensor = torch.empty(nbytes, dtype=torch.uint8, device=self._device)
        self._group.broadcast([tensor]).wait()
        return tensor

    def view(self, tensor: torch.Tensor) -> memoryview:
        """The bytes of a received bucket."""
        return tensor.cpu().numpy().data

    def receive_digest(self) -> str:
        """The learner's digest, in hex."""
        return self.receive(DIGEST_BYTES).cpu().numpy().tobytes().hex()

    def close(self) -> None:
        """Leave the group."""
        self._group = None


def bucket_tensors(buckets: list[tuple[Bucket, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, tensor) of every slot, views into the received buckets."""
    for bucket, flat in buckets:
        for slot in bucket.slots:
            part = flat[slot.offset : slot.offset + slot.nbytes]
            yield slot.name, part.view(getattr(torch, slot.dtype)).view(slot.shape)
