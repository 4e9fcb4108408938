"""What the processes of a run did between two moments, from their timelines. Pure.

::

    judged_start() -> commits -> choose_window() -> Window
    Life + Window -> spent() -> nanoseconds by state, wall-clock and CPU

Seconds by state come from the totals that every timeline holds about once a second: they count every
change of state, also those too short to be drawn. Only from the last totals to the window's edge the drawn
slices are taken. The states of a process and the time in which it was not there add up to the window.
"""

from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from tools.timelines import Life, Slice, Timelines, is_idle

FIRST_STEP = 3  # figures begin when it is trained: queues have filled by then, and the start is over
NS = 1e-9  # seconds


@dataclass(frozen=True)
class Window:
    """The time that is judged, nanoseconds of the broker's clock."""

    start: int
    end: int
    first: int = -1  # the step whose commit it begins with; -1: it does not begin with a commit
    last: int = -1  # the step whose commit it ends with

    @property
    def ns(self) -> int:
        """How long it is."""
        return self.end - self.start


@dataclass
class Process:
    """One process of the run, all its lives together, or the mean of ``count``; seconds within the window."""

    name: str
    role: str
    host: str = ""
    states: dict[str, tuple[float, float]] = field(default_factory=dict)  # state -> wall-clock, CPU of its main thread
    absent_s: float = 0.0  # not there: not begun yet, or killed
    causes: dict[str, float] = field(default_factory=dict)  # what it waited for; they add up to idle_s
    count: int = 1

    @property
    def busy_s(self) -> float:
        """In states that are work."""
        return sum(wall for state, (wall, _) in self.states.items() if not is_idle(state))

    @property
    def idle_s(self) -> float:
        """In states that are waiting."""
        return sum(wall for state, (wall, _) in self.states.items() if is_idle(state))

    @property
    def there_s(self) -> float:
        """Of the window."""
        return self.busy_s + self.idle_s

    @property
    def cpu_s(self) -> float:
        """Of its main thread, in all states."""
        return sum(cpu for _, cpu in self.states.values())

    @property
    def cpu_of_busy(self) -> float:
        """Share of the busy time in which it had a core; 1 for a process that was never busy."""
        cpu = sum(cpu for state, (_, cpu) in self.states.items() if not is_idle(state))
        return min(1.0, cpu / self.busy_s) if self.busy_s else 1.0


def commits_of(timelines: Timelines) -> dict[int, int]:
    """When each step was committed, by the broker's marks."""
    found: dict[int, int] = {}
    for life in timelines.of("broker"):
        for instant in life.instants:
            if instant.name == "step" and instant.args.get("what") == "committed":
                found.setdefault(int(instant.args["step"]), instant.at)
    return dict(sorted(found.items()))


def judged_start(timelines: Timelines) -> tuple[Timelines, str]:
    """What lived during one start of the broker, and a word about it where there were several.

    Between two starts nobody could work, and the settings may have changed: of a run that was resumed, or whose
    broker was killed, the last start that committed two steps is judged, or else the last.
    """
    brokers = timelines.of("broker")
    if len(brokers) < 2:
        return timelines, ""
    committed = [len(commits_of(Timelines([broker]))) for broker in brokers]
    judged = which_start(committed)
    begun = brokers[judged].start
    ended = brokers[judged + 1].start if judged + 1 < len(brokers) else max(life.end for life in timelines.lives)
    lives = [life for life in timelines.lives if life.end > begun and life.start < ended]
    return Timelines(lives, timelines.notes), started_again(judged, len(brokers))


def which_start(committed: Sequence[int]) -> int:
    """The last start that committed two steps, or else the last, of ``committed`` steps of each."""
    return max((n for n, steps in enumerate(committed) if steps >= 2), default=len(committed) - 1)


def started_again(judged: int, starts: int) -> str:
    """A note for a run whose broker began several times."""
    return f"the broker started {starts} times: start {judged + 1} alone is judged, without the pauses between them"


def choose_window(timelines: Timelines, skip_s: float | None = None) -> tuple[Window | None, str]:
    """The steady part of a run and a word about it: from a commit to the last commit.

    It begins with FIRST_STEP, or with the first commit after ``skip_s`` seconds of the broker. A run of fewer than
    two commits is judged from its first to its last sign of life; None for one without any.
    """
    lives = timelines.lives
    if not lives:
        return None, ""
    born, died = min(life.start for life in timelines.of("broker") or lives), max(life.end for life in lives)
    commits = list(commits_of(timelines).items())
    if skip_s is None:
        later = commits[min(FIRST_STEP, max(0, len(commits) - 2)) :]
    else:
        later = [(step, at) for step, at in commits if at - born >= skip_s / NS]
    if len(later) >= 2:
        (first, start), (last, end) = later[0], later[-1]
        if end > start:
            return Window(start, end, first, last), ""
    start = born if skip_s is None else min(died, born + int(skip_s / NS))
    if died <= start:
        return None, ""
    return Window(start, died), "fewer than two steps were committed in it, so the whole time is judged"


