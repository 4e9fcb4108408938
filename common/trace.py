"""Where a process's time goes: one timeline a process, written beside the run, read by tools.trace and tools.profile.

::

    tracer.state("sample") ... tracer.state("idle.credits") ...      what the main thread does, without gaps
    tracer.span("rollouts", "rollout", began, ended, group=7)        something with a beginning and an end of its own
    tracer.tally("decode", rows, wall, cpu, amount)                  sums by a key: what a cost is a function of
         |
         +-> a thread of its own, once a second -> RUN_DIR/trace/<process>.trace, msgpack arrays one after the other

Times are ``time.monotonic_ns``; the broker's clock is the run's, and the link measures how far ours is from
it (:class:`ClockOffset`). A file is appended to by every life of its process and each life begins with a
header, so a file cut short anywhere is readable up to there. States that last less than ``resolution_ns``
are counted in the totals and drawn as part of their neighbour.

Records, by their first element::

    ["h", {...}]                             a life begins: see HEADER
    ["s", state, start, end, step]           the main thread was in ``state``; step -1 for none
    ["x", track, name, start, end, {args}]   a span
    ["i", name, at, {args}]                  an instant
    ["n", at, {name: value}]                 levels, drawn as curves
    ["t", at, {state: [wall, cpu, times]}, [slices]]   totals since the life began, nanoseconds, the present
                                             state's wall-clock included; slices ["s", ...] that are not over
    ["y", at, {tally: {key: [times, wall, cpu, amount]}}]   tallies since the life began, nanoseconds
    ["p", at, cpu]                           CPU time of all threads of the process, nanoseconds
    ["c", at, offset, delay]                 at ``at`` the broker's clock was ours + offset, known to within delay / 2
    ["e", at, reason]                        an orderly end, or that the file is full
"""

import contextlib
import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import msgpack

from common.codec import WIRE_VERSION
from common.config import MEGABYTE, RunConfig

TRACE = "trace"  # within the run directory
SUFFIX = ".trace"
TORCH, TORCH_CLOCK = ".torch.json.gz", "croupier.clock"  # torch.profiler's records of steps; see learner.profiling
FORMAT = 1  # of these records
RESOLUTION_NS = 200_000
WRITE_EVERY_S = 1.0
FULL_EVERY_NS = 60_000_000_000  # between two writes of totals to a file that is full
LEVELS_EVERY_NS = 100_000_000
MAX_HELD = 20_000  # records between two writes; more are dropped and counted
IDLE = "idle."  # how the states begin in which a process waits; what follows is what for

log = logging.getLogger("trace")

Phase = Callable[[str], object]  # how code that knows no tracer is told to name what it does: phase("forward")


def no_phase(_name: str) -> None:
    """Nobody wants to know."""


# What main threads do. Idle states name their cause. Every process begins in "start".
STATES: dict[str, dict[str, str]] = {
    "actor": {
        "start": "the model is read, servers are started",
        "sample": "the engine decodes",
        "play": "tasks, scoring and bookkeeping of rollouts",
        "send": "trajectories are packed and sent",
        "swap": "a new version is taken into use",
        "idle.credits": "the broker has granted nothing to sample: the staleness budget is spent",
        "idle.weights": "what is granted wants a newer version than there is here",
        "idle.server": "everything is under way on the servers, nothing has come back",
        "idle.scoring": "everything is sampled and is being scored",
        "idle.agents": "agents are at work and ask for nothing",
        "idle.broker": "trajectories sent wait to be acknowledged (actor.unacked_mb)",
        "idle.start": "before the broker's welcome",
        "end": "the run is over: servers, verifiers and sockets are closed",
    },
    "broker": {
        "start": "the journal is read",
        "receive": "messages are decoded and handled, deadlines looked after",
        "admit": "trajectories are admitted and grouped",
        "collate": "a step is looked for, or assembled",
        "thin": "coins are tossed, receipts written",
        "pack": "shards are made",
        "grant": "credits are given out",
        "commit": "a trained step is counted and its data forgotten",
        "send": "what the journal has on disk is answered: grants, requests, shards",
        "journal": "answers wait for the disk, and nobody has sent anything",
        "status": "figures are written",
        "idle.messages": "nobody has sent anything",
        "end": "the run is over: peers say goodbye",
    },
    "replica": {
        "start": "the model is read",
        "score": "a batch is scored",
        "swap": "a new version is taken into use",
        "receive": "messages are handled",
        "idle.requests": "the broker has asked nothing",
        "idle.weights": "what is asked wants a newer version than there is here",
        "idle.start": "before the broker's welcome",
        "end": "the run is over",
    },
    "learner": {
        "start": "the model and a checkpoint are read",
        "load": "shards become tensors",
        "forward": "forward passes",
        "backward": "backward passes",
        "reduce": "gradients and figures are added up over the mesh, late ranks waited for",
        "optimizer": "the update",
        "joint": "the rollout model's own update",
        "gather": "weights are gathered from the mesh",
        "send": "a version is broadcast",
        "commit": "the broker is told",
        "checkpoint": "a checkpoint is begun",
        "export": "the final model is written",
        "profile": "torch.profiler's record of a step is written (trace.torch_steps)",
        "idle.shard": "the broker has no shard yet; tools.profile says why, from the broker's own marks",
        "idle.receivers": "receivers are not ready for a version",
        "idle.ranks": "other ranks are not there yet",
        "idle.start": "before the broker's welcome",
        "idle.end": "everything is trained: late receivers and the last evaluation are waited for",
        "end": "the run is over",
    },
}

