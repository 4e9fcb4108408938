"""How a version's tensors become buckets on a collective, and a receiver's side of the handshake.

::

    Publish --> Prepare --> Ready --> Go --> [collective: one broadcast per bucket] --> Applied
    learner     broker      receiver  broker  learner and receivers                     receiver

The collective itself (gloo or NCCL, so torch) is handed in; layout, digest and handshake live
here because learner, actors and replicas must agree on them.
"""

import dataclasses
import fnmatch
import hashlib
import logging
import math
import queue
import threading
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import xxhash
from numpy.typing import NDArray

from common.deadlines import answered, brief
from common.errors import WeightsError
from common.trace import Tracer, silent
from common.wire import Applied, Go, Prepare, Publish, Ready, ReceiveFailed

AHEAD = 2  # broadcasts under way while an earlier one is summed up
ALIGNMENT = 16  # bytes; every tensor of a bucket starts at a multiple
EXPERT_BIAS = "e_score_correction_bias"  # of a router: chooses experts, weighs none
DIGEST_KEY = "digest/{}"  # in a group's store, by version
BROKEN = "broken"  # in the digest's place: none will come
ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "float64": 8}


@dataclasses.dataclass(frozen=True)
class TensorSlot:
    """Where a tensor lies in its bucket."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int  # bytes
    nbytes: int


@dataclasses.dataclass(frozen=True)
class Bucket:
    """One broadcast."""

    nbytes: int
    slots: tuple[TensorSlot, ...]


def plan_buckets(tensors: Sequence[Sequence[Any]], bucket_bytes: int) -> list[Bucket]:
    """Lay (name, dtype, shape) out in order into buckets of at most ``bucket_bytes``, without gaps.

    A tensor larger than that gets a bucket of its own, and one that ends at no multiple of ALIGNMENT
    is its bucket's last: SGLang's flattened buckets have no room for padding. Raises :class:`WeightsError` for an
    unknown dtype.
    """
    buckets: list[Bucket] = []
    slots: list[TensorSlot] = []
    offset = 0
    for name, dtype, shape in tensors:
        if dtype not in ITEM_BYTES:
            raise WeightsError(f"tensor {name}: dtype {dtype!r} is none of {', '.join(ITEM_BYTES)}")
        nbytes = ITEM_BYTES[dtype] * math.prod(shape)
        if slots and (offset + nbytes > bucket_bytes or offset % ALIGNMENT):
            buckets.append(Bucket(offset, tuple(slots)))
            slots, offset = [], 0
        slots.append(TensorSlot(name, dtype, tuple(shape), offset, nbytes))
        offset += nbytes
    if slots:
        buckets.append(Bucket(offset, tuple(slots)))
    return buckets


def lay_out(buckets: Sequence[Bucket]) -> tuple[list[int], int]:
    """Where each bucket begins in a receiver's arena, and the arena's size, in bytes.

    Buckets lie side by side, so that a parameter may come in several. Only one that ends at no multiple of ALIGNMENT
    is followed by a gap: what comes next would be misaligned, and CUDA's grouped products refuse that.
    """
    starts, end = [], 0
    for bucket in buckets:
        starts.append(end)
        end += bucket.nbytes + -bucket.nbytes % ALIGNMENT
    return starts, end


def is_frozen(name: str, patterns: Sequence[str]) -> bool:
    """Whether ``optim.freeze`` keeps the tensor ``name`` as it came: it is then not sent either."""
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def group_name(port: int, epoch: int) -> str:
    """Of a membership epoch's group, whose learner listens on ``port``: a server may know those of earlier runs."""
    return f"weights/{port}/{epoch}"


def store_prefix(group: str, device: str) -> str:
    """Under which SGLang's init_custom_process_group (torch's own group helper) finds the members of ``group``.

    ``device``: cpu for gloo, cuda for nccl.
    """
    return f"{group}/{group}//{device}/"


BLOCK_WORDS, ROW_WORDS = 1 << 17, 512  # of 8 bytes: 1 MB, which stays in cache for the second sum


def block_sums(data: NDArray[np.uint8]) -> bytes:
    """Sums, modulo 2^64, over the rows and over the columns of each megabyte, seen as 256 x 512 words.

    A word that changed, or two that changed places, alter one of them. The last block is filled up
    with zeros. What a GPU can do where the bytes lie; in host memory :func:`host_sum` is thrice as fast.
    """
    parts: list[bytes] = []
    step = 8 * BLOCK_WORDS
    for start in range(0, len(data), step):
        block = data[start : start + step]
        if len(block) < step:
            block = np.concatenate((block, np.zeros(step - len(block), np.uint8)))
        words = block.view(np.uint64).reshape(-1, ROW_WORDS)
        parts += [np.add.reduce(words, axis=0).tobytes(), np.add.reduce(words, axis=1).tobytes()]
    return b"".join(parts)


