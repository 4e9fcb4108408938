"""Steps from their whole groups to the learner's commit: collated, scored, thinned, served.

::

    assemble -> [score request] -> scored -> (rethin -> [score request] -> scored) -> shard -> commit

Like the pipeline that it belongs to, a function of its arguments and of what came before.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from broker.batch import (
    Batch,
    Decision,
    Rule,
    Scores,
    accept_all,
    collate,
    make_shards,
    reject,
    thin_again,
    trainable_scores,
)
from broker.groups import LoadTrajectory, Trajectory
from broker.mixing import Running, pack_scales, unpack_scales
from broker.receipts import receipt
from common.budget import BudgetController
from common.config import MEGABYTE, RunConfig
from common.errors import DataError
from common.wire import ScoreRequest, ScoreResult, Shard

LoadScores = Callable[[int], ScoreResult]  # by the journal's event


def scores_of(result: ScoreResult) -> Scores:
    """The arrays of an answer of the replica."""
    return Scores(result.version, result.log_p, result.topk_log_p)


@dataclass
class DecidedStep:
    """A step whose coins were tossed, until the learner needs it no more."""

    batch: Batch
    decision: Decision
    receipt: dict[str, Any]
    score_seq: int  # the journal's event with the scores; -1 with rejection off
    log_threshold: float
    shards: list[Shard] | None = None
    committed: bool = False
    again_seq: int | None = None  # the journal's event with the scores of its second thinning, if it had one
    following: dict[str, Any] = field(default_factory=dict)  # what the step taught the next one; in the receipt too

    def follow(self, following: dict[str, Any]) -> None:
        """Note what the next step's rule took from this one."""
        self.following = following
        self.receipt.update(following)


