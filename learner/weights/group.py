"""A weight group: rank 0 is the learner, the others are receivers (actors, SGLang ranks, replicas).

Groups stand beside torch's default process group and know nothing of it; one exists per
membership epoch and finds its members through the learner's TCPStore.
"""

from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from common.weights import BLOCK_WORDS, ROW_WORDS, WATCHDOG_FACTOR, Bucket, Watched, block_sums
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
        self._deadline_s, self._on_gpu = deadline_s, backend == "nccl"
        self._group: Any
        if backend == "nccl":
            options = dist.ProcessGroupNCCL.Options()
            options._timeout = WATCHDOG_FACTOR * timeout
            self._group = dist.ProcessGroupNCCL(prefix, rank, world, options)
        else:
            self._group = dist.ProcessGroupGloo(prefix, rank, world, timeout)

    def allocate(self, nbytes: int) -> torch.Tensor:
        """Where broadcasts arrive: uint8 ``[nbytes]``."""
        return torch.empty(nbytes, dtype=torch.uint8, device=self.device)

    def start(self, tensor: torch.Tensor) -> Any:
        """Begin one broadcast from rank 0 into ``tensor``, in place; returns what to wait for."""
        work = self._group.broadcast([tensor])
        return Watched(work, self._deadline_s, self._group.abort) if self._on_gpu else work

    def sums(self, tensor: torch.Tensor) -> bytes:
        """:func:`common.weights.block_sums`, where the tensor lies."""
        return tensor_sums(tensor)

    def receive_digest(self) -> str:
        """The learner's digest, in hex."""
        tensor = self.allocate(DIGEST_BYTES)
        self.start(tensor).wait()
        return tensor.cpu().numpy().tobytes().hex()

    def send_digest(self, digest: str) -> None:
        """The learner's side of :meth:`receive_digest`."""
        self.start(torch.tensor(list(bytes.fromhex(digest)), dtype=torch.uint8, device=self.device)).wait()

    def close(self) -> None:
        """Leave the group."""
        self._group = None


def tensor_sums(tensor: torch.Tensor) -> bytes:
    """:func:`common.weights.block_sums` of uint8 ``[nbytes]``; a GPU sends only the sums over its bus."""
    if not tensor.is_cuda:
        return block_sums(tensor.numpy())
    step = 8 * BLOCK_WORDS
    padded = torch.nn.functional.pad(tensor, (0, -len(tensor) % step))
    blocks = padded.view(torch.int64).view(-1, BLOCK_WORDS // ROW_WORDS, ROW_WORDS)
    both = torch.cat((blocks.sum(dim=1), blocks.sum(dim=2)), dim=1)
    return both.cpu().numpy().tobytes()


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
