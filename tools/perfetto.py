"""A run's timelines as one Chrome trace, which Perfetto's page opens (ui.perfetto.dev).

::

    Timelines -> a process for each of the run's, a track for its main thread, lanes for what overlaps
              -> counters, marks, flows (tools.flows) -> {"traceEvents": [...]}

The format: "Trace Event Format" (Chromium, Nduca, 2016). Times are microseconds since the run's first moment.
Slices of a track never overlap, but a smaller one may lie within a larger one.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from common.trace import IDLE, MILESTONES, STATES
from tools.run_files import Record
from tools.timelines import Instant, Life, Span, Timelines, is_idle

Event = dict[str, Any]
ROLES = ("broker", "learner", "replica", "actor")  # from top to bottom
MAIN = 1  # the thread track of a process's main thread
TRACKS = ("steps", "groups", "rollouts", "weights", "publish")  # below it
LANES = 1000  # between two tracks' numbers
GREY = "grey"  # of what idles, in viewers that heed Chromium's names of colours; Perfetto's goes by the slice's name

# What a step waits for between two of its milestones.
STAGES = {
    ("ready", "assembled"): "waits for the version that scores it",
    ("assembled", "scored"): "is scored",
    ("scored", "decided"): "is thinned",
    ("decided", "served"): "waits for the learner",
    ("served", "committed"): "is trained",
}


@dataclass(frozen=True, slots=True)
class Place:
    """Where a slice was drawn; nanoseconds of the broker's clock."""

    pid: int
    tid: int
    start: int
    end: int


@dataclass
class Drawing:
    """Events as they are drawn. ``base``: the run's first moment, nanoseconds of the broker's clock; Perfetto knows no
    time before 0."""

    base: int
    events: list[Event] = field(default_factory=list)
    pids: dict[str, int] = field(default_factory=dict)  # process -> its number here
    flows: int = 0

    def us(self, at: int) -> float:
        """Microseconds since the base."""
        return (at - self.base) / 1000

    def process(self, name: str, label: str = "") -> int:
        """The number of a process; the first one drawn is the topmost."""
        if name not in self.pids:
            pid = self.pids[name] = len(self.pids) + 1
            self._meta(pid, 0, "process_name", name=name)
            self._meta(pid, 0, "process_sort_index", sort_index=pid)
            if label:
                self._meta(pid, 0, "process_labels", labels=label)
        return self.pids[name]

    def thread(self, pid: int, tid: int, name: str) -> None:
        """Name a track; they are sorted by ``tid``."""
        self._meta(pid, tid, "thread_name", name=name)
        self._meta(pid, tid, "thread_sort_index", sort_index=tid)

    def _meta(self, pid: int, tid: int, what: str, **args: Any) -> None:
        self.events.append({"ph": "M", "pid": pid, "tid": tid, "name": what, "args": args})

    def slice(self, place: Place, name: str, category: str, args: Record, colour: str = "") -> None:
        """Something that lasted."""
        event: Event = {
            "ph": "X", "pid": place.pid, "tid": place.tid, "name": name, "cat": category, "ts": self.us(place.start),
            "dur": (place.end - place.start) / 1000,
        }  # fmt: skip
        if colour:
            event["cname"] = colour
        if args:
            event["args"] = args
        self.events.append(event)

    def mark(self, pid: int, tid: int, at: int, name: str, args: Record) -> None:
        """A moment."""
        self.events.append(
            {"ph": "i", "s": "t", "pid": pid, "tid": tid, "ts": self.us(at), "name": name, "cat": "mark", "args": args}
        )

    def level(self, pid: int, at: int, name: str, value: float) -> None:
        """A point of a curve. Perfetto calls it by both names, with a space between."""
        self.events.append({"ph": "C", "pid": pid, "ts": self.us(at), "name": name, "args": {"": value}})

    def flow(self) -> int:
        """The number of a new one; Perfetto takes no words."""
        self.flows += 1
        return self.flows

    def arrow(self, phase: str, number: int, place: Place, at: int, name: str, category: str) -> None:
        """A flow begins (s), goes on (t) or ends (f) within the slice at ``place``."""
        event: Event = {"ph": phase, "pid": place.pid, "tid": place.tid, "ts": self.us(at), "id": number, "name": name}
        event["cat"] = category
        if phase == "f":
            event["bp"] = "e"  # the slice around it, not the next one
        self.events.append(event)


