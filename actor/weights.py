"""The actor's end of the weight group: joins a gloo or NCCL group and receives buckets.

The learner is rank 0 and hosts the TCPStore; the layout of the buckets and the handshake are in
:mod:`common.weights`.
"""

from collections.abc import Iterable, Iterator
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from common.deadlines import Watched, connected
from common.weights import (
    BLOCK_WORDS,
    DIGEST_KEY,
    ROW_WORDS,
    Bucket,
    group_name,
    host_sum,
    store_prefix,
)
from common.wire import Prepare


class GroupCollective:
    """One epoch's process group, seen by a receiver on ``device``."""

    def __init__(self, prepare: Prepare, deadline_s: float, device: torch.device) -> None:
        publish = prepare.publish
        deadline_s += publish["seconds"]
        timeout, name = timedelta(seconds=deadline_s), group_name(publish["port"], prepare.epoch)
        self._device = device if publish["backend"] == "nccl" else torch.device("cpu")
        store = dist.TCPStore(publish["host"], publish["port"], is_master=False, timeout=timeout)
        prefix = dist.PrefixStore(store_prefix(name, self._device.type), store)
        self._store = prefix
        self._deadline_s, self._on_gpu = deadline_s, publish["backend"] == "nccl"
        self._group: Any
        if publish["backend"] == "nccl":
            options = dist.ProcessGroupNCCL.Options()
            options._timeout = timeout
            self._group = connected(
                lambda: dist.ProcessGroupNCCL(prefix, prepare.rank, prepare.world, options), device, deadline_s, name
            )
        else:
            self._group = dist.ProcessGroupGloo(prefix, prepare.rank, prepare.world, timeout)

    def allocate(self, nbytes: int) -> torch.Tensor:
        """Where broadcasts arrive: uint8 ``[nbytes]``."""
        return torch.empty(nbytes, dtype=torch.uint8, device=self._device)

    def start(self, tensor: torch.Tensor) -> Any:
        """Begin one broadcast from rank 0 into ``tensor``, in place; returns what to wait for."""
        work = self._group.broadcast([tensor])
        return Watched(work, self._deadline_s, self._group.abort) if self._on_gpu else work

    def sums(self, tensor: torch.Tensor) -> bytes:
        """See :func:`tensor_sums`."""
        return tensor_sums(tensor)

    def receive_digest(self, version: int) -> str:
        """The learner's digest of ``version``, in hex, through the store: it waits until it is there."""
        return str(self._store.get(DIGEST_KEY.format(version)).decode())

    def close(self) -> None:
        """Leave the group."""
        self._group = None


def tensor_sums(tensor: torch.Tensor) -> bytes:
    """A bucket's sums (:class:`common.weights.WeightDigest`) of uint8 ``[nbytes]``; a GPU sends only them."""
    if not tensor.is_cuda:
        return host_sum(tensor.numpy())
    step = 8 * BLOCK_WORDS
    padded = torch.nn.functional.pad(tensor, (0, -len(tensor) % step))
    blocks = padded.view(torch.int64).view(-1, BLOCK_WORDS // ROW_WORDS, ROW_WORDS)
    both = torch.cat((blocks.sum(dim=1), blocks.sum(dim=2)), dim=1)
    return both.cpu().numpy().tobytes()


def bucket_tensors(buckets: Iterable[tuple[Bucket, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, tensor) of every slot, views into the received buckets."""
    for bucket, flat in buckets:
        for slot in bucket.slots:
            part = flat[slot.offset : slot.offset + slot.nbytes]
            yield slot.name, part.view(getattr(torch, slot.dtype)).view(slot.shape)
