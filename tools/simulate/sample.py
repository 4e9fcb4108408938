"""What a run tells of its costs: seconds by state, tallies and counts within its steady window.

::

    RUN_DIR -> read_run -> judged_start -> choose_window -> Sample
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from common.config import RunConfig
from common.errors import DataError
from tools.checked import checked
from tools.profile.spent import NS, Window, choose_window, course_of, judged_start, processes_of
from tools.run_files import Record
from tools.runs import Run, read_run
from tools.timelines import Life, is_idle
from tools.watch.sound import number

WAITING = ("journal", "send")  # states in which a thread mostly waits for others of its process
SIZES = ("tokens", "trajectories", "length_mean")  # of a step's line in metrics.jsonl
LEAST_STEPS = 4  # within the window

TALLIED_BY = {"score": "replica", "admit": "broker"}  # who counts what; the rest are actors'

Tally = dict[int, list[float]]  # key -> times, wall, cpu, amount


@dataclass
class Sample:
    """One run's steady window."""

    run: Run
    config: RunConfig
    window: Window
    steps: int  # trained in it
    tokens: float  # of a step, prompts included
    sequences: float  # of a step
    sampled: float  # tokens of a completion
    states: dict[str, Counter[str]] = field(default_factory=dict)  # role -> state -> CPU seconds of main threads
    walls: dict[str, Counter[str]] = field(default_factory=dict)  # the same, seconds that passed
    threads: Counter[str] = field(default_factory=Counter)  # role -> CPU seconds of other threads
    tallies: dict[str, Tally] = field(default_factory=dict)
    shared: bool = True  # one machine: costs are CPU seconds; otherwise they are seconds that passed

    @property
    def trained(self) -> list[Record]:
        """The steps of the window, as metrics.jsonl has them."""
        return [step for step in self.run.steps if self.window.first < step["step"] <= self.window.last]

    def timed(self, role: str) -> bool:
        """Whether the time that passed is a role's cost; of one that sleeps (slowdown, pace_s) it never is."""
        sleeping = [
            name
            for name, part in (("actor", self.config.actor), ("learner", self.config.learner))
            if part.slowdown > 1 or part.pace_s > 0
        ]
        return not self.shared and role not in sleeping

    def cost(self, role: str, *states: str) -> float:
        """Seconds of a role in some states, as setups count them."""
        return self.wall(role, *states) if self.timed(role) else self.cpu(role, *states)

    def tally(self, name: str) -> Tally:
        """Times, cost in nanoseconds and amount by key; the cost as setups count it."""
        column = 1 if self.timed(TALLIED_BY.get(name, "actor")) else 2
        return {key: [sums[0], sums[column], sums[3]] for key, sums in sorted(self.tallies.get(name, {}).items())}

    def wall(self, role: str, *states: str) -> float:
        """Seconds of a role in some states."""
        return float(sum(self.walls.get(role, Counter())[state] for state in states))

    def cpu(self, role: str, *states: str) -> float:
        """CPU seconds of a role in some states."""
        return float(sum(self.states.get(role, Counter())[state] for state in states))


def read_sample(run_dir: Path) -> Sample:
    """What a run tells. Raises :class:`DataError` with what is missing."""
    run = checked(read_run(run_dir))
    run.timelines, again = judged_start(run.timelines)
    run.notes += [again] if again else []
    window, _ = choose_window(run.timelines)
    if run.config is None:
        raise DataError(f"{run_dir}: no config.yaml that can be read, so what was run is not known")
    if window is None or window.last - window.first < LEAST_STEPS or window.first < 0:
        raise DataError(
            f"{run_dir}: its timelines tell of fewer than {LEAST_STEPS} steps after the first ones; let it run longer, "
            "with trace.spans=true"
        )
    found = Sample(run, run.config, window, window.last - window.first, 0.0, 0.0, 0.0)
    told = [[number(step.get(key)) for key in SIZES] for step in found.trained]
    sizes = [sound for size in told if len(sound := [one for one in size if one is not None and one > 0]) == len(SIZES)]
    if not sizes:
        raise DataError(
            f"{run_dir}: metrics.jsonl tells {', '.join(SIZES)} of none of the steps {window.first} to {window.last}"
        )
    found.tokens, found.sequences, found.sampled = np.mean(sizes, axis=0).tolist()
    processes = processes_of(run.timelines, window)
    missing = [role for role in ("learner", "actor") if not any(p.role == role and p.busy_s for p in processes)]
    if missing:
        raise DataError(
            f"{run_dir}: no timeline of {' and '.join(missing)} that can be read: what they cost is not known"
        )
    for process in processes:
        into = found.states.setdefault(process.role, Counter())
        into.update({state: cpu for state, (_, cpu) in process.states.items()})
        found.walls.setdefault(process.role, Counter()).update({s: wall for s, (wall, _) in process.states.items()})
    for life in run.timelines.lives:
        _add_tallies(found.tallies, life, window)
        _add_threads(found, life)
    return found


def _between(records: Sequence[tuple[int, Any]], window: Window) -> tuple[Any, Any] | None:
    """The last record before the window (None: there is none) and the last within it."""
    inside = [value for at, value in records if window.start < at <= window.end]
    before = [value for at, value in records if at <= window.start]
    return (before[-1] if before else None, inside[-1]) if inside else None


def _add_tallies(into: dict[str, Tally], life: Life, window: Window) -> None:
    """The tallies of a life within the window, to the nearest record."""
    found = _between(life.tallied, window)
    if found is None:
        return
    before, after = found
    for name, by_key in after.items():
        old = (before or {}).get(name, {})
        for key, sums in by_key.items():
            gained = [new - was for new, was in zip(sums, old.get(key, [0, 0, 0, 0]), strict=True)]
            if gained[0] > 0:
                there = into.setdefault(name, {}).setdefault(key, [0, 0, 0, 0])
                there[:] = [a + b for a, b in zip(there, gained, strict=True)]


def _add_threads(into: Sample, life: Life) -> None:
    if life.role == "learner" and life.header.get("rank", 0) != 0:
        return  # the first rank sends weights; what other ranks' threads do is the mesh's
    inside = [(at, cpu) for at, cpu in life.cpu if into.window.start <= at <= into.window.end]
    if len(inside) < 2:
        return
    (start, first), (end, last) = inside[0], inside[-1]
    totals = life.seconds(start, end)
    main = sum(cpu for _, cpu in totals.values())
    scale = into.window.ns / (end - start)
    into.threads[life.role] += max(0.0, (last - first) * NS - main) * scale  # type: ignore[assignment]  # seconds


def wanting(sample: Sample) -> Counter[int]:
    """How many main threads wanted to run, and for how many seconds; a slowed process's sleeps count as wanting."""
    window, changes = sample.window, list[tuple[int, int]]()
    for life in sample.run.timelines.lives:
        for state, start, end in course_of([life]).between(window.start, window.end):
            if state and not is_idle(state) and state not in WAITING:
                changes += [(start, 1), (end, -1)]
    found, at, running = Counter[int](), window.start, 0
    for when, change in sorted(changes):
        found[running] += (when - at) * NS  # type: ignore[assignment]  # seconds
        at, running = when, running + change
    return found
