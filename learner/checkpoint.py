"""Checkpoints without pickle: what they are, and how any mesh reads them (written by :mod:`learner.saving`).

::

    checkpoints/step-00000012/rank-00000.safetensors ...    each rank's shard of weights and moments, by name
                              state.json                    written last: the directory is complete

A rank copies its shard to memory and goes on training; a thread writes it. Rank 0 waits for every
rank's file, writes state.json and renames the directory into place, so a kill at any moment leaves
the previous one good. A piece is ``kind|tensor|part/parts|start``: elements from ``start`` on of one
tp part of one tensor (:mod:`learner.layout`), so a reader of another mesh finds what it needs; its
digest stands in the file's header and is checked when the piece is read. A rollout model that is
trained beside the policy has kinds of its own: ``rollout.weight`` and so on.
"""

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import xxhash
from safetensors import SafetensorError, safe_open
from torch import Tensor

from common.errors import CheckpointError
from learner.layout import BIAS, Place, places, views
from learner.mesh import Mesh
from learner.model.decoder import Decoder
from learner.optim import Optimizer
from learner.parallel.flat import FlatParameters
from learner.retention import PREFIX, STATE, complete, path_of, step_of

POLL_S = 0.05
SEEN_S = 30.0  # until every rank sees what rank 0 sees: shared file systems show a new name late
NOTHING, REFUSED = -1, -2  # where a step is said
BESIDE = "rollout."  # begins the kinds of a second model's pieces
Trained = tuple[Decoder, Optimizer]


@dataclass(frozen=True)
class TrainingState:
    """Everything of a checkpoint that is no tensor, and the routers' last loads."""

    step: int  # the next to train; the broker may forget those before
    version: int
    run_id: str
    updates: int
    skipped_updates: int
    expert_fraction: list[list[float]] = field(default_factory=list)
    rollout: dict[str, Any] | None = None  # the same of a rollout model that is trained beside it


def latest(directory: Path) -> Path | None:
    """The newest finished checkpoint, or None."""
    found = complete(directory)
    return found[-1] if found else None


def digest_of(tensor: Tensor) -> str:
    """XXH3-64 of its bytes, in hex."""
    return xxhash.xxh3_64_hexdigest(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)


def file_of(rank: int) -> str:
    """The name of a rank's file."""
    return f"rank-{rank:05d}.safetensors"


def shares(model: Decoder, flat: FlatParameters) -> Iterator[tuple[str, Tensor, int]]:
    """(name, this rank's view of it, where that starts in the flat buffer) of every tensor in ``flat``."""
    start = flat.weights.data_ptr()
    for name, view in views(model).items():
        if start <= view.data_ptr() < start + flat.weights.nbytes:
            yield name, view, (view.data_ptr() - start) // view.element_size()


# ---- reading ------------------------------------------------------------------------------------


def find(directory: Path, resume: bool, mesh: Mesh, seen_s: float = SEEN_S) -> Path | None:
    """The checkpoint that every rank goes on from, of rank 0's choice; None: the run begins. Collective.

    Raises :class:`CheckpointError` for checkpoints without ``resume`` (learner.resume), for ``resume`` with none that
    is complete, and on a rank that does not see rank 0's within ``seen_s``.
    """
    step, refusal = NOTHING, None
    if mesh.rank == 0:
        try:
            step = _choose(directory, resume)
        except (CheckpointError, OSError) as error:
            step, refusal = REFUSED, error
    step = mesh.broadcast_int(step)
    if step == REFUSED:
        raise refusal or CheckpointError(f"{directory}: rank 0 goes on from nothing there; its log says why")
    if step == NOTHING:
        return None
    path, deadline = path_of(directory, step), time.monotonic() + seen_s
    while not (path / STATE).is_file():
        if time.monotonic() > deadline:
            raise CheckpointError(
                f"{path}: rank 0 goes on from it, and rank {mesh.rank} sees no {STATE} there after {seen_s:g} s; "
                "all ranks need the same run directory"
            )
        time.sleep(POLL_S)
    return path


