"""Whole tensors on rank 0, from any mesh, a bucket at a time.

::

    places (names, owners) -> buckets -> parts sent by their owners -> joined along the cut dimension

While one bucket is used the parts of the next are already on their way. Every rank takes part in
the same order; ranks that own nothing of a bucket only pass by.
"""

from collections.abc import Iterable, Iterator, Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from common.weights import Bucket, plan_buckets
from learner.layout import FIRST, LAST, Place, places, views
from learner.model.decoder import Decoder
from learner.weights.group import unpack
from learner.weights.pack import flatten

MOST_AT_ONCE = 128  # sends and receives in one NCCL group; of several hundred it is known to hang


class WeightGather:
    """The tensors of ``model`` but for the frozen ones, whole on rank 0, in the same order on all ranks."""

    def __init__(self, model: Decoder, bucket_bytes: int, frozen: frozenset[str] = frozenset()) -> None:
        self.model, self.mesh = model, model.mesh
        self.places = {place.name: place for place in places(model.config) if place.name not in frozen}
        self.owners = {name: place.owners(model.config, self.mesh) for name, place in self.places.items()}
        self.is_local = all(owners == [0] for owners in self.owners.values())  # rank 0 has it all anyway
        self._views = views(model)
        if not self.is_local:
            self.places = dict(sorted(self.places.items(), key=_stacked))
        elif self.mesh.rank == 0:  # so that a bucket is a slice of the flat parameters; other stages need not have them
            self.places = {name: self.places[name] for name in in_memory_order(self._views, self.places)}
        dtype = str(model.dtype).removeprefix("torch.")
        self.listing = [
            [name, "float32" if place.optional else dtype, list(place.shape)] for name, place in self.places.items()
        ]
        self.buckets = plan_buckets(self.listing, bucket_bytes)

    def __iter__(self) -> Iterator[tuple[Bucket, dict[str, Tensor]]]:
        """Each bucket with its whole tensors on rank 0, with none elsewhere. Collective."""
        waiting = self._start(self.buckets[0]) if self.buckets else None
        for index, bucket in enumerate(self.buckets):
            current, waiting = waiting, None
            if index + 1 < len(self.buckets):
                waiting = self._start(self.buckets[index + 1])
            assert current is not None
            yield bucket, current.finish()

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """(name, whole tensor) on rank 0; nothing elsewhere. Collective."""
        for _, tensors in self:
            yield from tensors.items()

    def _start(self, bucket: Bucket) -> "_Transfer":
        names = [slot.name for slot in bucket.slots]
        if self.is_local:
            return _Transfer([], {name: [self._views[name]] for name in names} if self.mesh.rank == 0 else {}, {})
        ops: list[dist.P2POp] = []
        parts: dict[str, list[Tensor]] = {}
        for name in names:
            place, owners = self.places[name], self.owners[name]
            for owner in owners:
                if owner == 0 and self.mesh.rank == 0:
                    parts.setdefault(name, []).append(self._views[name])
                elif self.mesh.rank == 0:
                    dtype = torch.float32 if place.optional else self.model.dtype
                    part = torch.empty(place.part_shape(len(owners)), dtype=dtype, device=self.mesh.device)
                    ops.append(dist.P2POp(dist.irecv, part, owner))
                    parts.setdefault(name, []).append(part)
                elif owner == self.mesh.rank:
                    ops.append(dist.P2POp(dist.isend, self._views[name].contiguous(), 0))
        works: list[dist.Work] = []
        for start in range(0, len(ops), MOST_AT_ONCE):
            works += dist.batch_isend_irecv(ops[start : start + MOST_AT_ONCE])
        return _Transfer(works, parts, {name: self.places[name] for name in names})


def in_memory_order(tensors: Mapping[str, Tensor], names: Iterable[str]) -> list[str]:
    """``names`` as their tensors lie in each piece of memory, the pieces in the order in which ``names`` meet them.

    Where the pieces lie differs from process to process; equal weights must give equal buckets all the same.
    """
    pieces: dict[int, int] = {}
    places = {}
    for name in names:
        start = tensors[name].untyped_storage().data_ptr()
        places[name] = (pieces.setdefault(start, len(pieces)), tensors[name].data_ptr())
    return sorted(places, key=lambda name: places[name])


def _stacked(item: tuple[str, Place]) -> tuple[int, bool, bool]:
    """Orders a layer's experts as models stack them: all gates and ups, then all downs."""
    name, place = item
    depth = {FIRST: -1, LAST: 1 << 30}.get(place.layer, place.layer)
    return depth, place.expert is not None, place.expert is not None and "down_proj" in name


class _Transfer:
    """One bucket's parts under way."""

    def __init__(self, works: list[dist.Work], parts: dict[str, list[Tensor]], whole: dict[str, Place]) -> None:
        self._works, self._parts, self._places = works, parts, whole

    def finish(self) -> dict[str, Tensor]:
        """Wait, and join what was cut."""
        for work in self._works:
            work.wait()
        joined = {}
        for name, parts in self._parts.items():
            dim = self._places[name].dim if name in self._places else None
            joined[name] = parts[0] if len(parts) == 1 else torch.cat(parts, dim=dim or 0)
        return joined


class Snapshot:
    """A version's whole tensors on rank 0, gathered as they are asked for and kept for who asks again.

    A bucket that had to be gathered is laid out where its parts arrived and kept in host memory, in one copy; what
    lies on rank 0 anyway is not copied, and so is good until the next update.
    """

    def __init__(self, gather: WeightGather) -> None:
        self.listing, self.buckets = gather.listing, gather.buckets
        self._is_laid_out = gather.mesh.rank == 0 and not gather.is_local
        self._source = iter(gather)
        self._lying: list[dict[str, Tensor]] = []  # of each bucket, if it lies here anyway; empty on other ranks
        self._kept: list[Tensor] = []  # each bucket on the host, uint8, if it is laid out

    def tensors(self, index: int, device: torch.device) -> dict[str, Tensor]:
        """Of bucket ``index``. If they had to be gathered, they lie on ``device`` in one piece."""
        fresh = self._gather(index)
        if not self._is_laid_out:
            return self._lying[index]
        flat = fresh if fresh is not None and fresh.device == device else self._kept[index].to(device)
        return dict(unpack([(self.buckets[index], flat)]))

    def finish(self) -> None:
        """Gather what nobody asked for, so that the other ranks can go on."""
        self._gather(len(self.buckets) - 1)

    def _gather(self, index: int) -> Tensor | None:
        """All buckets up to ``index``; the last as it was laid out, where its parts arrived, if it is new."""
        flat = None
        while len(self._lying) + len(self._kept) <= index:
            bucket, tensors = next(self._source)
            if not self._is_laid_out:
                self._lying.append(tensors)
                continue
            device = next(iter(tensors.values())).device
            flat = flatten(bucket, tensors, torch.empty(bucket.nbytes, dtype=torch.uint8, device=device))
            self._kept.append(to_host(flat))
        return flat


def to_host(flat: Tensor) -> Tensor:
    """``flat`` itself if it lies there, else a copy in page-locked memory, between which and a GPU copies are fast."""
    if not flat.is_cuda:
        return flat
    return torch.empty(flat.shape, dtype=flat.dtype, pin_memory=True).copy_(flat)
