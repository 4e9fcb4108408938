"""The pipeline with a memory: everything that changes it is written down and can be applied again.

::

    Recorder.admit(...) -> sift -> journal.append("admit", ...) -> pipeline.take(...)
    recover(pipeline, journal) -> newest snapshot, then apply(event) for every event after it (broker.recovery)

The pipeline is a deterministic function of these events, so a broker that was killed comes back
exactly where it was, and ``tools.replay`` can check every decision. Digests of what was decided
are events too; they change nothing and are compared when the events are applied again.
"""

import logging
from collections.abc import Callable, Iterable, Sequence
from itertools import zip_longest
from typing import Any

import numpy as np
import xxhash

from broker.chunks import Event
from broker.journal import Journal
from broker.pipeline import Pipeline
from broker.scoring import Asked
from broker.sifting import sift
from broker.trail import Trail
from common import wire
from common.codec import decode, encode, frames_of
from common.errors import JournalError, ProtocolError
from common.trace import Tracer, power_of_two, silent

SNAPSHOT_BYTES = 64 << 20  # of journal between two snapshots
SNAPSHOT_STEPS = 64
CHECKS = ("decided", "served")
NUMBER_BITS = 32  # of groups and of requests, each, that one start of a broker without a journal may number

log = logging.getLogger("broker.recorder")


def digest(*arrays: Any) -> str:
    """XXH3-128 over the bytes of ``arrays``, in hex: guards against faults, not against forgers."""
    found = xxhash.xxh3_128()
    for array in arrays:
        found.update(np.ascontiguousarray(array).data)
    return found.hexdigest()


def decision_digests(pipeline: Pipeline, step: int) -> dict[str, Any]:
    """What was decided for ``step``, a digest a part: a difference can be named."""
    entry = pipeline.step(step)
    if entry is None:
        return {"step": step, "existence": "not decided"}
    batch, decision = entry.batch, entry.decision
    frozen = [array for array in (entry.frozen.log_reference, entry.frozen.log_teacher) if array is not None]
    return {
        "step": step,
        "grouping": digest(batch.groups, batch.siblings, batch.cu_seqlens, batch.token_ids, batch.trainable),
        "advantages": digest(batch.rewards, batch.advantages, batch.spans, batch.span_advantages),
        "threshold": float(entry.log_threshold).hex(),
        "coins": digest(decision.accept),
        "log_m": digest(decision.log_m, decision.log_p),
        **({"frozen": digest(*frozen)} if frozen else {}),
    }


def shard_digests(shards: Iterable[wire.Shard]) -> list[str]:
    """Of every byte that each rank is sent."""
    return [digest(*(np.frombuffer(f, np.uint8) for f in encode(shard))) for shard in shards]


def apply(pipeline: Pipeline, event: Event) -> Any:
    """Do again what ``event`` did; returns what the pipeline returned. Checks change nothing."""
    head = event.head
    match event.kind:
        case "begin":
            pipeline.ledger.set_budget(head["budget"])  # whatever the configuration says now
            first = head["generation"] << NUMBER_BITS
            return pipeline.begin(first, first if head.get("requests_apart") else 0)  # 0 in older journals
        case "start_at":
            return pipeline.start_at(head["step"])
        case "questions":
            return pipeline.questions(head["sizes"])
        case "budget":
            return pipeline.set_budget(head["value"])
        case "grant":
            return pipeline.promise(head["actor"], head["count"], head["version"])  # whatever the settings are now
        case "admit":
            message = decode(event.frames, wire.TO_BROKER)
            return pipeline.admit(message, head["actor"], head["newest"], event.seq)
        case "refused":
            return pipeline.refuse(head["group"], head["reason"])
        case "failed":
            return pipeline.failed(head["group"], head["sibling"], head["reason"])
        case "actor_lost":
            return pipeline.actor_lost(head["actor"])
        case "assemble":
            return _assemble_again(pipeline, head["version"])
        case "rethin":
            return pipeline.rethin(head["step"], head["version"])
        case "scored":
            return pipeline.scored(decode(event.frames, wire.TO_BROKER), event.seq)
        case "commit":
            return pipeline.commit(head["step"])
        case "checkpointed":
            return pipeline.checkpointed(head["step"])
        case _:
            return None


