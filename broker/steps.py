"""Steps from their whole groups to the learner's commit: collated, scored, thinned, served.

::

    assemble -> [score requests] -> scored ... -> (rethin -> [score request] -> scored) -> shard -> commit

A batch is asked about at once of the policy replica and of every frozen model that the loss needs; its
coins are tossed under the policy's answer, and it is decided when all have answered, in any order.
Like the pipeline that it belongs to, a function of its arguments and of what came before.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from broker.batch import Batch, collate
from broker.decision import Decision, Rule, Scores, accept_all, reject, thin_again, trainable_scores
from broker.mixing import Running, pack_scales, unpack_scales
from broker.packing import make_shards
from broker.receipts import receipt
from broker.scoring import NOTHING, Asked, FrozenScores, Scoring, ask, gather
from broker.trajectories import LoadTrajectory, Trajectory
from common.budget import BudgetController, ThresholdController
from common.config import MEGABYTE, ObrsSection, RunConfig
from common.ess import EssController
from common.frozen import POLICY
from common.wire import ScoreRequest, ScoreResult, Shard

LoadScores = Callable[[int], ScoreResult]  # by the journal's event
MESSAGE_BYTES, MEMBER_BYTES = 8700, 1200  # that Python takes for a message and for each of its trajectories


def scores_of(result: ScoreResult) -> Scores:
    """The arrays of an answer of the replica."""
    return Scores(result.version, result.log_p, result.topk_log_p)


def controller_of(obrs: ObrsSection) -> ThresholdController | None:
    """What chooses lambda from step to step; None where it stays as it is."""
    match obrs.mode:
        case "budget":
            return BudgetController(obrs.budget, window=obrs.window)
        case "ess":
            return EssController(obrs.target_ess, window=obrs.window)
        case _:
            return None


@dataclass
class DecidedStep:
    """A step whose coins were tossed, until the learner needs it no more."""

    batch: Batch
    decision: Decision
    receipt: dict[str, Any]
    score_seq: int  # the journal's event with the scores; -1 with rejection off
    log_threshold: float
    frozen: FrozenScores = NOTHING
    frozen_seqs: dict[str, int] = field(default_factory=dict)  # the journal's events with those, by scorer
    shards: list[Shard] | None = None
    committed: bool = False
    again_seq: int | None = None  # the journal's event with the scores of its second thinning, if it had one
    following: dict[str, Any] = field(default_factory=dict)  # what the step taught the next one; in the receipt too

    @property
    def nbytes(self) -> int:
        """What is held of it once it is trained, objects too: of short trajectories they are the most."""
        decision, frozen = self.decision, self.frozen
        arrays: list[NDArray[Any] | None] = [
            self.batch.trainable, decision.accept, decision.log_m, decision.log_p, frozen.log_reference,
            frozen.log_teacher,
        ]  # fmt: skip
        own = {id(array): array.nbytes for array in arrays if array is not None}  # with rejection off some are one
        members = self.batch.members
        objects = MESSAGE_BYTES * len({id(member.message) for member in members}) + MEMBER_BYTES * len(members)
        return self.batch.nbytes + sum(own.values()) + objects

    def train(self) -> int:
        """It is trained: forget what can be made again for a learner that comes back; returns the bytes still held."""
        self.committed, self.shards = True, None
        self.batch.forget_copies()
        return self.nbytes

    def follow(self, following: dict[str, Any]) -> None:
        """Note what the next step's rule took from this one."""
        self.following = following
        self.receipt.update(following)