class Steps:
    """Every step assembled and not yet forgotten; at most one batch is being scored."""

    def __init__(self, config: RunConfig, counts: Counter[str]) -> None:
        """``counts``: the pipeline's, for tokens and late scores."""
        self.config, self.counts = config, counts
        self._steps: dict[int, DecidedStep] = {}
        self._scoring: tuple[Batch, ScoreRequest] | None = None
        self._next_request = 0
        obrs = config.obrs
        self._running = Running(config)
        self._controller = BudgetController(obrs.budget, window=obrs.window) if obrs.mode == "budget" else None

    def assemble(self, step: int, members: Sequence[Trajectory], min_version: int) -> ScoreRequest | None:
        """Collate whole groups; returns what must be scored, None with rejection off, when the step is decided."""
        batch = collate(step, members, self.config, self._running.observe(members))
        if self.config.obrs.mode == "off":
            self._finish(batch, accept_all(batch), -1, 0.0)
            return None
        return self._ask(batch, min_version)

    def _ask(self, batch: Batch, min_version: int) -> ScoreRequest:
        self._scoring = (batch, self._score_request(batch, self._next_request, min_version))
        self._next_request += 1
        return self._scoring[1]

    def _score_request(self, batch: Batch, number: int, min_version: int) -> ScoreRequest:
        return ScoreRequest(
            request=number,
            min_version=min_version,
            temperature=self.config.rollout.temperature,
            cu_seqlens=batch.segments.astype(np.int32),
            token_ids=batch.token_ids,
            wanted=(batch.trainable == 1).astype(np.uint8),
            topk_ids=batch.topk_ids,
            experts=batch.experts(np.arange(len(batch.members))),
        )

    @property
    def scoring(self) -> ScoreRequest | None:
        """The request under way."""
        return self._scoring[1] if self._scoring else None

    def scored(self, result: ScoreResult, seq: int = -1) -> None:
        """Toss the coins of the batch that was scored. Stale answers are ignored."""
        if self._scoring is None or self._scoring[1].request != result.request:
            self.counts["late_scores"] += 1
            return
        batch, request = self._scoring
        if len(result.log_p) != len(batch.token_ids):
            raise DataError(f"score_result: {len(result.log_p)} scores for {len(batch.token_ids)} tokens")
        asked = (len(batch.token_ids), batch.alternatives)
        if result.topk_log_p.shape != asked:
            raise DataError(f"score_result: alternatives {result.topk_log_p.shape}, asked {asked}")
        if result.version < request.min_version:
            raise DataError(f"score_result: scored by version {result.version}, asked for {request.min_version}")
        if batch.step in self._steps:
            self._thin_again(self._steps[batch.step], scores_of(result), seq)
            self._scoring = None
            return
        decided = self._decide(batch, result, seq, self.log_threshold)  # may raise: then nothing has changed
        self._scoring = None
        self._finish(batch, *decided)
        if self._controller is not None:
            log_p, log_q, _ = trainable_scores(batch, scores_of(result))
            choice = self._controller.update(log_p, log_q)  # for the next step: coins never see their own batch
            if choice is not None:
                following = {
                    "threshold_next": float(np.exp(choice.log_threshold)),
                    "budget_feasible": choice.feasible,
                }
                self._steps[batch.step].follow(following)

    def rethin(self, step: int, min_version: int) -> ScoreRequest | None:
        """Ask for scores of a decided step under ``min_version`` or later, to thin it a second time.

        None if it was decided under a version as new, was thinned again or served already, or
        another batch is being scored.
        """
        if self._scoring is not None or not self.may_rethin(step, min_version):
            return None
        return self._ask(self._steps[step].batch, min_version)

    def may_rethin(self, step: int, version: int) -> bool:
        """Whether ``step`` was decided by rejection under an older version, once only, and nobody has it yet."""
        entry = self._steps.get(step)
        if entry is None or entry.committed or entry.shards is not None or entry.again_seq is not None:
            return False
        return 0 <= entry.decision.version < version

    def _thin_again(self, entry: DecidedStep, scores: Scores, seq: int) -> None:
        first = entry.decision
        rule = Rule(self.config.run.seed, entry.log_threshold)
        entry.decision, entry.again_seq = thin_again(entry.batch, first, scores, rule), seq
        self.counts["tokens_accepted"] += entry.decision.accepted - first.accepted
        line = receipt(entry.batch, entry.decision, float(np.exp(entry.log_threshold)))
        again = {"rethinned_by_version": scores.version, "rethinned_tokens": first.accepted - entry.decision.accepted}
        entry.receipt = {**line, **again, **entry.following}

    def _decide(self, batch: Batch, result: ScoreResult, seq: int, log_threshold: float) -> tuple[Decision, int, float]:
        obrs = self.config.obrs
        rule = Rule(self.config.run.seed, log_threshold, obrs.z_weight, obrs.z_kappa)
        return reject(batch, scores_of(result), rule), seq, log_threshold

    @property
    def log_threshold(self) -> float:
        """log lambda of the next step to be thinned."""
        if self._controller is not None:
            return self._controller.log_threshold
        return float(np.log(self.config.obrs.threshold))

    def _finish(self, batch: Batch, decision: Decision, score_seq: int, log_threshold: float) -> None:
        self.counts["tokens_proposed"] += decision.proposed
        self.counts["tokens_accepted"] += decision.accepted
        self.counts["unscorable"] += decision.unscorable
        line = receipt(batch, decision, float(np.exp(log_threshold)))
        self._steps[batch.step] = DecidedStep(batch, decision, line, score_seq, log_threshold)

    # ---- serving --------------------------------------------------------------------------------

    def shard(self, step: int, rank: int, world: int) -> Shard | None:
        """The shard of ``rank``, the same bytes however often it is asked for; None if not ready."""
        entry = self._steps.get(step)
        if entry is None or self.being_scored(step):
            return None
        if entry.shards is None or len(entry.shards) != world:
            entry.shards = make_shards(entry.batch, entry.decision, world, self.config)
        return entry.shards[rank]

    def has_shards(self, step: int, world: int) -> bool:
        """Whether the step's shards for ``world`` ranks were made already."""
        entry = self._steps.get(step)
        return entry is not None and entry.shards is not None and len(entry.shards) == world

    def get(self, step: int) -> DecidedStep | None:
        """What is held of a decided step."""
        return self._steps.get(step)

    def __contains__(self, step: int) -> bool:
        return step in self._steps or self.being_scored(step)

    @property
    def scoring_step(self) -> int | None:
        """The step whose scores are awaited."""
        return self._scoring[0].step if self._scoring else None

    def being_scored(self, step: int) -> bool:
        """Whether scores of ``step`` are awaited."""
        return self._scoring is not None and self._scoring[0].step == step

    def commit(self, step: int) -> DecidedStep | None:
        """``step`` is trained; returns it the first time."""
        entry = self._steps.get(step)
        if entry is None or entry.committed:
            return None
        entry.committed = True
        self._prune()
        return entry

    def checkpointed(self, step: int) -> None:
        """Steps up to ``step`` will not be asked for again."""
        for done in [s for s in self._steps if s <= step]:
            self._forget(done)

    def _forget(self, step: int) -> None:
        if self.being_scored(step):
            self._scoring = None  # a second thinning that nobody waits for any more
        del self._steps[step]

    def _prune(self) -> None:
        limit = self.config.broker.retain_mb * MEGABYTE
        held = sum(s.batch.nbytes for s in self._steps.values() if s.committed)
        for step in sorted(s for s, entry in self._steps.items() if entry.committed):
            if held <= limit:
                return
            held -= self._steps[step].batch.nbytes
            self._forget(step)

    # ---- state ----------------------------------------------------------------------------------

    @property
    def waiting(self) -> list[Batch]:
        """Batches that are not trained yet; one that is thinned again is among the decided."""
        found = [s.batch for s in self._steps.values() if not s.committed]
        if self._scoring is not None and self._scoring[0].step not in self._steps:
            found.append(self._scoring[0])
        return found

    def sources(self) -> list[int]:
        """Numbers of the journal's events that hold these steps; -1 for none."""
        batches = [entry.batch for entry in self._steps.values()] + ([self._scoring[0]] if self._scoring else [])
        found = [seq for batch in batches for seq, _ in batch.sources]
        found += [entry.score_seq for entry in self._steps.values()]
        return found + [entry.again_seq for entry in self._steps.values() if entry.again_seq is not None]

    def state(self) -> dict[str, Any]:
        """What :meth:`restore` needs."""
        return {
            "next_request": self._next_request,
            "threshold": self._controller_state(),
            "steps": [
                [
                    step, [t.place for t in e.batch.members], e.score_seq, e.log_threshold, e.committed, e.following,
                    e.again_seq, len(e.shards or ()), pack_scales(e.batch.scales),
                ]
                for step, e in self._steps.items()
            ],
            "scoring": [
                self._scoring[0].step, [t.place for t in self._scoring[0].members],
                self._scoring[1].request, self._scoring[1].min_version, pack_scales(self._scoring[0].scales),
            ] if self._scoring else None,
            "running": self._running.state(),
        }  # fmt: skip

    def _controller_state(self) -> list[Any] | None:
        if self._controller is None:
            return None
        state = self._controller.state()
        return [state["log_threshold"], [np.asarray(r, np.float32).tobytes() for r in state["log_ratios"]]]

    def restore(self, state: dict[str, Any], load: LoadTrajectory, scores: LoadScores) -> None:
        """Take up where :meth:`state` was written; counts are left as they were."""
        self._next_request = state["next_request"]
        self._running.restore(state["running"])
        if self._controller is not None and state["threshold"] is not None:
            log_threshold, ratios = state["threshold"]
            arrays = [np.frombuffer(r, np.float32) for r in ratios]
            self._controller.restore({"log_threshold": log_threshold, "log_ratios": arrays})
        counts = Counter(self.counts)
        for step, places, seq, log_threshold, committed, following, again_seq, world, scales in state["steps"]:
            batch = collate(step, [load(*place) for place in places], self.config, unpack_scales(scales))
            if seq < 0:
                self._finish(batch, accept_all(batch), -1, 0.0)
            else:
                self._finish(batch, *self._decide(batch, scores(seq), seq, log_threshold))
            entry = self._steps[step]
            entry.committed = committed
            entry.follow(following)
            if again_seq is not None:
                self._thin_again(entry, scores_of(scores(again_seq)), again_seq)
            if world:
                entry.shards = make_shards(batch, entry.decision, world, self.config)
        self.counts.clear()
        self.counts.update(counts)
        if state["scoring"] is not None:
            step, places, number, min_version, scales = state["scoring"]
            batch = collate(step, [load(*place) for place in places], self.config, unpack_scales(scales))
            self._scoring = (batch, self._score_request(batch, number, min_version))