@dataclass
class Drawn:
    """Where that was drawn which flows pass through."""

    rollouts: dict[tuple[int, int], Place] = field(default_factory=dict)  # (group, sibling)
    groups: dict[int, Place] = field(default_factory=dict)  # group -> granted until complete
    queued: dict[int, tuple[Place, int]] = field(default_factory=dict)  # group -> complete until assembled, its step
    stages: dict[tuple[int, str], Place] = field(default_factory=dict)  # (step, what it does then)
    scores: list[Place] = field(default_factory=list)  # of replicas
    updates: dict[int, dict[str, Place]] = field(default_factory=dict)  # step -> state -> the learner's rank 0


@dataclass(frozen=True)
class Window:
    """What is drawn: everything that touches these moments, and followed groups of these steps."""

    start: int
    end: int
    groups: frozenset[int] = frozenset()

    def has(self, start: int, end: int, group: int = -1) -> bool:
        """Whether it is to be drawn."""
        return (start <= self.end and end >= self.start) or group in self.groups


def draw(timelines: Timelines, window: Window) -> tuple[Drawing, Drawn]:
    """Every process, from the broker down."""
    by_process: dict[str, list[Life]] = defaultdict(list)
    for life in timelines.lives:
        by_process[life.process].append(life)
    drawing, drawn = Drawing(min(life.start for life in timelines.lives)), Drawn()
    for name, lives in sorted(by_process.items(), key=lambda item: _order(item[1][0])):
        header = lives[-1].header
        pid = drawing.process(name, f"{header.get('host', '?')} pid {header.get('pid', '?')}")
        _draw_main(drawing, drawn, pid, lives, window)
        _draw_spans(drawing, drawn, pid, lives, window)
        if lives[0].role == "broker":
            _draw_steps(drawing, drawn, pid, [one for life in lives for one in life.instants], window)
        for life in lives:
            for at, values in life.levels:
                for level, value in values.items() if window.has(at, at) else ():
                    drawing.level(pid, at, level, value)
    return drawing, drawn


def _order(life: Life) -> tuple[Any, ...]:
    """Brokers, learner ranks, replicas, actors; 10 after 9."""
    role = ROLES.index(life.role) if life.role in ROLES else len(ROLES)
    parts = re.split(r"(\d+)", life.process)
    return role, [int(part) if part.isdigit() else part for part in parts]


def _draw_main(drawing: Drawing, drawn: Drawn, pid: int, lives: Sequence[Life], window: Window) -> None:
    drawing.thread(pid, MAIN, "main thread")
    free = 0  # from when on: lives of one process follow each other, whatever their clocks say
    for life in lives:
        if window.has(life.start, life.start):
            facts = {key: life.header.get(key) for key in ("host", "pid", "rank", "wire")}
            drawing.mark(pid, MAIN, max(life.start, free), "begins", facts)
        words = STATES.get(life.role, {})
        for one in life.slices:
            start = max(one.start, free)
            free = max(free, one.end)
            if one.end <= start or not window.has(start, one.end):
                continue
            place, idle = Place(pid, MAIN, start, one.end), is_idle(one.state)
            name = f"idle: {one.state.removeprefix(IDLE)}" if idle else one.state
            args: Record = {"what": words[one.state]} if one.state in words else {}
            step: Record = {"step": one.step} if one.step >= 0 else {}
            drawing.slice(place, name, "idle" if idle else "work", args | step, GREY if idle else "")
            if life.role == "replica" and one.state == "score":
                drawn.scores.append(place)
            elif life.role == "learner" and life.header.get("rank") == 0 and one.step >= 0:
                drawn.updates.setdefault(one.step, {}).setdefault(one.state, place)
        if life.ended and window.has(life.end, life.end):
            drawing.mark(pid, MAIN, max(life.end, free), f"ends: {life.ended}", {})


