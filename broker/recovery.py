"""A broker that comes back: the newest snapshot of the journal, then every event after it."""

from dataclasses import dataclass, field, replace
from typing import Any

from broker.chunks import Event
from broker.fixed import changed
from broker.journal import Journal
from broker.pipeline import Pipeline
from broker.recorder import CHECKS, apply, difference
from broker.trajectories import Trajectory, unpack_all
from common import wire
from common.codec import decode
from common.errors import JournalError


@dataclass
class Recovered:
    """What a broker that comes back needs beside its pipeline."""

    events: int = 0
    commits: list[tuple[dict[str, Any], dict[str, float]]] = field(default_factory=list)  # receipt, learner's metrics
    service: dict[str, Any] = field(default_factory=dict)  # as the service gave it to the snapshot
    notes: list[tuple[str, dict[str, Any]]] = field(default_factory=list)  # the service's own events since
    differences: list[str] = field(default_factory=list)
    moves: list[dict[str, Any]] = field(default_factory=list)  # of the staleness budget: heads of its events


def check_settings(now: dict[str, Any], journal: Journal) -> None:
    """Raise :class:`JournalError` if ``journal`` was written under other fixed settings than ``now``."""
    last = journal.latest("snapshot")
    last = journal.latest("begin") if last is None else last
    if last is not None and (odd := changed(journal.event(last).head["settings"], now)):
        raise JournalError(f"{journal.directory}: {odd}")


def steps_assembled(journal: Journal) -> int:
    """The step that ``journal`` would have assembled next; recovers nothing."""
    start, began = journal.latest("snapshot"), journal.latest("start_at")
    step, first = 0, 0
    if start is not None:
        step, first = int(journal.event(start).head["pipeline"]["ledger"]["next_step"]), start
    if began is not None and began >= first:
        step = step or int(journal.event(began).head["step"])
    return step + journal.count("assemble", first)


def load_snapshot(pipeline: Pipeline, journal: Journal, event: Event) -> None:
    """Bring ``pipeline`` to the state of a ``snapshot`` event."""
    trajectories: dict[int, list[Trajectory]] = {}

    def load(seq: int, index: int, prompt: int) -> Trajectory:
        if seq not in trajectories:
            stored = journal.event(seq)
            trajectories[seq] = unpack_all(decode(stored.frames, wire.TO_BROKER), stored.head["actor"], seq)
        return replace(trajectories[seq][index], prompt=prompt)

    def scores(seq: int) -> wire.ScoreResult:
        found: wire.ScoreResult = decode(journal.event(seq).frames, wire.TO_BROKER)
        return found

    pipeline.restore(event.head["pipeline"], load, scores)


def recover(pipeline: Pipeline, journal: Journal) -> Recovered:
    """Bring ``pipeline`` to where the journal ends."""
    check_settings(pipeline.fixed_settings, journal)
    found = Recovered()
    start = journal.latest("snapshot")
    if start is not None:
        event = journal.event(start)
        load_snapshot(pipeline, journal, event)
        found.service = event.head["service"]
    for event in journal.events(0 if start is None else start + 1):
        found.events += 1
        result = apply(pipeline, event)
        if event.kind == "commit" and result is not None:
            found.commits.append((result, event.head["metrics"]))
        elif event.kind == "budget":
            found.moves.append(event.head)
        elif event.kind == "note":
            found.notes.append((event.head["what"], event.head["values"]))
        elif event.kind in CHECKS and (odd := difference(pipeline, event)):
            found.differences.append(odd)
    return found
