"""The broker's decisions, without a socket: trajectories in, shards out.

::

    grant -> admit -> group -> (whole groups) select -> collate -> score -> reject -> shards -> commit

Every method is a function of its arguments and of what came before; nothing here looks at a clock
or a file.
"""

from collections import Counter, deque
from collections.abc import Callable
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
from broker.groups import GroupBook, Trajectory, unpack_all
from broker.ledger import StalenessLedger
from broker.receipts import receipt
from common.budget import BudgetController
from common.config import MEGABYTE, RunConfig
from common.errors import DataError, ProtocolError
from common.wire import Ack, Grant, ScoreRequest, ScoreResult, Shard, Trajectories

RESAMPLE_STEPS = 8  # steps' worth of groups without signal in a row, after which they are trained after all
PROMPT_RETRIES = 3  # a prompt whose groups failed this often is left out


def length_bin(tokens: int) -> int:
    """Lengths are counted by powers of two: the bin is the smallest one not below ``tokens``."""
    return 1 << max(0, tokens - 1).bit_length()


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


class Pipeline:
    """What the broker knows of the run's data."""

    def __init__(self, config: RunConfig, vocab_size: int) -> None:
        self.config = config
        self.vocab_size = vocab_size
        rollout = config.rollout
        self.ledger = StalenessLedger(config.staleness.budget, rollout.groups_per_step, config.run.steps)
        self.book = GroupBook(rollout.group_size)
        self.counts: Counter[str] = Counter()
        self.dropped: Counter[str] = Counter()
        self.refused: Counter[str] = Counter()
        self.lengths: dict[str, Counter[int]] = {"trained": Counter(), "dropped": Counter()}  # see length_bin
        self._steps: dict[int, DecidedStep] = {}
        self._scoring: tuple[Batch, ScoreRequest] | None = None
        self._next_group = 0
        self._next_prompt = 0
        self._retry: deque[tuple[int, int]] = deque()  # (prompt, failures so far)
        self._failures: Counter[int] = Counter()
        self._next_request = 0
        self.committed_step = -1
        self._silent = 0  # groups without signal in a row
        obrs = config.obrs
        self._controller = BudgetController(obrs.budget, window=obrs.window) if obrs.mode == "budget" else None

    # ---- grants ---------------------------------------------------------------------------------

    def begin(self, generation: int) -> None:
        """Number groups apart from those of an earlier broker of this run that kept no journal."""
        self._next_group = generation << 32

    def start_at(self, step: int) -> None:
        """The learner's first step; everything before it belongs to an earlier life of the run."""
        if self.ledger.next_step == 0 and step > 0 and not self._steps:
            self.ledger.next_step = step
            self.committed_step = step - 1
            self._next_prompt = step * self.config.rollout.groups_per_step

    def grant(self, actor: str, count: int, version: int) -> Grant | None:
        """Promise up to ``count`` groups to ``actor``, started at ``version`` or later; None if no room."""
        count = min(count, self.ledger.grantable(version), self.groups_that_fit())
        if count <= 0:
            return None
        groups, prompts = [], []
        for _ in range(count):
            prompt = self._retry.popleft()[0] if self._retry else self._new_prompt()
            group, self._next_group = self._next_group, self._next_group + 1
            self.ledger.grant(group, version)
            self.book.grant(group, prompt, actor, version)
            groups.append(group)
            prompts.append(prompt)
        self.counts["groups_granted"] += count
        return Grant(version, -1, 0, np.array(groups, np.int64), np.array(prompts, np.int64))

    def _new_prompt(self) -> int:
        prompt, self._next_prompt = self._next_prompt, self._next_prompt + 1
        return prompt

    def groups_that_fit(self) -> int:
        """Groups whose largest possible size still fits in the queue's bound, those promised counted in full."""
        free = self.config.broker.queue_mb * MEGABYTE - self.queue_bytes
        return max(0, int(free // self.largest_group) - self.ledger.promised)

    @property
    def largest_group(self) -> int:
        """Bytes of a group whose every sibling is as long as it may be."""
        return self.config.rollout.largest_group

    # ---- admission ------------------------------------------------------------------------------

    def admit(self, message: Trajectories, actor: str, newest_version: int, seq: int = -1) -> Ack:
        """Take what is sound, refuse the rest by name; a refused sibling gives its group up.

        ``seq`` is the number under which the journal holds the message.
        """
        faults = message.faults(self.vocab_size, newest_version)
        trajectories = unpack_all(message, actor, seq)
        reasons = []
        for index in range(len(message.groups)):
            group, sibling = int(message.groups[index]), int(message.siblings[index])
            reason = self.book.refusal(group, sibling, actor)
            if self.book.is_done(group):
                self.counts["repeats"] += 1
                reason = ""
            elif not reason:
                reason = faults.get(index, "") or self._admit_one(trajectories[index])
                if reason:
                    self.give_up(group, "refused_sibling")
            if reason:
                self.refused[reason] += 1
            reasons.append(reason)
        return Ack(reasons, message.groups, message.siblings)

    def _admit_one(self, trajectory: Trajectory) -> str:
        oldest = trajectory.oldest_version
        if oldest < self.book.min_version(trajectory.group):
            return f"sampled by version {oldest}, older than the grant's {self.book.min_version(trajectory.group)}"
        if len(trajectory.token_ids) > self.config.rollout.max_length:
            return f"{len(trajectory.token_ids)} tokens, more than rollout allows ({self.config.rollout.max_length})"
        if trajectory.topk_ids.shape[1] != self.config.rollout.top_logprobs:
            asked = self.config.rollout.top_logprobs
            return f"{trajectory.topk_ids.shape[1]} alternatives a token, rollout.top_logprobs={asked}"
        is_new, complete = self.book.add(trajectory)
        if not is_new:
            self.counts["repeats"] += 1
            return ""
        self.counts["trajectories_acked"] += 1
        self.counts["tokens_generated"] += trajectory.sampled_tokens
        if complete:
            self._settle(trajectory.group, "sibling_failed")
        return ""

    def _settle(self, group: int, reason: str) -> None:
        """Nothing more will come of ``group``: train what there is of it, or give it up."""
        if not self.book.enough(group):
            self.give_up(group, reason)
            return
        members = self.book.members(group)
        if self.config.advantage.zero_signal == "resample" and self._resample(members):
            self.give_up(group, "no_signal", again=False)
            return
        self.ledger.complete(group, min(t.oldest_version for t in members))

    def _resample(self, members: list[Trajectory]) -> bool:
        """Whether a group without signal is replaced by another prompt's; not for ever."""
        rewards = [t.reward for t in members]
        if max(rewards) > min(rewards):
            self._silent = 0
            return False
        self._silent += 1
        return self._silent <= RESAMPLE_STEPS * self.config.rollout.groups_per_step

    def failed(self, group: int, sibling: int, reason: str) -> None:
        """``sibling`` of ``group`` (-1: all that are missing) will never come."""
        if group not in self.book:
            return
        self.counts["siblings_failed"] += 1
        if self.book.fail(group, sibling):
            self._settle(group, reason)

    def give_up(self, group: int, reason: str, again: bool = True) -> None:
        """Drop the group: count what had arrived, free its place, grant its prompt ``again``."""
        if group not in self.book:
            return
        prompt, arrived = self.book.tombstone(group, reason)
        self.ledger.release(group)
        self.dropped[reason] += len(arrived)
        self.counts["tokens_dropped"] += sum(t.sampled_tokens for t in arrived)
        self.lengths["dropped"].update(length_bin(t.sampled_tokens) for t in arrived)
        self.counts["groups_given_up"] += 1
        if not again:
            return
        self._failures[prompt] += 1
        if self._failures[prompt] < PROMPT_RETRIES:
            self._retry.append((prompt, self._failures[prompt]))

    def actor_lost(self, actor: str) -> int:
        """Nothing more will come of what a lost actor owed; returns how many groups were given up for it."""
        owed = self.book.of_actor(actor)
        for group in owed:
            self.book.fail(group, -1)
            self._settle(group, "actor_lost")
        return sum(group not in self.book for group in owed)

    # ---- assembly -------------------------------------------------------------------------------

    def assemble(self, min_version: int) -> ScoreRequest | None:
        """Choose and collate the next step if it is ready and due; returns what must be scored.

        A step is due when it is at most ``broker.assemble_ahead`` ahead of the published version
        ``min_version``, which will score it: the later, the closer to the policy that trains on it.
        With rejection off the step is finished at once and None is returned.
        """
        if self._scoring is not None or self.ledger.next_step - min_version > self.config.broker.assemble_ahead:
            return None
        chosen = self.ledger.select()
        if chosen is None:
            return None
        step = self.ledger.next_step
        members = [t for group in chosen for t in self.book.take(group)]
        self.ledger.assembled(chosen)
        batch = self._collate(step, members)
        if self.config.obrs.mode == "off":
            self._finish(batch, accept_all(batch), -1, 0.0)
            return None
        self._scoring = (batch, self._score_request(batch, self._next_request, min_version))
        self._next_request += 1
        return self._scoring[1]

    def _collate(self, step: int, members: list[Trajectory]) -> Batch:
        advantage = self.config.advantage
        mask = advantage.zero_signal == "mask"
        return collate(step, members, self.config.rollout.group_size, advantage.kind, advantage.epsilon, mask)

    def _score_request(self, batch: Batch, number: int, min_version: int) -> ScoreRequest:
        return ScoreRequest(
            request=number,
            min_version=min_version,
            temperature=self.config.rollout.temperature,
            cu_seqlens=batch.cu_seqlens.astype(np.int32),
            token_ids=batch.token_ids,
            wanted=batch.trainable,
            topk_ids=batch.topk_ids,
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
        entry = self._steps.get(step)
        if entry is None or entry.committed or entry.shards is not None or entry.again_seq is not None:
            return None
        if self._scoring is not None or not 0 <= entry.decision.version < min_version:
            return None
        self._scoring = (entry.batch, self._score_request(entry.batch, self._next_request, min_version))
        self._next_request += 1
        return self._scoring[1]

    def _thin_again(self, entry: DecidedStep, scores: Scores, seq: int) -> None:
        first = entry.decision
        rule = Rule(self.config.run.seed, entry.log_threshold)
        entry.decision, entry.again_seq = thin_again(entry.batch, first, scores, rule), seq
        self.counts["tokens_accepted"] += entry.decision.accepted - first.accepted
        line = receipt(entry.batch, entry.decision, float(np.exp(entry.log_threshold)))
        again = {"rethinned_by_version": scores.version, "rethinned_tokens": first.accepted - entry.decision.accepted}
        entry.receipt = {**line, **again, **entry.following}

    @property
    def _assembling(self) -> Batch | None:
        """The batch that awaits its first scores; one that is thinned again counts among the decided."""
        return None if self._scoring is None or self._scoring[0].step in self._steps else self._scoring[0]

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
        if step < self.ledger.next_step and step not in self._steps and not self._being_scored(step):
            raise ProtocolError(
                f"step {step} is no longer held (committed up to {self.committed_step}); "
                "resume from a newer checkpoint or raise broker.retain_mb"
            )
        entry = self._steps.get(step)
        if entry is None or self._being_scored(step):
            return None
        if entry.shards is None or len(entry.shards) != world:
            entry.shards = make_shards(entry.batch, entry.decision, world, self.config.rollout.temperature)
        return entry.shards[rank]

    def has_shards(self, step: int, world: int) -> bool:
        """Whether the step's shards for ``world`` ranks were made already."""
        entry = self._steps.get(step)
        return entry is not None and entry.shards is not None and len(entry.shards) == world

    def step(self, step: int) -> DecidedStep | None:
        """What is held of a decided step."""
        return self._steps.get(step)

    @property
    def scoring_step(self) -> int | None:
        """The step whose scores are awaited."""
        return self._scoring[0].step if self._scoring else None

    def _being_scored(self, step: int) -> bool:
        return self._scoring is not None and self._scoring[0].step == step

    def commit(self, step: int) -> dict[str, Any] | None:
        """Step trained; returns its receipt the first time."""
        entry = self._steps.get(step)
        if entry is None or entry.committed:
            return None
        entry.committed = True
        self.committed_step = max(self.committed_step, step)
        self.counts["trajectories_trained"] += len(entry.batch.groups)
        self.lengths["trained"].update(length_bin(int(n)) for n in entry.batch.sampled_tokens())
        self._prune()
        return entry.receipt

    def checkpointed(self, step: int) -> None:
        """Steps up to ``step`` will not be asked for again."""
        for done in [s for s in self._steps if s <= step]:
            self._forget(done)

    def _forget(self, step: int) -> None:
        if self._being_scored(step):
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

    def sources(self) -> list[int]:
        """Numbers of the journal's events that hold what is not trained and checkpointed yet."""
        found = [t.source[0] for group in self.book.groups() for t in self.book.members(group)]
        batches = [entry.batch for entry in self._steps.values()] + ([self._scoring[0]] if self._scoring else [])
        found += [seq for batch in batches for seq, _ in batch.sources]
        found += [entry.score_seq for entry in self._steps.values()]
        found += [entry.again_seq for entry in self._steps.values() if entry.again_seq is not None]
        return sorted({seq for seq in found if seq >= 0})

    def state(self) -> dict[str, Any]:
        """Everything that :meth:`restore` needs, small: trajectories and scores by their place in the journal."""
        return {
            "ledger": self.ledger.state(),
            "book": self.book.state(),
            "counts": dict(self.counts),
            "dropped": dict(self.dropped),
            "refused": dict(self.refused),
            "lengths": [[kind, list(bins.items())] for kind, bins in self.lengths.items()],
            "next_group": self._next_group,
            "next_prompt": self._next_prompt,
            "retry": [list(r) for r in self._retry],
            "failures": list(self._failures.items()),
            "next_request": self._next_request,
            "committed_step": self.committed_step,
            "silent": self._silent,
            "threshold": self._controller_state(),
            "steps": [
                [
                    step, [list(s) for s in e.batch.sources], e.score_seq, e.log_threshold, e.committed, e.following,
                    e.again_seq, len(e.shards or ()),
                ]
                for step, e in self._steps.items()
            ],
            "scoring": [
                self._scoring[0].step, [list(s) for s in self._scoring[0].sources],
                self._scoring[1].request, self._scoring[1].min_version,
            ] if self._scoring else None,
        }  # fmt: skip

    def _controller_state(self) -> list[Any] | None:
        if self._controller is None:
            return None
        state = self._controller.state()
        return [state["log_threshold"], [np.asarray(r, np.float32).tobytes() for r in state["log_ratios"]]]

    def restore(
        self, state: dict[str, Any], load: Callable[[int, int], Trajectory], scores: Callable[[int], ScoreResult]
    ) -> None:
        """Take up where :meth:`state` was written; every decision comes out as it did, bit for bit."""
        self.ledger.restore(state["ledger"])
        self.book.restore(state["book"], load)
        self.counts, self.dropped, self.refused = (Counter(state[k]) for k in ("counts", "dropped", "refused"))
        self.lengths = {kind: Counter(dict(bins)) for kind, bins in state["lengths"]}
        self._next_group, self._next_prompt = state["next_group"], state["next_prompt"]
        self._retry = deque((prompt, failures) for prompt, failures in state["retry"])
        self._failures = Counter(dict(state["failures"]))
        self._next_request, self.committed_step = state["next_request"], state["committed_step"]
        self._silent = state["silent"]
        if self._controller is not None and state["threshold"] is not None:
            log_threshold, ratios = state["threshold"]
            arrays = [np.frombuffer(r, np.float32) for r in ratios]
            self._controller.restore({"log_threshold": log_threshold, "log_ratios": arrays})
        counts = Counter(self.counts)
        for step, sources, seq, log_threshold, committed, following, again_seq, world in state["steps"]:
            batch = self._collate(step, [load(*s) for s in sources])
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
                entry.shards = make_shards(batch, entry.decision, world, self.config.rollout.temperature)
        self.counts = counts
        if state["scoring"] is not None:
            step, sources, number, min_version = state["scoring"]
            batch = self._collate(step, [load(*s) for s in sources])
            self._scoring = (batch, self._score_request(batch, number, min_version))

    # ---- figures --------------------------------------------------------------------------------

    @property
    def queue_bytes(self) -> int:
        """Bytes of trajectories that wait to be trained."""
        waiting = sum(s.batch.nbytes for s in self._steps.values() if not s.committed)
        return self.book.nbytes + waiting + (self._assembling.nbytes if self._assembling else 0)

    @property
    def queued(self) -> int:
        """Trajectories acknowledged, neither trained nor dropped."""
        return self.counts["trajectories_acked"] - self.counts["trajectories_trained"] - sum(self.dropped.values())

    def held(self) -> int:
        """The same number counted from what is really held; a test compares the two."""
        waiting = sum(len(s.batch.groups) for s in self._steps.values() if not s.committed)
        return self.book.held + waiting + (len(self._assembling.groups) if self._assembling else 0)

    def waiting_for(self) -> str:
        """Why the next step cannot be served, in words."""
        if self._scoring is not None:
            return f"scores of step {self._scoring[0].step} from the policy replica"
        return self.ledger.waiting_for()
