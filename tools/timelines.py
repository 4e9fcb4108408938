"""The timelines that a run's processes wrote (common.trace), read and put on one clock.

::

    RUN_DIR/trace/*.trace -> read_timelines() -> Timelines: a Life for every start of every process

Whatever can be read is: a file cut short by a kill, one that is still written, one of another version
beside sound ones, the sound records beside strange ones. What could not be is said in ``Timelines.notes``.
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
KINDS = ("h", "s", "x", "i", "n", "t", "y", "p", "c", "e")  # of records; others are a later croupier's
NUMBERED = ("step", "group", "sibling", "version")  # arguments of spans and instants that are whole numbers
MOST_KEPT = 1024  # totals, tallies and CPU times of a life, each; see Series
SLOT_NS = 2_000_000_000  # the first that is longer than nothing: records come about once a second


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
        gathered = Gathered()
        problems = [_gather(content[start:end], gathered)]
        if gathered.strange:
            problems.append(f"{gathered.strange:,} of {gathered.count:,} records of a life are not as they should be")
        try:
            lives.append(gathered.life())
        except ValueError as error:
            problems = [f"a life of {gathered.count:,} records cannot be read ({error})"]
        odd += filter(None, problems)
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


def _gather(content: bytes, into: "Gathered") -> str:
    """The records of one life up to the first that is none, and what that is; one cut short at the end is left out."""
    unpacker = msgpack.Unpacker(max_buffer_size=max(len(content), 1), strict_map_key=False, raw=False)
    unpacker.feed(content)
    try:
        for record in unpacker:
            if not isinstance(record, list) or not record or not isinstance(record[0], str):
                return f"after {into.count:,} records of a life comes something else"
            into.add(record)
    except (ValueError, TypeError, msgpack.UnpackException) as error:
        return f"after {into.count:,} records of a life: {type(error).__name__}: {error}"
    return ""


class Series:
    """What is written again and again, cumulative: the newest of every slot of time.

    Slots double whenever there are more than MOST_KEPT, so that a run of days takes no more memory than one of
    minutes, which keeps all.
    """

    def __init__(self) -> None:
        self.rows: list[tuple[int, Any]] = []  # (when, what), oldest first
        self._slot = 1  # nanoseconds

    def add(self, at: int, value: Any) -> None:
        """One more."""
        if self.rows and self.rows[-1][0] // self._slot == at // self._slot:
            self.rows.pop()
        self.rows.append((at, value))
        if len(self.rows) > MOST_KEPT:
            self._slot = max(2 * self._slot, SLOT_NS)
            self.rows = list({when // self._slot: (when, what) for when, what in self.rows}.values())


class Gathered:
    """A life's records as they are read, by its own clock; one that is not as it should be is counted, no more."""

    def __init__(self) -> None:
        self.count, self.strange = 0, 0
        self._header: Record = {}
        self._exchanges: list[Exchange] = []
        self._drawn: list[list[Any]] = []  # slices, spans, instants, levels
        self._totals, self._tallied, self._cpu = Series(), Series(), Series()
        self._unfinished: list[list[Any]] = []
        self._ended = ""

    def add(self, record: list[Any]) -> None:
        """The next one."""
        self.count += 1
        match record:
            case ["h", dict() as header]:
                self._header = header
            case ["s", str(), int(), int(), int()]:
                self._drawn.append(record)
                self._unfinished = []
            case ["x", str(), str(), int(), int(), dict() as args] if _are_sound(args):
                self._drawn.append(record)
            case ["i", str(), int(), dict() as args] if _are_sound(args):
                self._drawn.append(record)
            case ["n", int(), dict() as values] if _are_levels(values):
                self._drawn.append(record)
            case ["t", int() as at, dict() as totals, list() as slices] if _are_totals(totals, slices):
                self._totals.add(at, totals)
                self._unfinished = slices
            case ["y", int() as at, dict() as tallies] if _are_tallies(tallies):
                self._tallied.add(at, tallies)
            case ["p", int() as at, int() as cpu]:
                self._cpu.add(at, cpu)
            case ["c", int() as at, int() as offset, int() as delay]:
                self._exchanges.append(Exchange(at, offset, delay))
            case ["e", int(), str() as reason]:
                self._ended, self._unfinished = reason, []
            case [kind, *_] if kind in KINDS:
                self.strange += 1

    def life(self) -> Life:
        """All of it on the broker's clock. Raises :class:`ValueError` for a header that tells too little."""
        header = self._header
        if header.get("format") != FORMAT:
            raise ValueError(f"format {header.get('format')}, this croupier reads {FORMAT}")
        if not isinstance(header.get("process"), str) or not isinstance(header.get("role"), str):
            raise ValueError("its header does not say whose it is")
        rank = header.get("rank", 0)
        clock = ClockMap(self._exchanges)
        life = Life({**header, "rank": rank if isinstance(rank, int) else 0}, clock=clock, ended=self._ended)
        for record in self._drawn:
            match record:
                case ["s", state, start, end, step]:
                    life.slices.append(Slice(state, clock(start), clock(end), step))
                case ["x", track, name, start, end, args]:
                    life.spans.append(Span(track, name, clock(start), clock(end), args))
                case ["i", name, at, args]:
                    life.instants.append(Instant(name, clock(at), args))
                case ["n", at, values]:
                    life.levels.append((clock(at), values))
        for _, state, start, end, step in self._unfinished:
            if end > start:
                life.slices.append(Slice(state, clock(start), clock(end), step))
        life.totals = [(clock(at), totals) for at, totals in self._totals.rows]
        life.tallied = [(clock(at), tallies) for at, tallies in self._tallied.rows]
        life.cpu = [(clock(at), cpu) for at, cpu in self._cpu.rows]
        life.tallies = life.tallied[-1][1] if life.tallied else {}
        return life


def _are_sound(args: dict[Any, Any]) -> bool:
    """Whether what tools look up is of its kind."""
    groups = args.get("groups", [])
    return (
        all(isinstance(name, str) for name in args)
        and all(isinstance(args.get(name, 0), int) for name in NUMBERED)
        and isinstance(groups, list)
        and all(isinstance(group, int) for group in groups)
    )


def _are_levels(values: dict[Any, Any]) -> bool:
    return all(isinstance(name, str) and isinstance(value, int | float) for name, value in values.items())


def _are_totals(totals: dict[Any, Any], slices: list[Any]) -> bool:
    for state, total in totals.items():
        match state, total:
            case str(), [int(), int(), int()]:
                continue
        return False
    for one in slices:
        match one:
            case ["s", str(), int(), int(), int()]:
                continue
        return False
    return True


def _are_tallies(tallies: dict[Any, Any]) -> bool:
    for name, by_key in tallies.items():
        if not isinstance(name, str) or not isinstance(by_key, dict):
            return False
        for key, sums in by_key.items():
            match key, sums:
                case int(), [int(), int() | float(), int() | float(), int() | float()]:
                    continue
            return False
    return True