def _assemble_again(pipeline: Pipeline, version: int) -> Any:
    step = pipeline.ledger.next_step
    request = pipeline.assemble(version, due=True)
    if pipeline.ledger.next_step == step:
        raise JournalError(
            f"step {step} was assembled when the journal was written and cannot be now: {pipeline.waiting_for()}; "
            "run.steps was lowered (set it back), or the program was changed"
        )
    return request


def difference(pipeline: Pipeline, event: Event) -> str:
    """What a check event finds different now, in words; "" if nothing is."""
    if event.kind == "decided":
        now = decision_digests(pipeline, event.head["step"])
        parts = [k for k in now if now[k] != event.head.get(k)]
        return f"step {event.head['step']}: {', '.join(parts)}" if parts else ""
    if event.kind == "served":
        step, world = event.head["step"], event.head["world"]
        try:
            shards = [s for r in range(world) if (s := pipeline.shard(step, r, world)) is not None]
        except ProtocolError as error:  # less is kept than was: broker.retain_mb or .journal_mb is another
            return f"step {step}: its shards cannot be made again ({error})"
        odd = [r for r, (a, b) in enumerate(zip_longest(shard_digests(shards), event.head["shards"])) if a != b]
        return f"step {step}: shards of ranks {odd}" if odd else ""
    return ""


