"""The timelines that a run's processes wrote (common.trace), read and put on one clock.

::

    RUN_DIR/trace/*.trace -> read_timelines() -> Timelines: a Life for every start of every process

Whatever can be read is: a file cut short by a kill, one that is still written, one of another version
beside sound ones. What could not be is said in ``Timelines.notes``.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgpack

from common.trace import FORMAT, IDLE, SUFFIX, TRACE
from tools.clocks import ClockMap, Exchange
from tools.run_files import Record

HEADER_BEGINS = msgpack.packb(["h", {}])[:-1]
MAX_HEADER = 1 << 16  # bytes


@dataclass(frozen=True, slots=True)
class Slice:
    """The main thread was in ``state``; times in nanoseconds of the broker's clock, as everywhere here."""

    state: str
    start: int
    end: int
    step: int


@dataclass(frozen=True, slots=True)
class Span:
    """Something with a track of its own."""

    track: str
    name: str
    start: int
    end: int
    args: Record


@dataclass(frozen=True, slots=True)
class Instant:
    """A moment."""

    name: str
    at: int
    args: Record


@dataclass
class Life:
    """One start of one process."""

    header: Record
    slices: list[Slice] = field(default_factory=list)
    spans: list[Span] = field(default_factory=list)
    instants: list[Instant] = field(default_factory=list)
    levels: list[tuple[int, dict[str, float]]] = field(default_factory=list)
    totals: list[tuple[int, dict[str, list[int]]]] = field(default_factory=list)  # about one a second, cumulative
    tallies: dict[str, dict[int, list[float]]] = field(default_factory=dict)  # the last
    tallied: list[tuple[int, dict[str, dict[int, list[float]]]]] = field(default_factory=list)  # each, cumulative
    cpu: list[tuple[int, int]] = field(default_factory=list)  # of all threads, nanoseconds, about one a second
    clock: ClockMap = field(default_factory=ClockMap)  # from the process's own to the broker's
    ended: str = ""  # why; "" for a process that was killed or goes on

    @property
    def offset_ns(self) -> int:
        """The broker's clock was the process's + this at the surest exchange."""
        return self.clock.best.offset if self.clock.best else 0

    @property
    def delay_ns(self) -> int | None:
        """Of that exchange, whose error is at most half of it; None: not measured, the clocks are taken for one."""
        return self.clock.best.delay if self.clock.best else None

    @property
    def process(self) -> str:
        """Its name in the run."""
        return str(self.header["process"])

    @property
    def role(self) -> str:
        """actor, broker, learner or replica."""
        return str(self.header["role"])

    @property
    def start(self) -> int:
        """When it began."""
        return self.clock(int(self.header["clock_ns"]))

    @property
    def end(self) -> int:
        """The newest moment that it tells of."""
        found = [s.end for s in self.slices[-1:]] + [at for at, _ in self.totals[-1:]] + [s.end for s in self.spans]
        return max(found, default=self.start)

    def seconds(self, since: int | None = None, until: int | None = None) -> dict[str, tuple[float, float]]:
        """``state -> (wall, cpu)`` seconds between two moments, to the nearest record of totals; all by default."""
        if not self.totals:
            return {}
        before = [t for at, t in self.totals if since is not None and at <= since]
        after = [t for at, t in self.totals if until is None or at <= until]
        if not after:
            return {}
        first: dict[str, list[int]] = before[-1] if before else {}
        return {
            state: ((total[0] - first.get(state, [0, 0])[0]) / 1e9, (total[1] - first.get(state, [0, 0])[1]) / 1e9)
            for state, total in after[-1].items()
        }


@dataclass
class Timelines:
    """All lives of a run, oldest first, and what could not be read."""

    lives: list[Life] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def of(self, role: str) -> list[Life]:
        """Lives of a role."""
        return [life for life in self.lives if life.role == role]


def is_idle(state: str) -> bool:
    """Whether a process waits in ``state``."""
    return state.startswith(IDLE)


