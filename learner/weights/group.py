"""A weight group: rank 0 is the learner, the others are receivers (actors, SGLang ranks, replicas).

Groups stand beside torch's default process group and know nothing of it; one exists per
membership epoch and finds its members through the learner's TCPStore.
"""

from bisect import bisect_left
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
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
    StagedWeights,
    TensorSlot,
    group_name,
    host_sum,
    store_prefix,
)
from common.wire import Prepare


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
        """Raises :class:`common.errors.DeadlineError` if NCCL's members do not meet within ``deadline_s``."""
        timeout, name = timedelta(seconds=deadline_s), group_name(store.port, epoch)
        prefix = dist.PrefixStore(store_prefix(name, "cuda" if backend == "nccl" else "cpu"), store)
        self.device = device if backend == "nccl" else torch.device("cpu")  # of what is sent and received
        self._store = prefix
        self._deadline_s, self._on_gpu = deadline_s, backend == "nccl"
        self._group: Any
        if backend == "nccl":
            options = dist.ProcessGroupNCCL.Options()
            options._timeout = timeout
            self._group = connected(
                lambda: dist.ProcessGroupNCCL(prefix, rank, world, options), device, deadline_s, name
            )
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
        """See :func:`tensor_sums`."""
        return tensor_sums(tensor)

    def receive_digest(self, version: int) -> str:
        """The learner's digest of ``version``, in hex, through the store: it waits until it is there."""
        return str(self._store.get(DIGEST_KEY.format(version)).decode())

    def send_digest(self, digest: str, version: int) -> None:
        """The learner's side of :meth:`receive_digest`."""
        self._store.set(DIGEST_KEY.format(version), digest)

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


def join(prepare: Prepare, deadline_s: float, device: torch.device) -> WeightGroup:
    """A receiver joins the group that ``prepare`` describes."""
    publish = prepare.publish
    store = dist.TCPStore(publish["host"], publish["port"], is_master=False, timeout=timedelta(seconds=deadline_s))
    deadline_s += publish["seconds"]
    return WeightGroup(store, prepare.epoch, prepare.rank, prepare.world, publish["backend"], deadline_s, device)


class Adopter:
    """Lets a model's parameters lie in the memory that a version arrived in: a swap that costs nothing."""

    def __init__(self, parameters: Iterable[torch.nn.Parameter], named: dict[str, torch.Tensor]) -> None:
        """``named`` are the model's tensors, each a view of a parameter."""
        views = sorted((view.data_ptr(), name) for name, view in named.items())
        addresses = [address for address, _ in views]
        self._others = dict(named)  # what lies in no parameter: buffers, which are small and copied
        self._homes: list[tuple[torch.nn.Parameter, list[tuple[str, int]]]] = []
        for parameter in parameters:
            start = parameter.data_ptr()
            inside = views[bisect_left(addresses, start) : bisect_left(addresses, start + parameter.nbytes)]
            self._homes.append((parameter, [(name, address - start) for address, name in inside]))
            for _, name in inside:
                del self._others[name]
        self._known: tuple[list[Bucket], list[tuple[int, torch.device]]] = ([], [])  # how the last version lay
        self._plan: _Plan | None = None  # what that means

    @torch.no_grad()
    def adopt(self, staged: StagedWeights) -> bool:
        """False, and nothing was done, unless the tensors of every parameter that came arrived side by side, in
        its order and number format. Afterwards that memory must be left alone
        (:meth:`common.weights.WeightReceiver.applied`)."""
        buckets, flats = [bucket for bucket, _ in staged.buckets], [flat for _, flat in staged.buckets]
        start = flats[0].data_ptr() if flats else 0
        lie = [(flat.data_ptr() - start, flat.device) for flat in flats]
        if (buckets, lie) != self._known:  # quick where a receiver hands out the same buckets again
            self._known, self._plan = (buckets, lie), self._planned(buckets, lie)
        if self._plan is None:
            return False
        for parameter, (index, slot) in self._plan.homes:
            first = flats[index][slot.offset : slot.offset + slot.nbytes].view(parameter.dtype)
            parameter.data = first.as_strided(parameter.shape, parameter.stride())
        for buffer, (index, slot) in self._plan.copies:
            part = flats[index][slot.offset : slot.offset + slot.nbytes].view(getattr(torch, slot.dtype))
            buffer.copy_(part.view(slot.shape))
        return True

    def _planned(self, buckets: list[Bucket], lie: list[tuple[int, torch.device]]) -> "_Plan | None":
        """None if a parameter cannot lie where its tensors do."""
        where: dict[str, tuple[int, int, TensorSlot]] = {}
        for index, (bucket, (start, _)) in enumerate(zip(buckets, lie, strict=True)):
            where.update((slot.name, (start + slot.offset, index, slot)) for slot in bucket.slots)
        plan = _Plan()
        for parameter, parts in self._homes:
            if parts[0][0] not in where:
                continue  # frozen
            address, index, slot = where[parts[0][0]]
            if any(name not in where or where[name][0] - address != offset for name, offset in parts):
                return None
            if sum(where[name][2].nbytes for name, _ in parts) != parameter.nbytes or lie[index][1] != parameter.device:
                return None
            if getattr(torch, slot.dtype) != parameter.dtype:
                return None
            plan.homes.append((parameter, (index, slot)))
        plan.copies = [(buffer, where[name][1:]) for name, buffer in self._others.items() if name in where]
        return plan


@dataclass
class _Plan:
    """Where in a version each parameter begins, by bucket and tensor, and where each buffer is."""

    homes: list[tuple[torch.nn.Parameter, tuple[int, TensorSlot]]] = field(default_factory=list)
    copies: list[tuple[torch.Tensor, tuple[int, TensorSlot]]] = field(default_factory=list)


def unpack(buckets: list[tuple[Bucket, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, tensor) of every slot, views into the received buckets."""
    for bucket, flat in buckets:
        for slot in bucket.slots:
            part = flat[slot.offset : slot.offset + slot.nbytes]
            yield slot.name, part.view(getattr(torch, slot.dtype)).view(slot.shape)