# ``tally -> what it is keyed by; what its amount counts``. What the work itself costs: actor.slowdown and
# learner.slowdown, and their pace_s, are not in it.
TALLIES = {
    "decode": "an actor's engine: rows that were live before the step; tokens sampled in it",
    "context": "the same steps: tokens of the longest context among the rows, over 32; rows times that context",
    "context_rows": "the same: rows, and no time",
    "prefill": "an actor's engine: prompt tokens, see power_of_two; the same, exactly",
    "swap": "an actor: bytes of the version, see power_of_two; the same, exactly",
    "score": "a replica: tokens of the batch, see power_of_two; the same, exactly",
    "train": "a learner rank: tokens of the shard, see power_of_two; the same, exactly",
    "publish": "the learner's rank 0: receivers; bytes. From the offer to the end of the broadcast",
    "admit": "the broker: trajectories of a message, see power_of_two; the same, exactly",
    "collate": "the broker: tokens of the step, see power_of_two; the same, exactly",
    "thin": "the broker: as collate",
    "pack": "the broker: as collate",
}

# The instant "step" of the broker, ``{"step": s, "what": one of these}``: where a step's data were when.
# A step that is thinned a second time has "scored" and "decided" once more, with "again": True.
MILESTONES = (
    "asked",  # the learner wants its shard
    "ready",  # enough groups are complete
    "assembled",  # and the version that scores it is out; "groups": those that are followed
    "scored",  # every scorer has answered
    "decided",  # coins are tossed
    "served",  # the first shard has left
    "committed",  # it is trained
)


def power_of_two(amount: float) -> int:
    """The bin of a tally: the smallest power of two not below ``amount``."""
    return 1 << max(0, int(amount) - 1).bit_length()