def check_newest(directory: Path, begun_from: Path | None) -> None:
    """Raise :class:`CheckpointError` where a newer one came than that which was read, of a learner that still ended.

    The broker may have forgotten what lies before it.
    """
    if (newest := latest(directory)) != begun_from:
        raise CheckpointError(
            f"{newest or directory}: an earlier learner wrote there while this one began from "
            f"{begun_from or 'nothing'}; start this learner again"
        )


def _choose(directory: Path, resume: bool) -> int:
    """The step of the newest finished checkpoint, or NOTHING."""
    found = latest(directory)
    if found is None and resume and any(directory.glob(f"{PREFIX}*")):
        raise CheckpointError(
            f"learner.resume=true, but {directory} holds no complete checkpoint: each lacks its {STATE}; "
            "restore one, or begin a new run under another run.name"
        )
    if found is not None and not resume:
        raise CheckpointError(
            f"{directory} holds checkpoints, the newest {found.name}, beside which a new run's would be deleted as "
            "older ones: go on from them with learner.resume=true, or move that directory away"
        )
    return NOTHING if found is None else step_of(found)


@torch.no_grad()
def load(
    path: Path,
    model: Decoder,
    optimizer: Optimizer,
    frozen: frozenset[str] = frozenset(),
    beside: Trained | None = None,
) -> TrainingState:
    """Load into ``model`` and ``optimizer``, and into the rollout model ``beside`` them, in place, whatever the mesh
    that wrote it.

    ``frozen`` must be what was frozen then. Raises :class:`CheckpointError` naming the file, or the
    tensor that does not fit.
    """
    reader = CheckpointReader(path)
    if (reader.state.rollout is not None) != (beside is not None):
        raise CheckpointError(
            f"{path}: a rollout model was {'trained' if beside is None else 'not trained'} beside the policy then; "
            "resume with joint.path and joint.train as they were"
        )
    _load(reader, model, optimizer, frozen)
    optimizer.set_steps(reader.state.updates, reader.state.skipped_updates)
    if beside is not None:
        _load(CheckpointReader(path, BESIDE), *beside, frozenset())
    torch.set_rng_state(reader.rng(model.mesh.rank))
    return reader.state


def _load(reader: "CheckpointReader", model: Decoder, optimizer: Optimizer, frozen: frozenset[str]) -> None:
    known = {place.name: place for place in places(model.config)}
    reader.check(known, {place.name for place in places(model.config) if not place.optional} - frozen)
    tp = model.mesh.tp
    for flat in optimizer.flats:
        moments = optimizer.moments(flat)
        for name, view, offset in shares(model, flat):
            weight = reader.part("weight", known[name], tp.rank, tp.size)
            view.copy_(weight)
            begin, end = max(offset, flat.range.start), min(offset + view.numel(), flat.range.stop)
            if begin >= end:
                continue
            target = slice(begin - flat.range.start, end - flat.range.start)
            part = slice(begin - offset, end - offset)
            flat.master.data[target].copy_(weight.reshape(-1)[part])
            for kind, shard in moments.items():
                shard[target].copy_(reader.part(kind, known[name], tp.rank, tp.size).reshape(-1)[part])
    for name, view in views(model).items():
        if known[name].optional and name in reader.names():
            view.copy_(reader.part("weight", known[name], 0, 1))