def host_sum(data: NDArray[np.uint8]) -> bytes:
    """XXH3-128 of the bytes, at the speed of memory, where a cryptographic hash would be the slowest part of a
    broadcast: what the weights group carries is guarded against faults, not against forgers."""
    return xxhash.xxh3_128_digest(data.data)


class WeightDigest:
    """BLAKE2b-128 over the buckets' sums, in order; equal on both ends if the bytes are.

    A bucket's are :func:`host_sum` over gloo and :func:`block_sums` over NCCL, for every member of a group alike.
    """

    def __init__(self) -> None:
        self._hash = hashlib.blake2b(digest_size=16)

    def update(self, sums: bytes) -> None:
        """Add one bucket's sums."""
        self._hash.update(sums)

    def hex(self) -> str:
        """The digest."""
        return self._hash.hexdigest()


class Work(Protocol):
    """An operation under way."""

    def wait(self) -> Any:
        """Until it is done; raises if it broke."""


class Collective(Protocol):
    """A joined process group, seen by a receiver."""

    def allocate(self, nbytes: int) -> Any:
        """A uint8 tensor where broadcasts arrive."""

    def start(self, tensor: Any) -> Work:
        """Begin one broadcast from rank 0 into ``tensor``."""

    def sums(self, tensor: Any) -> bytes:
        """Of a tensor, see :class:`WeightDigest`."""

    def receive_digest(self, version: int) -> str:
        """The learner's digest of ``version``."""

    def close(self) -> None:
        """Leave the group."""


@dataclasses.dataclass
class StagedWeights:
    """A version that has arrived and is not in use yet."""

    epoch: int
    version: int
    digest: str
    buckets: list[tuple[Bucket, Any]]  # layout and uint8 tensor
    arena: Any = None  # what those tensors are slices of; used again once the version is applied


class Receiver(Protocol):
    """A process's side of the handshake, seen by its owner."""

    def on_prepare(self, message: Prepare) -> None:
        """The broker asks whether we are ready."""

    def on_go(self, message: Go) -> None:
        """Everyone is ready."""

    def staged(self) -> StagedWeights | None:
        """The oldest version that arrived and was not taken yet."""

    def applied(self, staged: StagedWeights, *, adopted: bool = False, copied: bool = False) -> None:
        """``staged`` is in use."""

    def failed(self, staged: StagedWeights, reason: str) -> None:
        """``staged`` could not be used."""

    def close(self) -> None:
        """Take part no more."""