@dataclass
class ClockOffset:
    """How far the broker's clock is from ours, from heartbeats and their echoes, as NTP does (RFC 5905, section 8).

    The exchange with the least delay of the last ``keep`` is believed: its error is at most half that delay.
    """

    keep: int = 64
    _seen: list[tuple[int, int, int]] = field(default_factory=list)  # (delay, offset, when), oldest first

    def observe(self, sent: int, received: int, answered: int, back: int) -> None:
        """``sent`` and ``back`` by our clock, ``received`` and ``answered`` by the broker's, nanoseconds."""
        delay = (back - sent) - (answered - received)
        if sent <= 0 or delay < 0:
            return
        self._seen = [*self._seen[1 - self.keep :], (delay, ((received - sent) + (answered - back)) // 2, back)]

    @property
    def best(self) -> tuple[int, int, int] | None:
        """When the most reliable exchange was, its offset and its delay; None before the first."""
        if not self._seen:
            return None
        delay, offset, when = min(self._seen)
        return when, offset, delay


def trace_path(run_dir: Path, process: str) -> Path:
    """The file of ``process``: a name like actor-0, or learner.3 for a rank."""
    return run_dir / TRACE / f"{process}{SUFFIX}"


class Tracer:
    """One process's timeline. The owner's main thread alone calls :meth:`state` and :meth:`tally`."""

    def __init__(
        self,
        path: Path | None,
        process: str,
        role: str,
        rank: int = 0,
        limit_bytes: int = 256 * MEGABYTE,
        follow_every: int = 8,
        clock: Callable[[], int] = time.monotonic_ns,
        cpu_clock: Callable[[], int] = time.thread_time_ns,
    ) -> None:
        """``path`` None records nothing but totals. ``follow_every``: see :meth:`follows`."""
        self.process, self.role, self.rank = process, role, rank
        self.totals: dict[str, list[int]] = {}  # state -> wall, cpu, times
        self.tallies: dict[str, dict[int, list[float]]] = {}
        self.dropped = 0  # records that came faster than they could be written
        self.offset = ClockOffset()
        self._follow_every = follow_every
        self._clock, self._cpu = clock, cpu_clock
        self._held: list[list[Any]] = []
        self._moving = threading.Lock()  # from one state to the next
        self._writing = threading.Lock()
        self._limit, self._full = limit_bytes, False
        self._wrote = 0  # when
        self._told: tuple[int, int, int] | None = None
        now = clock()
        self._state, self._step, self._since, self._cpu_since = "start", -1, now, cpu_clock()
        self._slice: list[Any] | None = None  # the slice that goes on while only short states come between
        self._levels: dict[str, float] = {}
        self._next_levels = now
        self._closing = threading.Event()
        self._thread: threading.Thread | None = None
        self._file = None
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("ab")
            self._held.append(["h", self._header(now)])
            self.write()

    def begin(self) -> "Tracer":
        """Write once a second from now on, in a thread: a disk that is slow holds nobody up."""
        if self._file is not None:
            self._thread = threading.Thread(target=self._write_on, name="tracer", daemon=True)
            self._thread.start()
        return self

    def _write_on(self) -> None:
        while not self._closing.wait(WRITE_EVERY_S):
            self.write()

    def _header(self, now: int) -> dict[str, Any]:
        return {
            "format": FORMAT, "wire": WIRE_VERSION, "process": self.process, "role": self.role, "rank": self.rank,
            "host": socket.gethostname(), "pid": os.getpid(), "cores": len(os.sched_getaffinity(0)), "clock_ns": now,
            "unix_ns": time.time_ns(),
            "resolution_ns": RESOLUTION_NS, "follow_every": self._follow_every,
        }  # fmt: skip

    @property
    def on(self) -> bool:
        """Whether more than totals is kept."""
        return self._file is not None and not self._full

    def follows(self, group: int) -> bool:
        """Whether ``group`` is one that every process follows through the run."""
        return self.on and group % self._follow_every == 0

    # ---- what is recorded -----------------------------------------------------------------------

    def state(self, name: str, step: int = -1) -> None:
        """From now on the main thread does ``name``, of training step ``step``."""
        if name == self._state and step == self._step:
            return
        with self._moving:
            self._count(self._clock(), self._cpu())
            self._state, self._step = name, step

    @contextlib.contextmanager
    def within(self, name: str, step: int = -1) -> Iterator[None]:
        """``name`` for a while, and then again what was done before."""
        before, of = self._state, self._step
        self.state(name, step)
        try:
            yield
        finally:
            self.state(before, of)

    @contextlib.contextmanager
    def measured(self, name: str, key: int, amount: float) -> Iterator[None]:
        """:meth:`within`, and unless it fails a :meth:`tally` of it with the same looks at the clocks."""
        before, of = self._state, self._step
        self.state(name)
        began, cpu = self._since, self._cpu_since
        try:
            yield
        finally:
            self.state(before, of)
        self.tally(name, key, self._since - began, self._cpu_since - cpu, amount)

    def phases(self, step: int) -> Phase:
        """:meth:`state` for code that knows neither the tracer nor the step."""
        return lambda name: self.state(name, step)

    def _count(self, now: int, cpu: int) -> None:
        """The present state lasted until ``now``."""
        total = self.totals.get(self._state)
        if total is None:
            total = self.totals[self._state] = [0, 0, 0]
        total[0] += now - self._since
        total[1] += max(0, cpu - self._cpu_since)
        total[2] += 1
        if self._file is not None:
            self._draw(self._state, self._since, now, self._step)
        self._since, self._cpu_since = now, cpu

    def _draw(self, state: str, start: int, end: int, step: int) -> None:
        """Make a slice of it, or let it be part of the one before."""
        last = self._slice
        if last is not None and (end - start < RESOLUTION_NS or (last[1] == state and last[4] == step)):
            last[3] = end
            return
        if last is not None and last[3] - last[2] < RESOLUTION_NS:
            start = last[2]  # the very first one was short
        elif last is not None:
            self._hold(last)
        self._slice = ["s", state, start, end, step]

    def _hold(self, record: list[Any]) -> None:
        if self._file is None or self._full:
            return
        if len(self._held) >= MAX_HELD:
            self.dropped += 1
            return
        self._held.append(record)

    def span(self, track: str, name: str, start: int, end: int, **args: Any) -> None:
        """``name`` lasted from ``start`` to ``end`` (:meth:`now`) on a track of its own."""
        self._hold(["x", track, name, start, end, args])

    def instant(self, name: str, at: int | None = None, **args: Any) -> None:
        """``name`` happened now, or at ``at``."""
        self._hold(["i", name, self._clock() if at is None else at, args])

    @property
    def wants_levels(self) -> bool:
        """Whether :meth:`levels` would keep anything now: ten times a second."""
        return self.on and self._clock() >= self._next_levels

    def levels(self, **values: float) -> None:
        """How much there is of something now; kept where it has changed."""
        now = self._clock()
        self._next_levels = now + LEVELS_EVERY_NS
        changed = {name: value for name, value in values.items() if self._levels.get(name) != value}
        if changed:
            self._levels |= changed
            self._hold(["n", now, changed])

    def tally(self, name: str, key: int, wall_ns: int, cpu_ns: int, amount: float = 1) -> None:
        """Once more ``name`` at ``key`` (rows, tokens): took so long and did so much."""
        by_key = self.tallies.setdefault(name, {})
        found = by_key.get(key)
        if found is None:
            found = by_key[key] = [0, 0, 0, 0]
        found[0] += 1
        found[1] += wall_ns
        found[2] += cpu_ns
        found[3] += amount

    def now(self) -> int:
        """The clock of all records."""
        return self._clock()

    def cpu(self) -> int:
        """CPU time of the calling thread, nanoseconds."""
        return self._cpu()

    def seconds(self) -> dict[str, float]:
        """Wall-clock seconds by state since the start, the present state's included: for heartbeats and exporters."""
        return {state: total[0] / 1e9 for state, total in self._totals_now(self._clock()).items()}

    def _totals_now(self, now: int) -> dict[str, list[int]]:
        with self._moving:
            found = {state: list(total) for state, total in self.totals.items()}
            present = found.setdefault(self._state, [0, 0, 0])
            present[0] += max(0, now - self._since)
        return found

    def _unfinished(self, now: int) -> list[list[Any]]:
        """Slices that are not held yet: a process that is killed leaves them behind."""
        with self._moving:
            last = [] if self._slice is None else [list(self._slice)]
            return [*last, ["s", self._state, self._since, now, self._step]]

    # ---- the file -------------------------------------------------------------------------------

    def write(self, last: bool = False) -> None:
        """Write what is held, with the totals; to a full file these alone, once a minute and at last."""
        with self._writing:
            now = self._clock()
            if self._file is None or (self._full and not last and now - self._wrote < FULL_EVERY_NS):
                return
            self._wrote = now
            held = self._held[: len(self._held)]
            del self._held[: len(held)]
            held.append(["t", now, self._totals_now(now), self._unfinished(now)])
            if self.tallies:
                tallies = {name: {k: list(v) for k, v in list(by.items())} for name, by in list(self.tallies.items())}
                held.append(["y", now, tallies])
            held.append(["p", now, time.process_time_ns()])
            best = self.offset.best
            if best is not None and best != self._told:
                self._told = best
                held.append(["c", *best])
            try:
                self._file.write(b"".join(map(msgpack.packb, held)))
                if not self._full and self._file.tell() > self._limit:
                    self._full = True
                    self._file.write(msgpack.packb(["e", now, f"full: trace.limit_mb={self._limit / MEGABYTE:g}"]))
                self._file.flush()
            except OSError as error:  # a full disk costs the timeline, not the run
                self._end(f"cannot be written: {error}")

    def _end(self, reason: str) -> None:
        if self._file is not None:
            file, self._file = self._file, None
            try:
                file.write(msgpack.packb(["e", self._clock(), reason]))
                file.close()
            except OSError:
                pass

    def close(self, reason: str = "closed") -> None:
        """Write the rest."""
        self._closing.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        with self._moving:
            self._count(self._clock(), self._cpu())
            if self._slice is not None:
                self._hold(self._slice)
                self._slice = None
        if self.dropped:
            reason += f"; {self.dropped:,} records came too fast to be written"
        self.write(last=True)
        with self._writing:
            self._end(reason)

    def __enter__(self) -> "Tracer":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.close(f"{kind.__name__}: {error}" if kind is not None else "closed")


def open_tracer(config: RunConfig, process: str, role: str, rank: int = 0) -> Tracer:
    """The tracer of a process of this run; where its file cannot be written, a warning and totals alone."""
    section = config.trace
    path = trace_path(config.run.path, process) if section.spans else None
    limit = int(section.limit_mb * MEGABYTE)
    try:
        return Tracer(path, process, role, rank, limit, section.follow_every).begin()
    except OSError as error:
        log.warning("%s: no timeline of this process: %s", path, error)
        return Tracer(None, process, role, rank)


def silent(process: str = "", role: str = "") -> Tracer:
    """A tracer that writes no file."""
    return Tracer(None, process, role)