def read_timelines(run_dir: Path) -> Timelines:
    """Every timeline below ``run_dir``; raises nothing for what is missing, torn or foreign."""
    found = Timelines()
    files = sorted((run_dir / TRACE).glob(f"*{SUFFIX}"))
    if not files:
        found.notes.append(f"{run_dir / TRACE}: no timelines there; was the run made with trace.spans=false?")
    for path in files:
        lives, note = _read(path)
        found.lives += lives
        if note:
            found.notes.append(f"{path.name}: {note}")
    found.lives.sort(key=lambda life: life.start)
    return found


def _read(path: Path) -> tuple[list[Life], str]:
    """The lives of one file, and what is wrong with it."""
    try:
        content = path.read_bytes()
    except OSError as error:
        return [], f"cannot be read ({error.strerror or error})"
    starts = list(_headers(content))
    odd = [] if starts[:1] == [0] or not content else ["it does not begin with a header"]
    lives = []
    for start, end in itertools.pairwise([*starts, len(content)]):
        records, problem = _records(content[start:end])
        try:
            lives.append(_life(records))
        except (ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
            problem = f"a life of {len(records):,} records cannot be read ({type(error).__name__}: {error})"
        if problem:
            odd.append(problem)
    return lives, f"damaged: {'; '.join(odd)}; the rest of it is read" if odd else ""


def _headers(content: bytes) -> Iterator[int]:
    """Where lives begin. A kill may have cut the record before one short, so they are looked for."""
    at = content.find(HEADER_BEGINS)
    while at >= 0:
        unpacker = msgpack.Unpacker(max_buffer_size=MAX_HEADER, strict_map_key=False, raw=False)
        unpacker.feed(content[at : at + MAX_HEADER])
        try:
            found = next(unpacker)[1]
        except (ValueError, TypeError, StopIteration, msgpack.UnpackException):
            found = None
        if isinstance(found, dict) and isinstance(found.get("clock_ns"), int):
            yield at
        at = content.find(HEADER_BEGINS, at + 1)


def _records(content: bytes) -> tuple[list[Any], str]:
    """The records of one life up to the first that is none, and what that is; one cut short at the end is left out."""
    records: list[Any] = []
    unpacker = msgpack.Unpacker(max_buffer_size=max(len(content), 1), strict_map_key=False, raw=False)
    unpacker.feed(content)
    try:
        for record in unpacker:
            if not isinstance(record, list) or not record or not isinstance(record[0], str):
                return records, f"after {len(records):,} records of a life comes something else"
            records.append(record)
    except (ValueError, TypeError, msgpack.UnpackException) as error:
        return records, f"after {len(records):,} records of a life: {type(error).__name__}: {error}"
    return records, ""


def _life(records: list[Any]) -> Life:
    header = records[0][1]
    if header["format"] != FORMAT:
        raise ValueError(f"format {header['format']}, this croupier reads {FORMAT}")
    _ = header["process"], header["role"]
    clock = ClockMap([Exchange(*record[1:4]) for record in records if record[0] == "c"])
    life = Life(header, clock=clock)
    unfinished: list[list[Any]] = []
    for record in records[1:]:
        match record:
            case ["s", state, start, end, step]:
                life.slices.append(Slice(state, clock(start), clock(end), step))
                unfinished = []
            case ["x", track, name, start, end, args]:
                life.spans.append(Span(track, name, clock(start), clock(end), args))
            case ["i", name, at, args]:
                life.instants.append(Instant(name, clock(at), args))
            case ["n", at, values]:
                life.levels.append((clock(at), values))
            case ["t", at, totals, slices]:
                life.totals.append((clock(at), totals))
                unfinished = slices
            case ["y", at, tallies]:
                life.tallied.append((clock(at), tallies))
                life.tallies = tallies
            case ["p", at, cpu]:
                life.cpu.append((clock(at), cpu))
            case ["e", _, reason]:
                life.ended, unfinished = reason, []
    for _, state, start, end, step in unfinished:
        if end > start:
            life.slices.append(Slice(state, clock(start), clock(end), step))
    return life