class WeightReceiver:
    """Receives versions in a background thread while the owner goes on computing.

    The owner passes on every Prepare and Go, polls :meth:`staged` between its steps, swaps the
    tensors in and calls :meth:`applied`. Whatever fails is reported to the broker and the old
    weights stay in use.
    """

    def __init__(
        self,
        send: Callable[[Any], None],
        join: Callable[[Prepare], Collective],
        deadline_s: float,
        tracer: Tracer | None = None,
    ) -> None:
        """``deadline_s``, and a version's own seconds, bound what the learner's store is asked for."""
        self.log = logging.getLogger("weights.receiver")
        self._deadline_s = deadline_s
        self._tracer = tracer or silent()
        self._send = send
        self._join = join
        self._lock = threading.Lock()
        self._prepared: Prepare | None = None
        self._busy = False  # in a collective, or trying to leave one that broke
        self._owes_ready = False  # for the Prepare that came meanwhile
        self._jobs: queue.Queue[tuple[Prepare, int] | None] = queue.Queue()  # and when we were told to go
        self._staged: queue.Queue[StagedWeights] = queue.Queue()
        self._collective: tuple[int, Collective] | None = None
        self._arenas: list[Any] = []  # free; fresh memory for every version would cost more than the wire
        self._adopted: Any = None  # the arena that the model runs on
        self._plan: tuple[list[list[Any]], int, list[Bucket]] = ([], 0, [])  # the last version's
        self._thread = threading.Thread(target=self._run, name="weight-receiver", daemon=True)
        self._thread.start()

    def on_prepare(self, message: Prepare) -> None:
        """The broker asks whether we are ready: as soon as the thread is free."""
        with self._lock:
            self._prepared, self._owes_ready = message, self._busy
        if not self._owes_ready:
            self._send(Ready(message.epoch, int(message.publish["version"])))

    def on_go(self, message: Go) -> None:
        """Everyone is ready: enter the collective in the background."""
        prepared = self._prepared
        if prepared is None or prepared.epoch != message.epoch or prepared.publish["version"] != message.version:
            self._send(ReceiveFailed(message.epoch, message.version, "Go without a matching Prepare"))
            return
        with self._lock:
            self._busy = True
        self._jobs.put((prepared, self._tracer.now()))

    def staged(self) -> StagedWeights | None:
        """The oldest version that arrived and was not taken yet."""
        try:
            return self._staged.get_nowait()
        except queue.Empty:
            return None

    def applied(self, staged: StagedWeights, *, adopted: bool = False, copied: bool = False) -> None:
        """Tell the broker that ``staged`` is in use.

        ``adopted``: its memory is what the model now runs on, until another version takes its place.
        ``copied``: the model now runs on memory of its own. Neither: the model had it already.
        """
        if adopted or copied:
            self._release(self._adopted)
            self._adopted = None
        if adopted:
            self._adopted = staged.arena
        else:
            self._release(staged.arena)
        self._send(Applied(staged.epoch, staged.version, staged.digest))

    def failed(self, staged: StagedWeights, reason: str) -> None:
        """Tell the broker that ``staged`` could not be used."""
        self._release(staged.arena)
        self._send(ReceiveFailed(staged.epoch, staged.version, reason))

    def close(self) -> None:
        """End the thread; a collective under way is abandoned."""
        self._jobs.put(None)
        self._thread.join(timeout=1.0)

    def _run(self) -> None:
        while True:
            job = self._jobs.get()
            if job is None:
                return
            prepare, told = job
            publish = Publish(**prepare.publish)
            try:
                staged = self._receive(prepare, publish)
                arrived = self._tracer.now()
                self.log.debug("version %d arrived in %.3f s", publish.version, (arrived - told) / 1e9)
                self._tracer.span("weights", "receive", told, arrived, version=publish.version)
                self._staged.put(staged)
            except Exception as error:  # noqa: BLE001  # torch raises RuntimeError and its subclasses; all mean: not received
                self._drop_collective()
                reason = brief(error)
                self.log.warning("version %d did not arrive: %s", publish.version, reason)
                self._send(ReceiveFailed(prepare.epoch, publish.version, reason))
            self._free()

    def _free(self) -> None:
        """Nothing is under way any more; answer the Prepare that came meanwhile."""
        with self._lock:
            self._busy, owed, self._owes_ready = False, self._owes_ready, False
            prepared = self._prepared
        if owed and prepared is not None:
            self._send(Ready(prepared.epoch, int(prepared.publish["version"])))

    def _receive(self, job: Prepare, publish: Publish) -> StagedWeights:
        within_s, where = self._deadline_s + publish.seconds, f"{publish.host}:{publish.port}"
        if self._collective is None or self._collective[0] != job.epoch:
            self._drop_collective()
            self._collective = (job.epoch, answered(lambda: self._join(job), within_s, f"the weights group at {where}"))
        collective = self._collective[1]
        buckets = self._planned(publish)
        starts, nbytes = lay_out(buckets)
        arena = self._arena(nbytes, collective)
        digest, received = WeightDigest(), []
        under_way: list[tuple[Any, Work]] = []
        for bucket, start in zip(buckets, starts, strict=True):
            tensor = arena[start : start + bucket.nbytes]
            received.append((bucket, tensor))
            under_way.append((tensor, collective.start(tensor)))
            if len(under_way) > AHEAD:  # sum up one bucket while the next ones arrive
                self._finish(*under_way.pop(0), digest, collective)
        for tensor, work in under_way:
            self._finish(tensor, work, digest, collective)
        expected = answered(
            lambda: collective.receive_digest(publish.version), within_s, f"the learner's store at {where}"
        )
        if expected == BROKEN:
            raise WeightsError(f"version {publish.version}: the learner's broadcast broke, with another receiver")
        if digest.hex() != expected:
            raise WeightsError(f"version {publish.version}: digest {digest.hex()} of what arrived is not {expected}")
        return StagedWeights(job.epoch, publish.version, digest.hex(), received, arena)

    def _planned(self, publish: Publish) -> list[Bucket]:
        """The buckets of ``publish``: those of the version before, the same objects, while the tensors are the same."""
        tensors, bucket_bytes, buckets = self._plan
        if bucket_bytes != publish.bucket_bytes or tensors != publish.tensors:
            buckets = plan_buckets(publish.tensors, publish.bucket_bytes)
            self._plan = (publish.tensors, publish.bucket_bytes, buckets)
        return buckets

    @staticmethod
    def _finish(tensor: Any, work: Work, digest: WeightDigest, collective: Collective) -> None:
        work.wait()
        digest.update(collective.sums(tensor))

    def _arena(self, nbytes: int, collective: Collective) -> Any:
        with self._lock:
            for index, arena in enumerate(self._arenas):
                if arena.nbytes == nbytes:
                    return self._arenas.pop(index)
            self._arenas.clear()
        return collective.allocate(nbytes)

    def _release(self, arena: Any) -> None:
        if arena is not None:
            with self._lock:
                self._arenas.append(arena)

    def _drop_collective(self) -> None:
        if self._collective is not None:
            self._collective[1].close()
            self._collective = None