class CheckpointReader:
    """One checkpoint's tensors by name; files are mapped, so a tensor is read when it is asked for.

    ``model``: "" reads the policy, BESIDE the rollout model that was trained beside it.
    """

    def __init__(self, path: Path, model: str = "") -> None:
        self.path, self._model = path, model
        try:
            found = json.loads((path / STATE).read_text())
            ranks = int(found.pop("ranks"))
            self.state = TrainingState(**found)
            self._files = [safe_open(path / file_of(rank), framework="pt") for rank in range(ranks)]
            # Older checkpoints have none.
            self._digests = [file.metadata() or {} for file in self._files]  # type: ignore[no-untyped-call]
            self._index: dict[tuple[str, str], list[tuple[int, int, int, int, str]]] = {}
            self._rng: dict[int, int] = {}
            for number, file in enumerate(self._files):
                for key in file.keys():  # type: ignore[no-untyped-call]  # noqa: SIM118  # no mapping
                    self._add(number, key)
        except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
            raise self._damaged(error) from error

    def _add(self, number: int, key: str) -> None:
        if key.startswith("rng|"):
            self._rng[int(key.removeprefix("rng|"))] = number
            return
        kind, name, part, start = key.split("|")
        if kind.startswith(BESIDE) != bool(self._model):
            return
        kind = kind.removeprefix(self._model)
        index, parts = (int(n) for n in part.split("/"))
        self._index.setdefault((kind, name), []).append((parts, index, int(start), number, key))

    def _damaged(self, error: Exception | str) -> CheckpointError:
        older = [path for path in complete(self.path.parent) if step_of(path) < step_of(self.path)]
        before, start = "the beginning", "another run.name"
        if older:
            before = older[-1].name
            export = f"python -m tools.export {self.path.parents[1]} --step {step_of(older[-1])} --out DIR"
            start = f"`{export}`, then model.path=DIR and another run.name"
        return CheckpointError(
            f"{self.path}: damaged ({error}); copy it here again. If the broker was not told of it yet, move it out of "
            f"{self.path.parent}, and learner.resume=true goes on from {before}; else the broker holds no step before "
            f"it, and only a new run can be started: {start}"
        )

    def check(self, known: dict[str, Place], trained: set[str]) -> None:
        """Raises :class:`CheckpointError` unless these are the tensors that are trained now."""
        names = self.names()
        for name in sorted(names - set(known)):
            if name.endswith(BIAS):
                raise CheckpointError(f"{self.path}: {name}: set loss.expert_bias_rate above 0, as it was then")
            raise CheckpointError(f"{self.path}: {name}: no such tensor in model.path; it belongs to another model")
        for name in sorted(name for name in names - trained if not known[name].optional):
            raise CheckpointError(
                f"{self.path}: {name} was trained and is frozen now; resume with the same optim.freeze"
            )
        for name in sorted(trained - names):
            raise CheckpointError(
                f"{self.path}: weight of {name} is missing; it belongs to another model, or optim.freeze kept it then"
            )

    def names(self) -> set[str]:
        """Tensors whose weights are here: the trained ones."""
        return {name for kind, name in self._index if kind == "weight"}

    def part(self, kind: str, place: Place, rank: int, size: int) -> Tensor:
        """Part ``rank`` of ``size`` of a tensor, float32, joined from whatever parts were written."""
        pieces = sorted(self._index.get((kind, place.name), []))
        if not pieces:
            raise CheckpointError(f"{self.path}: {kind} of {place.name} is missing; it belongs to another model")
        written = pieces[0][0]
        if written == size and place.dim is not None:
            return self._read(pieces, place, rank, written)
        whole = [self._read(pieces, place, index, written) for index in range(written)]
        joined = whole[0] if written == 1 else torch.cat(whole, dim=place.dim or 0)
        return joined if place.dim is None else joined.chunk(size, dim=place.dim)[rank]

    def _read(self, pieces: list[tuple[int, int, int, int, str]], place: Place, index: int, parts: int) -> Tensor:
        try:
            flat = [self._tensor(number, key) for _, i, _, number, key in pieces if i == index]
        except SafetensorError as error:
            raise self._damaged(error) from error
        shape = place.part_shape(parts)
        joined = flat[0] if len(flat) == 1 else torch.cat(flat)
        if joined.numel() != torch.Size(shape).numel():
            raise CheckpointError(
                f"{self.path}: {place.name} has {joined.numel()} elements there, {list(shape)} in model.path; "
                "it belongs to another model, or a file is missing"
            )
        return joined.view(shape)

    def rng(self, rank: int) -> Tensor:
        """The random state of ``rank``, or of rank 0 if there was no such rank."""
        number = self._rng.get(rank, self._rng.get(0))
        if number is None:
            raise self._damaged("no random state")
        owner = rank if rank in self._rng else 0
        return self._tensor(number, f"rng|{owner}")

    def _tensor(self, number: int, key: str) -> Tensor:
        found: Tensor = self._files[number].get_tensor(key)  # type: ignore[no-untyped-call]
        written = self._digests[number].get(key)
        if written is not None and written != digest_of(found):
            raise self._damaged(f"{file_of(number)}: {key} is not what was written")
        return found