class Steps:
    """Every step assembled and not yet forgotten; at most one batch is being scored."""

    def __init__(self, config: RunConfig, counts: Counter[str]) -> None:
        """``counts``: the pipeline's, for tokens and late scores."""
        self.config, self.counts = config, counts
        self._steps: dict[int, DecidedStep] = {}  # in order
        self._untrained: dict[int, DecidedStep] = {}  # those of them that are not committed
        self._held: dict[int, int] = {}  # bytes of the others
        self._held_bytes = 0
        self._scoring: Scoring | None = None
        self._next_request = 0
        self._running = Running(config)
        self._controller = controller_of(config.obrs)

    def assemble(self, step: int, members: Sequence[Trajectory], min_version: int) -> ScoreRequest | None:
        """Collate whole groups; returns what the policy must score, None with rejection off.

        What frozen models must score is under way with it (:attr:`requests`); where nobody is asked
        the step is decided at once.
        """
        batch = collate(step, members, self.config, self._running.observe(members))
        scoring = Scoring(batch)
        for scorer in self.config.scorers:
            scoring.add(ask(batch, scorer, self._next_number(), min_version, self.config))
        if not scoring.asked:
            self._finish(scoring)
            return None
        self._scoring = scoring
        return scoring.of_policy.request if scoring.of_policy else None

    def number_from(self, request: int) -> None:
        """The next request's number."""
        self._next_request = request

    def _next_number(self) -> int:
        self._next_request += 1
        return self._next_request - 1

    @property
    def requests(self) -> dict[str, ScoreRequest]:
        """What is under way, by scorer."""
        return {asked.scorer: asked.request for asked in self._scoring.open} if self._scoring else {}

    @property
    def scoring(self) -> Scoring | None:
        """The batch whose scores are awaited."""
        return self._scoring

    def asked(self, number: int) -> Asked | None:
        """The request of that number, if it is still to be answered."""
        found = self._scoring.open if self._scoring else []
        return next((asked for asked in found if asked.request.request == number), None)

    def scored(self, result: ScoreResult, seq: int = -1) -> Asked | None:
        """Take an answer; with the last one the step is decided. Returns what it answers, None if it is too late.

        Raises :class:`DataError` for an answer that does not fit; then nothing has changed.
        """
        asked = self.asked(result.request)
        if asked is None or self._scoring is None:
            self.counts["late_scores"] += 1
            return None
        scoring = self._scoring
        asked.check(result)
        if scoring.again:
            self._thin_again(self._steps[scoring.batch.step], scores_of(result), seq)
        elif asked.scorer == POLICY:  # not with the last answer: it may raise, and then it is this one's fault
            scoring.decision = self._decide(scoring.batch, result, self.log_threshold)
        asked.answer, asked.seq = result, seq
        if scoring.open:
            return asked
        self._scoring = None
        if not scoring.again:
            self._finish(scoring)
            self._follow(scoring)
        return asked

    def _follow(self, scoring: Scoring) -> None:
        """Take the next step's threshold from this one: coins never see their own batch."""
        policy = scoring.of_policy
        if self._controller is None or policy is None or policy.answer is None:
            return
        log_p, log_q, _ = trainable_scores(scoring.batch, scores_of(policy.answer))
        choice = self._controller.update(log_p, log_q)
        if choice is not None:
            following = {"threshold_next": float(np.exp(choice.log_threshold)), "budget_feasible": choice.feasible}
            self._steps[scoring.batch.step].follow(following)

    def rethin(self, step: int, min_version: int) -> ScoreRequest | None:
        """Ask the policy for scores of a decided step under ``min_version`` or later, to thin it a second time.

        None if it was decided under a version as new, was thinned again or served already, or
        another batch is being scored.
        """
        if self._scoring is not None or not self.may_rethin(step, min_version):
            return None
        batch = self._steps[step].batch
        self._scoring = Scoring(batch, again=True)
        return self._scoring.add(ask(batch, POLICY, self._next_number(), min_version, self.config))

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
        entry.receipt = {**line, **entry.frozen.figures, **again, **entry.following}

    def _decide(self, batch: Batch, result: ScoreResult, log_threshold: float) -> Decision:
        obrs = self.config.obrs
        rule = Rule(self.config.run.seed, log_threshold, obrs.z_weight, obrs.z_kappa)
        return reject(batch, scores_of(result), rule)

    @property
    def log_threshold(self) -> float:
        """log lambda of the next step to be thinned."""
        if self._controller is not None:
            return self._controller.log_threshold
        return float(np.log(self.config.obrs.threshold))

    def _finish(self, scoring: Scoring, log_threshold: float | None = None) -> None:
        """All is known of the batch: keep it as decided, at this step's threshold unless another is given."""
        batch, policy = scoring.batch, scoring.of_policy
        decision = scoring.decision or accept_all(batch)
        self.counts["tokens_proposed"] += decision.proposed
        self.counts["tokens_accepted"] += decision.accepted
        self.counts["unscorable"] += decision.unscorable
        if policy is None:
            log_threshold = 0.0
        elif log_threshold is None:
            log_threshold = self.log_threshold
        frozen = gather(batch, scoring.asked, self.config)
        line = {**receipt(batch, decision, float(np.exp(log_threshold))), **frozen.figures}
        seqs = {name: asked.seq for name, asked in scoring.asked.items() if name != POLICY}
        self._untrained[batch.step] = self._steps[batch.step] = DecidedStep(
            batch, decision, line, policy.seq if policy else -1, log_threshold, frozen, seqs
        )

    # ---- serving --------------------------------------------------------------------------------

    def shard(self, step: int, rank: int, world: int) -> Shard | None:
        """The shard of ``rank``, the same bytes however often it is asked for; None if not ready."""
        entry = self._steps.get(step)
        if entry is None or self.being_scored(step):
            return None
        if entry.shards is None or len(entry.shards) != world:
            entry.shards = self._make_shards(entry, world)
        return entry.shards[rank]

    def _make_shards(self, entry: DecidedStep, world: int) -> list[Shard]:
        frozen = entry.frozen
        return make_shards(entry.batch, entry.decision, world, self.config, frozen.log_reference, frozen.log_teacher)

    def has_shards(self, step: int, world: int) -> bool:
        """Whether the step's shards for ``world`` ranks were made already."""
        entry = self._steps.get(step)
        return entry is not None and entry.shards is not None and len(entry.shards) == world

    def was_served(self, step: int) -> bool:
        """Whether shards of the step were made, for whatever mesh."""
        entry = self._steps.get(step)
        return entry is not None and entry.shards is not None

    def batch(self, step: int) -> Batch:
        """Of a step that is held or being scored."""
        if self._scoring is not None and self._scoring.batch.step == step:
            return self._scoring.batch
        return self._steps[step].batch

    def get(self, step: int) -> DecidedStep | None:
        """What is held of a decided step."""
        return self._steps.get(step)

    def first_from(self, step: int, end: int) -> int:
        """The first step from ``step`` on that is not forgotten; ``end`` is the next to be assembled."""
        return next((one for one in range(step, end) if one in self), end)

    def __contains__(self, step: int) -> bool:
        return step in self._steps or self.being_scored(step)

    @property
    def scoring_step(self) -> int | None:
        """The step whose scores are awaited."""
        return self._scoring.batch.step if self._scoring else None

    def being_scored(self, step: int) -> bool:
        """Whether scores of ``step`` are awaited."""
        return self.scoring_step == step

    def commit(self, step: int) -> DecidedStep | None:
        """``step`` is trained; returns it the first time."""
        entry = self._steps.get(step)
        if entry is None:
            return None
        if entry.committed:  # by a learner that came back, for which its shards were made once more
            entry.train()
            return None
        self._trained(entry)
        self._prune()
        return entry

    def _trained(self, entry: DecidedStep) -> None:
        step = entry.batch.step
        del self._untrained[step]
        self._held[step] = entry.train()
        self._held_bytes += self._held[step]

    def checkpointed(self, step: int) -> None:
        """Steps up to ``step`` will not be asked for again."""
        while self._steps and (first := next(iter(self._steps))) <= step:
            self._forget(first)

    def _forget(self, step: int) -> None:
        if self.being_scored(step):
            self._scoring = None  # a second thinning that nobody waits for any more
        del self._steps[step]
        self._untrained.pop(step, None)
        self._held_bytes -= self._held.pop(step, 0)

    def _prune(self) -> None:
        section = self.config.broker
        limit = section.retain_mb * MEGABYTE
        if section.journal_mb:  # which must not be full of what only a checkpoint would empty it of
            limit = min(limit, section.journal_mb * MEGABYTE / 4)
        while self._held_bytes > limit:
            self._forget(next(iter(self._held)))

    # ---- state ----------------------------------------------------------------------------------

    @property
    def waiting(self) -> list[Batch]:
        """Batches that are not trained yet; one that is thinned again is among the decided."""
        found = [entry.batch for entry in self._untrained.values()]
        if self._scoring is not None and not self._scoring.again:
            found.append(self._scoring.batch)
        return found

    def sources(self) -> list[int]:
        """Numbers of the journal's events that hold these steps; -1 for none."""
        batches = [entry.batch for entry in self._steps.values()]
        asked: list[Asked] = []
        if self._scoring is not None:
            batches.append(self._scoring.batch)
            asked += self._scoring.asked.values()
        found = [seq for batch in batches for seq, _ in batch.sources]
        found += [one.seq for one in asked]
        for entry in self._steps.values():
            found += [entry.score_seq, *entry.frozen_seqs.values()]
            found += [] if entry.again_seq is None else [entry.again_seq]
        return found

    def state(self) -> dict[str, Any]:
        """What :meth:`restore` needs."""
        scoring = self._scoring
        return {
            "next_request": self._next_request,
            "threshold": self._controller_state(),
            "steps": [
                [
                    step, [t.place for t in e.batch.members], e.score_seq, e.log_threshold, e.committed, e.following,
                    e.again_seq, 0 if e.committed else len(e.shards or ()), e.frozen_seqs, pack_scales(e.batch.scales),
                ]
                for step, e in self._steps.items()
            ],
            "scoring": None if scoring is None else [
                scoring.batch.step, [t.place for t in scoring.batch.members], scoring.again,
                [
                    [a.scorer, a.request.request, a.request.min_version, None if a.answer is None else a.seq]
                    for a in scoring.asked.values()
                ],
                pack_scales(scoring.batch.scales),
            ],
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
        for step, places, seq, log_threshold, committed, following, again_seq, world, frozen, scales in state["steps"]:
            batch = collate(step, [load(*place) for place in places], self.config, unpack_scales(scales))
            answered = {**({POLICY: seq} if seq >= 0 else {}), **frozen}
            asked = [[name, -1, 0, event] for name, event in answered.items()]
            self._finish(self._restored(batch, False, asked, scores, log_threshold), log_threshold)
            entry = self._steps[step]
            entry.follow(following)
            if again_seq is not None:
                self._thin_again(entry, scores_of(scores(again_seq)), again_seq)
            if world:
                entry.shards = self._make_shards(entry, world)
            if committed:
                self._trained(entry)
        self.counts.clear()
        self.counts.update(counts)
        if state["scoring"] is not None:
            step, places, again, asked, scales = state["scoring"]
            batch = collate(step, [load(*place) for place in places], self.config, unpack_scales(scales))
            self._scoring = self._restored(batch, again, asked, scores, self.log_threshold)

    def _restored(
        self, batch: Batch, again: bool, asked: list[Any], scores: LoadScores, log_threshold: float
    ) -> Scoring:
        """``asked``: scorer, number, least version and the event with the answer (None: none yet) of each request."""
        scoring = Scoring(batch, again)
        for name, number, min_version, seq in asked:
            one = ask(batch, name, number, min_version, self.config)
            scoring.add(one)
            if one is not None and seq is not None:
                one.answer, one.seq = scores(seq), seq
                if name == POLICY:
                    scoring.decision = self._decide(batch, one.answer, log_threshold)
        return scoring
