"""What the broker's timeline tells of groups and steps: where they were, and from when to when.

::

    granted -> settled (group) -> assembled (queued) -> scored -> decided -> served -> committed
"""

from collections.abc import Iterable
from typing import Any

from broker.batch import Batch
from broker.pipeline import Pipeline
from common.trace import MILESTONES, Tracer, power_of_two

KEPT_STEPS = 64  # behind the newest: whose milestones are remembered, so that each is told once


class Trail:
    """Marks milestones of every step, and follows one group in ``trace.follow_every``. Decides nothing."""

    def __init__(self, tracer: Tracer, pipeline: Pipeline) -> None:
        self.tracer, self._pipeline = tracer, pipeline
        self._granted: dict[int, tuple[int, str]] = {}  # followed groups on their way: since when, and whose
        self._complete: dict[int, int] = {}  # those that wait to be assembled: since when
        self._told: dict[int, set[str]] = {}  # step -> milestones

    # ---- groups ---------------------------------------------------------------------------------

    def granted(self, groups: Iterable[int], actor: str) -> None:
        """``actor`` was promised ``groups``."""
        now = self.tracer.now()
        self._granted |= {group: (now, actor) for group in groups if self.tracer.follows(group)}

    def settled(self, groups: Iterable[int]) -> None:
        """Something was heard of ``groups``: which of them are whole, and is the next step ready by that?"""
        if not self.tracer.on:
            return
        now, pipeline = self.tracer.now(), self._pipeline
        for group in {group for group in groups if group in self._granted}:
            whole = pipeline.ledger.is_complete(group)
            if whole or group not in pipeline.book:
                since, actor = self._granted.pop(group)
                name = "group" if whole else "given up"
                self.tracer.span("groups", name, since, now, group=group, actor=actor)
            if whole:
                self._complete[group] = now
        self._look_ahead()

    def _look_ahead(self) -> None:
        """Mark the next step as ready once the ledger could choose it."""
        ledger = self._pipeline.ledger
        if self.tracer.on and "ready" not in self._told.get(ledger.next_step, ()) and ledger.select() is not None:
            self.mark(ledger.next_step, "ready")

    # ---- steps ----------------------------------------------------------------------------------

    def mark(self, step: int, what: str, at: int | None = None, **args: Any) -> None:
        """A milestone of ``step``, told once; ``at`` if it was not now."""
        assert what in MILESTONES
        told = self._told.setdefault(step, set())
        if what in told and not args.get("again"):
            return
        told.add(what)
        for old in [s for s in self._told if s < step - KEPT_STEPS]:
            del self._told[old]
        self.tracer.instant("step", at, step=step, what=what, **args)

    def assembled(self, batch: Batch, began: int, cpu: int) -> None:
        """``batch`` was chosen and collated since ``began``."""
        self._took("collate", batch, began, cpu)
        now, step = self.tracer.now(), batch.step
        self.mark(step, "ready", began)
        groups = [group for group in dict.fromkeys(batch.groups.tolist()) if self.tracer.follows(group)]
        for group in groups:
            self.tracer.span("groups", "queued", self._complete.pop(group, began), now, group=group, step=step)
        self.mark(step, "assembled", groups=groups)
        self._look_ahead()

    def scored(self, batch: Batch, began: int, cpu: int, again: bool) -> None:
        """An answer to ``batch`` was heard at ``began`` and has been made use of."""
        self._took("thin", batch, began, cpu)
        if self._pipeline.scoring_step is None:
            self.decided(batch.step, began, again)

    def decided(self, step: int, began: int, again: bool = False) -> None:
        """The last answer came at ``began``; all coins are tossed."""
        more = {"again": True} if again else {}
        self.mark(step, "scored", began, **more)
        self.mark(step, "decided", **more)

    def packed(self, batch: Batch, began: int, cpu: int) -> None:
        """Shards of ``batch`` were made."""
        self._took("pack", batch, began, cpu)

    def _took(self, what: str, batch: Batch, began: int, cpu: int) -> None:
        tokens = batch.tokens
        took = self.tracer.now() - began, self.tracer.cpu() - cpu
        self.tracer.tally(what, power_of_two(tokens), *took, tokens)

    def levels(self) -> None:
        """How much waits, and how much of it is accepted."""
        if not self.tracer.wants_levels:
            return
        pipeline, counts = self._pipeline, self._pipeline.counts
        self.tracer.levels(
            queue_groups=pipeline.ledger.queued, in_flight_groups=pipeline.ledger.promised,
            queue_bytes=pipeline.queue_bytes,
            acceptance=counts["tokens_accepted"] / max(1, counts["tokens_proposed"]),
        )  # fmt: skip