def lanes(spans: Iterable[Span]) -> list[list[Span]]:
    """As few rows as hold ``spans`` without one overlapping another."""
    rows: list[list[Span]] = []
    for span in sorted(spans, key=lambda s: (s.start, s.end)):
        row = next((row for row in rows if row[-1].end <= span.start), None)
        if row is None:
            rows.append([span])
        else:
            row.append(span)
    return rows


def _draw_lanes(drawing: Drawing, pid: int, track: str, spans: Iterable[Span]) -> Iterator[tuple[Place, Span]]:
    """Lanes of one track, below the main thread in the order of TRACKS; yields where each span is, to be drawn."""
    first = LANES * (1 + TRACKS.index(track) if track in TRACKS else 1 + len(TRACKS))
    rows = lanes(spans)
    for number, row in enumerate(rows):
        drawing.thread(pid, first + number, track if len(rows) == 1 else f"{track} {number + 1}")
        for span in row:
            yield Place(pid, first + number, span.start, span.end), span


def _draw_spans(drawing: Drawing, drawn: Drawn, pid: int, lives: Sequence[Life], window: Window) -> None:
    tracks: dict[str, list[Span]] = defaultdict(list)
    for life in lives:
        for span in life.spans:
            if span.end >= span.start and window.has(span.start, span.end, span.args.get("group", -1)):
                tracks[span.track].append(span)
    for track in sorted(tracks, key=lambda t: (t not in TRACKS, t)):
        for place, span in _draw_lanes(drawing, pid, track, tracks[track]):
            drawing.slice(place, _title(span), track, span.args)
            group = span.args.get("group", -1)
            match span.track, span.name:
                case "rollouts", "rollout":
                    drawn.rollouts[group, span.args.get("sibling", 0)] = place
                case "groups", "group":
                    drawn.groups[group] = place
                case "groups", "queued":
                    drawn.queued[group] = place, span.args.get("step", -1)


def _title(span: Span) -> str:
    """Its name, and which of its kind it is."""
    args = span.args
    if "sibling" in args:
        return f"{span.name} {args.get('group')}.{args['sibling']}"
    for key, before in (("group", ""), ("version", "v")):
        if key in args:
            return f"{span.name} {before}{args[key]}"
    return span.name


# ---- steps ------------------------------------------------------------------------------------------


def milestones(instants: Iterable[Instant]) -> dict[int, dict[str, int]]:
    """``step -> milestone -> when``; what came again after a second thinning counts, up to when it was served."""
    found: dict[int, dict[str, int]] = defaultdict(dict)
    for one in instants:
        step, what = one.args.get("step"), one.args.get("what")
        if one.name != "step" or not isinstance(step, int) or what not in MILESTONES:
            continue
        if what not in found[step] or one.args.get("again"):
            found[step][what] = one.at
    return dict(found)


def _draw_steps(drawing: Drawing, drawn: Drawn, pid: int, instants: Sequence[Instant], window: Window) -> None:
    """Each step's life in the broker, its stages within it."""
    marks = milestones(instants)
    spans = []
    for step, moments in marks.items():
        known = [moments[what] for what in MILESTONES if what in moments and what != "asked"]
        if known and window.has(min(known), max(known)):
            spans.append(Span("steps", "step", min(known), max(known), {"step": step}))
    for place, span in _draw_lanes(drawing, pid, "steps", spans):
        step = span.args["step"]
        drawing.slice(place, f"step {step}", "steps", span.args)
        if "asked" in marks[step]:
            drawing.mark(pid, MAIN, marks[step]["asked"], f"step {step} is asked for", span.args)
        for stage, part in _stages(marks[step]):
            inner = Place(place.pid, place.tid, part.start, part.end)
            drawing.slice(inner, stage, "steps", span.args)
            drawn.stages[step, stage] = inner


def _stages(moments: dict[str, int]) -> Iterator[tuple[str, Place]]:
    """What a step did between those of its milestones that are known; they never overlap."""
    free = 0
    for (before, after), stage in STAGES.items():
        if before in moments and after in moments:
            start, end = max(moments[before], free), moments[after]
            if end > start:
                yield stage, Place(0, 0, start, end)
                free = end