def spent(life: Life, window: Window) -> dict[str, tuple[float, float]]:
    """Seconds by state, wall-clock and CPU, of a life within the window."""
    start, end = max(window.start, life.start), min(window.end, life.end)
    if end <= start:
        return {}
    course = course_of([life])
    before, after = _totals_at(life, course, start), _totals_at(life, course, end)
    found = {}
    for state, (wall, cpu) in after.items():
        w, c = before.get(state, (0.0, 0.0))
        if wall > w:
            found[state] = ((wall - w) * NS, max(0.0, cpu - c) * NS)
    return found


def _totals_at(life: Life, course: "Course", at: int) -> dict[str, tuple[float, float]]:
    """What a life's totals were at a moment: those of the record before, and what is drawn since.

    CPU time of a state is taken in proportion to its wall-clock between the records before and after; so is
    wall-clock where nothing is drawn, as in a file that was full.
    """
    index = bisect_right(life.totals, at, key=lambda record: record[0])
    t0, old = life.totals[index - 1] if index else (life.start, {})
    found = {state: (float(total[0]), float(total[1])) for state, total in old.items()}
    if index == len(life.totals) or at <= t0:
        return found
    t1, new = life.totals[index]
    drawn = Counter[str]()
    for state, since, until in course.between(t0, at):
        drawn[state] += until - since
    undrawn = drawn.pop("", 0) / (t1 - t0)
    for state, total in new.items():
        w, c = found.get(state, (0.0, 0.0))
        gained = total[0] - w
        wall = drawn[state] + undrawn * gained
        found[state] = (w + wall, c + (total[1] - c) * min(1.0, wall / gained if gained > 0 else 0.0))
    return found


def processes_of(timelines: Timelines, window: Window) -> list[Process]:
    """Every process with its seconds by state, in the order of ROLES and of their names."""
    found: dict[tuple[str, str], Process] = {}
    for life in timelines.lives:
        process = found.setdefault((life.role, life.process), Process(life.process, life.role))
        process.host = str(life.header.get("host", process.host))
        for state, (wall, cpu) in spent(life, window).items():
            w, c = process.states.get(state, (0.0, 0.0))
            process.states[state] = (w + wall, c + cpu)
    for process in found.values():
        process.absent_s = max(0.0, window.ns * NS - process.there_s)
    order = {role: number for number, role in enumerate(ROLES)}
    return sorted(found.values(), key=lambda p: (order.get(p.role, len(order)), len(p.name), p.name))


ROLES = ("learner", "actor", "replica", "broker")


# ---- slices -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Course:
    """The slices of one process over all its lives, in order; they do not overlap."""

    slices: Sequence[Slice]
    ends: Sequence[int]

    def between(self, start: int, end: int) -> Iterator[tuple[str, int, int]]:
        """``(state, start, end)`` without gaps from ``start`` to ``end``; "" where the process was not there."""
        at, index = start, bisect_right(self.ends, start)
        while at < end and index < len(self.slices):
            found = self.slices[index]
            if found.start >= end:
                break
            if found.start > at:
                yield "", at, found.start
                at = found.start
            until = min(end, found.end)
            if until > at:
                yield found.state, at, until
                at = until
            index += 1
        if at < end:
            yield "", at, end


def course_of(lives: Sequence[Life]) -> Course:
    """One process's lives, one after the other; what overlaps by a clock's error is cut."""
    slices: list[Slice] = []
    for found in sorted((s for life in lives for s in life.slices), key=lambda s: (s.start, s.end)):
        start = max(found.start, slices[-1].end) if slices else found.start
        if found.end > start:
            slices.append(found if start == found.start else Slice(found.state, start, found.end, found.step))
    return Course(slices, [s.end for s in slices])


def courses_of(timelines: Timelines, role: str) -> dict[str, Course]:
    """By process."""
    lives: dict[str, list[Life]] = {}
    for life in timelines.of(role):
        lives.setdefault(life.process, []).append(life)
    return {name: course_of(found) for name, found in lives.items()}


def apportion(parts: Counter[str], whole: int) -> Counter[str]:
    """Integers in proportion to ``parts`` that add up to ``whole`` exactly (largest remainders)."""
    total = sum(parts.values())
    if total == 0:
        return Counter()
    shares = {name: divmod(part * whole, total) for name, part in parts.items()}
    found = Counter({name: share for name, (share, _) in shares.items()})
    left = whole - sum(found.values())
    for name in sorted(shares, key=lambda n: (-shares[n][1], n))[:left]:
        found[name] += 1
    return +found