class Recorder:
    """The pipeline's changing methods, each written to the journal first (or at once after)."""

    def __init__(
        self,
        pipeline: Pipeline,
        journal: Journal | None,
        service_state: Callable[[], dict[str, Any]],
        tracer: Tracer | None = None,
    ) -> None:
        self.pipeline, self.journal = pipeline, journal
        self.tracer = tracer or silent("broker", "broker")
        self.trail = Trail(self.tracer, pipeline)
        self._service_state = service_state
        self._snapshot_at = (journal.used_bytes if journal else 0, pipeline.committed_step)
        self._snapshot_seq = -1  # of one that is not on disk yet: then its own bytes are known
        self._snapshot_bytes = 0  # of the last, and of what was written beside it
        self._pruned_at = -1  # the snapshot of the last pruning
        self._left: int | None = 0  # bytes that the last pruning left; None until that is known
        self._looked_at = (-1, 0)  # steps committed and groups given up at the last one

    @property
    def last(self) -> int:
        """The number of the newest event."""
        return self.journal.last if self.journal else -1

    @property
    def _next(self) -> int:
        """The number that the next event will have; -1 without a journal."""
        return self.journal.last + 1 if self.journal else -1

    @property
    def durable(self) -> int:
        """The number up to which everything is on disk."""
        return self.journal.durable if self.journal else -1

    def flush(self) -> None:
        """Let the journal commit what was written; raises what stopped it."""
        if self.journal is not None:
            self.journal.check()
            self.journal.flush()

    def _write(self, kind: str, head: dict[str, Any], message: Any = None) -> int:
        if self.journal is None:
            return -1
        return self.journal.append(kind, head, frames_of(message) if message is not None else ())

    def note(self, what: str, values: dict[str, Any]) -> None:
        """Something that the service must find again and the pipeline does not know."""
        self._write("note", {"what": what, "values": values})

    def begin(self, generation: int) -> None:
        """See :meth:`Pipeline.begin`; the first event of every journal."""
        head = {
            "generation": generation, "budget": self.pipeline.ledger.budget, "requests_apart": True,
            "settings": self.pipeline.fixed_settings,
        }  # fmt: skip
        self._write("begin", head)
        self.pipeline.begin(generation << NUMBER_BITS, generation << NUMBER_BITS)

    def questions(self, sizes: Sequence[int]) -> None:
        """See :meth:`Pipeline.questions`."""
        self._write("questions", {"sizes": list(sizes)})
        self.pipeline.questions(sizes)

    def start_at(self, step: int) -> None:
        """See :meth:`Pipeline.start_at`."""
        self._write("start_at", {"step": step})
        self.pipeline.start_at(step)

    def set_budget(self, value: int, reason: str, **figures: Any) -> dict[str, Any]:
        """See :meth:`Pipeline.set_budget`; returns the move as it was written down, before it took effect."""
        move = {
            "move": self.pipeline.counts["budget_moves"], "step": self.pipeline.committed_step,
            "old": self.pipeline.ledger.budget, "value": value, "reason": reason, **figures,
        }  # fmt: skip
        self._write("budget", move)
        self.pipeline.set_budget(value)
        return move

    def room(self) -> int:
        """Groups that may still be promised before the journal is full, at their largest."""
        if self.journal is None:
            return 1 << 30
        free = self.journal.limit_bytes - self.journal.used_bytes
        return self.pipeline.groups_within(free, self.pipeline.config.bytes_journaled)

    def grant(self, actor: str, count: int, version: int) -> wire.Grant | None:
        """See :meth:`Pipeline.grant`; written down if something was granted. A full journal grants nothing."""
        granted = self.pipeline.grant(actor, min(count, self.room()), version)
        if granted is not None:
            self._write("grant", {"actor": actor, "count": len(granted.groups), "version": version})
            self.trail.granted(granted.groups.tolist(), actor)
        return granted

    def admit(self, message: wire.Trajectories, actor: str, newest_version: int) -> wire.Ack:
        """See :meth:`Pipeline.admit`; what is not awaited is answered and not written down."""
        count = len(message.groups)
        with self.tracer.measured("admit", power_of_two(count), count):
            ack = self._admit(message, actor, newest_version)
        if self.tracer.on:
            self.trail.settled(message.groups.tolist())
        return ack

    def _admit(self, message: wire.Trajectories, actor: str, newest_version: int) -> wire.Ack:
        sifted, admitted = sift(message, actor, self.pipeline), None
        if sifted.awaited:
            whole = len(sifted.awaited) == len(message.groups)
            part = message if whole else message.part(sifted.awaited)
            arrived = self.pipeline.prepare(part, actor, newest_version, self._next)
            self._write("admit", {"actor": actor, "newest": newest_version}, part)
            admitted = self.pipeline.take(arrived, actor)
        for group, reason in sifted.unfit.items():
            self._write("refused", {"group": group, "reason": reason})
            self.pipeline.refuse(group, reason)
        return sifted.ack(message, admitted)

    def failed(self, group: int, sibling: int, reason: str) -> None:
        """See :meth:`Pipeline.failed`; nothing is written of what is not awaited."""
        if not self.pipeline.book.awaits(group, sibling):
            return
        self._write("failed", {"group": group, "sibling": sibling, "reason": reason})
        self.pipeline.failed(group, sibling, reason)
        self.trail.settled([group])

    def actor_lost(self, actor: str) -> int:
        """See :meth:`Pipeline.actor_lost`."""
        owed = self.pipeline.book.of_actor(actor)
        if not owed:
            return 0
        self._write("actor_lost", {"actor": actor})
        given_up = self.pipeline.actor_lost(actor)
        self.trail.settled(owed)
        return given_up

    def assemble(self, min_version: int) -> wire.ScoreRequest | None:
        """See :meth:`Pipeline.assemble`; written down if a step was assembled."""
        step, began, cpu = self.pipeline.ledger.next_step, self.tracer.now(), self.tracer.cpu()
        request = self.pipeline.assemble(min_version)
        if self.pipeline.ledger.next_step > step:
            self._write("assemble", {"version": min_version})
            self.trail.assembled(self.pipeline.steps.batch(step), began, cpu)
            if self.pipeline.scoring_step is None:
                self._decided(step)
                self.trail.decided(step, self.tracer.now())
        return request

    def rethin(self, step: int, min_version: int) -> wire.ScoreRequest | None:
        """See :meth:`Pipeline.rethin`; written down if the step is to be thinned again."""
        request = self.pipeline.rethin(step, min_version)
        if request is not None:
            self._write("rethin", {"step": step, "version": min_version})
        return request

    def scored(self, result: wire.ScoreResult) -> Asked | None:
        """See :meth:`Pipeline.scored`; an answer that is refused or late is not written down."""
        seq = self._next
        scoring, began, cpu = self.pipeline.steps.scoring, self.tracer.now(), self.tracer.cpu()
        with self.tracer.within("thin"):
            asked = self.pipeline.scored(result, seq)
            if asked is not None:
                self._write("scored", {"scorer": asked.scorer}, result)
            if scoring is not None and self.pipeline.scoring_step is None:
                self._decided(scoring.batch.step)
        if asked is not None and scoring is not None:
            self.trail.scored(scoring.batch, began, cpu, scoring.again)
        return asked

    def _decided(self, step: int) -> None:
        if self.journal is not None:
            self._write("decided", decision_digests(self.pipeline, step))

    def shard(self, step: int, rank: int, world: int) -> wire.Shard | None:
        """See :meth:`Pipeline.shard`; the digests of a step's shards are written down when they are made."""
        if self.pipeline.has_shards(step, world):
            return self.pipeline.shard(step, rank, world)
        began, cpu = self.tracer.now(), self.tracer.cpu()
        shard = self.pipeline.shard(step, rank, world)
        if shard is not None and self.journal is not None:
            shards = [s for r in range(world) if (s := self.pipeline.shard(step, r, world)) is not None]
            self._write("served", {"step": step, "world": world, "shards": shard_digests(shards)})
        if shard is not None:
            self.trail.packed(self.pipeline.steps.batch(step), began, cpu)
        return shard

    def commit(self, step: int, metrics: dict[str, float]) -> dict[str, Any] | None:
        """See :meth:`Pipeline.commit`."""
        with self.tracer.within("commit", step):
            self._write("commit", {"step": step, "metrics": metrics})
            receipt = self.pipeline.commit(step)
        self.trail.mark(step, "committed")
        return receipt

    def checkpointed(self, step: int) -> None:
        """See :meth:`Pipeline.checkpointed`."""
        self._write("checkpointed", {"step": step})
        self.pipeline.checkpointed(step)
        self._left = 0  # cause enough to look again

    def make_room(self) -> None:
        """Delete what nobody will ask for again, once the journal is half full and there is cause to look.

        Of use behind a checkpoint, and where nothing can be granted for want of room; cheap otherwise.
        """
        journal = self.journal
        if journal is None or journal.used_bytes < journal.limit_bytes / 2:
            return
        if journal.is_deleting or journal.durable < self._pruned_at:
            return
        if self._left is None:
            self._left = journal.used_bytes
        done = (self.pipeline.committed_step, self.pipeline.counts["groups_given_up"])
        is_stuck = done != self._looked_at and not self.room()
        if journal.used_bytes - self._left < journal.limit_bytes / 8 and not is_stuck:
            return
        self._pruned_at = self.snapshot()
        journal.prune(self.pipeline.sources(), self._pruned_at)
        self._left, self._looked_at = None, done

    def snapshot_if_due(self) -> None:
        """Write the whole state if much has happened since it was written last."""
        if self.journal is None:
            return
        used, step = self._snapshot_at
        if self._snapshot_seq >= 0:
            if self.journal.durable < self._snapshot_seq:
                return
            self._snapshot_bytes, used = max(0, self.journal.used_bytes - used), self.journal.used_bytes
            self._snapshot_at, self._snapshot_seq = (used, step), -1
        much = max(SNAPSHOT_BYTES, 2 * self._snapshot_bytes)  # or large ones would be most of what is written
        if self.journal.used_bytes - used >= much or self.pipeline.committed_step - step >= SNAPSHOT_STEPS:
            self.snapshot()

    def snapshot(self) -> int:
        """Write the whole state; returns the event's number."""
        if self.journal is None:
            raise JournalError("there is no journal (broker.journal_mb=0)")
        state = {"pipeline": self.pipeline.state(), "service": self._service_state()}
        seq = self._write("snapshot", {**state, "settings": self.pipeline.fixed_settings})
        self._snapshot_at, self._snapshot_seq = (self.journal.used_bytes, self.pipeline.committed_step), seq
        return seq
