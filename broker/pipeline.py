"""The broker's decisions, without a socket: trajectories in, shards out.

::

    grant -> admit -> group -> (whole groups) select -> collate -> score -> reject -> shards -> commit

Every method is a function of its arguments and of what came before; nothing here looks at a clock
or a file.
"""

from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from broker.curriculum import Curriculum
from broker.fates import Fates
from broker.fixed import fixed_settings
from broker.groups import GroupBook
from broker.ledger import StalenessLedger
from broker.mixing import mix
from broker.scoring import Asked
from broker.steps import DecidedStep, LoadScores, Steps
from broker.trajectories import LoadTrajectory, Trajectory, unpack_all
from common.config import MEGABYTE, RunConfig
from common.errors import ProtocolError
from common.frozen import words_of
from common.routing import Routing
from common.wire import Ack, Grant, ScoreRequest, ScoreResult, Shard, Trajectories

RESAMPLE_STEPS = 8  # steps' worth of groups without signal in a row, after which they are trained after all
PROMPT_TRIES = 3  # a prompt whose groups failed this often in a row is left out: it may be what ends its actors


@dataclass(slots=True)
class Arrived:
    """A message's trajectories, and what is wrong with them."""

    message: Trajectories
    trajectories: list[Trajectory]
    faults: dict[int, str]  # by place
    misfit: str  # of all alike; "" for nothing


class Pipeline:
    """What the broker knows of the run's data."""

    def __init__(self, config: RunConfig, vocab_size: int, routing: Routing | None = None) -> None:
        """``routing``: what is recorded where ``rollout.routing_replay`` asks for it (:func:`read_routing`)."""
        self.config = config
        self.vocab_size = vocab_size
        rollout = config.rollout
        assert (routing is not None) == rollout.routing_replay
        self.max_length = rollout.max_length
        self.expert_count, self.routed = (routing.experts, routing.width) if routing else (0, 0)
        self._experts_per_token = routing.per_token if routing else 1
        config.check_room(self.routed)
        self.ledger = StalenessLedger(config.staleness.first, rollout.groups_per_step, config.run.steps)
        self.book = GroupBook(rollout.group_size)
        self.counts: Counter[str] = Counter()
        self.dropped: Counter[str] = Counter()
        self.refused: Counter[str] = Counter()
        self.turned_away: Counter[str] = Counter()  # never written down: not awaited, by reason; "" for repeats
        self.fates = Fates()
        self.steps = Steps(config, self.counts)
        self.curriculum = Curriculum(config)
        self._next_group = 0
        self._next_prompt = 0  # the curriculum's turn
        self._retry: deque[tuple[int, int]] = deque()  # (prompt, failures so far)
        self._failures: Counter[int] = Counter()  # by prompt, in a row
        self.committed_step = -1
        self.checkpointed_step = -1  # the learner can go on behind it whatever happens
        self._silent = 0  # groups without signal in a row
        self.setbacks: Counter[str] = Counter()  # groups given up since an actor's last whole one

    # ---- grants ---------------------------------------------------------------------------------

    def begin(self, first_group: int, first_request: int) -> None:
        """Number groups and requests apart from those of an earlier broker of this run that kept no journal."""
        self._next_group = first_group
        self.steps.number_from(first_request)

    @property
    def fixed_settings(self) -> dict[str, Any]:
        """What a broker that goes on with this run may not have otherwise, see :func:`fixed_settings`."""
        return fixed_settings(self.config, {"vocab_size": self.vocab_size, "experts": self.expert_count})

    def start_at(self, step: int) -> None:
        """The learner's first step; everything before it belongs to an earlier life of the run."""
        if self.ledger.next_step == 0 and step > 0 and not self.steps.waiting:
            self.ledger.start_at(step)
            self.committed_step = step - 1
            self._next_prompt = step * self.config.rollout.groups_per_step

    def questions(self, sizes: Sequence[int]) -> None:
        """An actor has said how many training questions each task has, see :meth:`Curriculum.begin`."""
        self.curriculum.begin(sizes)

    def set_budget(self, budget: int) -> None:
        """From now on groups are granted under another staleness budget."""
        self.ledger.set_budget(budget)
        self.counts["budget_moves"] += 1

    def grant(self, actor: str, count: int, version: int) -> Grant | None:
        """Promise up to ``count`` groups to ``actor``, started at ``version`` or later; None if no room."""
        count = min(count, self.ledger.grantable(version), self.groups_that_fit())
        return self.promise(actor, count, version) if count > 0 else None

    def promise(self, actor: str, count: int, version: int) -> Grant:
        """Grant ``count`` groups, for which there is room, or was when the journal wrote it down."""
        groups, prompts = [], []
        for _ in range(count):
            prompt = self._retry.popleft()[0] if self._retry else self._new_prompt()
            group, self._next_group = self._next_group, self._next_group + 1
            self.ledger.promise(group, version)
            self.book.grant(group, prompt, actor, version)
            groups.append(group)
            prompts.append(prompt)
        self.counts["groups_granted"] += count
        return Grant(version, -1, 0, np.array(groups, np.int64), np.array(prompts, np.int64))

    def task_of(self, prompt: int) -> str:
        """The label of a prompt's task."""
        section = self.config.task
        return section.labels[section.mixture.place(prompt)[0]]

    def _new_prompt(self) -> int:
        turn, self._next_prompt = self._next_prompt, self._next_prompt + 1
        return self.curriculum.prompt(turn)

    def groups_that_fit(self) -> int:
        """Groups whose largest possible size still fits in the queue's bound, those promised counted in full."""
        return self.groups_within(self.config.broker.queue_mb * MEGABYTE - self.queue_bytes)

    def groups_within(self, free: float, factor: float = 1.0) -> int:
        """Groups beyond those promised that fit in ``free`` bytes, at ``factor`` times their largest possible size."""
        return max(0, int(free // (self.config.rollout.largest_group(self.routed) * factor)) - self.ledger.promised)

    # ---- admission ------------------------------------------------------------------------------

    def admit(self, message: Trajectories, actor: str, newest_version: int, seq: int = -1) -> Ack:
        """Take what is sound, refuse the rest by name; a refused sibling gives its group up.

        ``seq`` is the number under which the journal holds the message.
        """
        return self.take(self.prepare(message, actor, newest_version, seq), actor)

    def prepare(self, message: Trajectories, actor: str, newest_version: int, seq: int) -> Arrived:
        """All that is looked at of ``message``; changes nothing."""
        faults = message.faults(self.vocab_size, newest_version, self.expert_count, self._experts_per_token)
        if not self.config.rollout.exemplars:
            unasked = "holds an exemplar's tokens, rollout.exemplars=0"
            faults |= {b: unasked for b in message.with_exemplars() if b not in faults}
        trajectories = unpack_all(message, actor, seq, self.book.prompts(message.groups))
        return Arrived(message, trajectories, faults, self.misfit(message))

    def take(self, arrived: Arrived, actor: str) -> Ack:
        """The changing part of :meth:`admit`."""
        if self._is_sound(arrived, actor):
            self._take_all(arrived.trajectories)
            return Ack([""] * len(arrived.trajectories), arrived.message.groups, arrived.message.siblings)
        reasons = []
        for index, trajectory in enumerate(arrived.trajectories):
            group = trajectory.group
            reason = self.book.refusal(group, trajectory.sibling, actor)
            if self.book.is_done(group):
                self.counts["repeats"] += 1
                reason = ""
            elif not reason:
                reason = arrived.faults.get(index, "") or self._refusal(trajectory) or arrived.misfit
                if reason:
                    self.give_up(group, "refused_sibling")
                else:
                    self._take(trajectory)
            if reason:
                self.refused[reason] += 1
            reasons.append(reason)
        return Ack(reasons, arrived.message.groups, arrived.message.siblings)

    def _is_sound(self, arrived: Arrived, actor: str) -> bool:
        """Whether nothing is wrong with a message of one group's siblings, as is usual."""
        message = arrived.message
        group = message.sole_group
        if group is None or arrived.faults or arrived.misfit:
            return False
        if not self.book.awaits_all(group, message.siblings.tolist(), actor):
            return False
        return min(message.summary[0]) >= self.book.min_version(group)

    def refuse(self, group: int, reason: str) -> None:
        """A trajectory of ``group`` came that was not even looked into (:mod:`broker.sifting`)."""
        self.refused[reason] += 1
        self.give_up(group, "refused_sibling")

    def misfit(self, message: Trajectories) -> str:
        """What of ``message`` is not as this run asks for it, all its trajectories alike."""
        if message.topk_ids.shape[1] != self.config.rollout.top_logprobs:
            asked = self.config.rollout.top_logprobs
            return f"{message.topk_ids.shape[1]} alternatives a token, rollout.top_logprobs={asked}"
        if message.experts.shape[1] != self.routed:
            on = str(self.config.rollout.routing_replay).lower()
            return (
                f"{message.experts.shape[1]} experts recorded of a token, this run's model has {self.routed} "
                f"(rollout.routing_replay={on})"
            )
        return ""

    def _refusal(self, trajectory: Trajectory) -> str:
        oldest, least = trajectory.oldest_version, self.book.min_version(trajectory.group)
        return f"sampled by version {oldest}, older than the grant's {least}" if oldest < least else ""

    def _take(self, trajectory: Trajectory) -> None:
        is_new, complete = self.book.add(trajectory)
        if not is_new:
            self.counts["repeats"] += 1
            return
        self._taken([trajectory], complete)

    def _take_all(self, trajectories: Sequence[Trajectory]) -> None:
        """Siblings of one group with which nothing is wrong."""
        self._taken(trajectories, self.book.add_all(trajectories[0].group, trajectories))

    def _taken(self, trajectories: Sequence[Trajectory], complete: bool) -> None:
        self.counts["trajectories_acked"] += len(trajectories)
        self.counts["tokens_generated"] += sum(t.sampled_tokens for t in trajectories)
        if complete:
            self._settle(trajectories[0].group, "sibling_failed")

    def _settle(self, group: int, reason: str) -> None:
        """Nothing more will come of ``group``: train what there is of it, or give it up."""
        members = self.book.members(group)
        if not self.book.enough(group) or not any(t.sampled_tokens for t in members):  # exemplars alone are no group
            self.give_up(group, reason)
            return
        self.counts["groups_whole"] += 1
        self._failures.pop(self.book.prompt(group), None)
        self.setbacks.pop(self.book.actor(group), None)
        self.curriculum.settled(self.book.prompt(group), members)
        if self.config.advantage.zero_signal == "resample" and self._resample(members):
            self.give_up(group, "no_signal", again=False)
            return
        self.ledger.complete(group, min([t.oldest_version for t in members]))

    def _resample(self, members: list[Trajectory]) -> bool:
        """Whether a group without signal is replaced by another prompt's; not for ever."""
        rewards = mix(members, self.config, {}, normalise=False).rewards
        if rewards.max() > rewards.min():
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
        if again and reason != "actor_lost":
            self.setbacks[self.book.actor(group)] += 1
        prompt, arrived = self.book.tombstone(group, reason)
        self.ledger.release(group)
        if arrived:
            self.dropped[reason] += len(arrived)
        self.counts["tokens_dropped"] += sum(t.sampled_tokens for t in arrived)
        self.fates.dropped(arrived, self.task_of(prompt), self.ledger.next_step)
        self.counts["groups_given_up"] += 1
        if again:
            self._failures[prompt] += 1
        if again and self._failures[prompt] < PROMPT_TRIES:
            self._retry.append((prompt, self._failures[prompt]))
        else:
            self._failures.pop(prompt, None)

    def actor_lost(self, actor: str) -> int:
        """Nothing more will come of what a lost actor owed; returns how many groups were given up for it."""
        owed = self.book.of_actor(actor)
        for group in owed:
            self.book.fail(group, -1)
            self._settle(group, "actor_lost")
        return sum(group not in self.book for group in owed)

    # ---- assembly -------------------------------------------------------------------------------

    def assemble(self, min_version: int, due: bool = False) -> ScoreRequest | None:
        """Choose and collate the next step if it is ready and due; returns what the policy must score of it.

        A step is due when it is at most ``broker.assemble_ahead`` ahead of the published version
        ``min_version``, which will score it: the later, the closer to the policy that trains on it;
        with ``due`` it is so whatever the setting says. Frozen models are asked with it
        (:attr:`requests`). With rejection off None is returned, and unless there are frozen models the
        step is finished at once.
        """
        due = due or self.ledger.next_step - min_version <= self.config.broker.assemble_ahead
        if self.scoring_step is not None or not due:
            return None
        chosen = self.ledger.select()
        if chosen is None:
            return None
        step = self.ledger.next_step
        members = [t for group in chosen for t in self.book.take(group)]
        self.ledger.assembled(chosen)
        self.curriculum.assembled(step)
        return self.steps.assemble(step, members, min_version)

    # ---- steps: see broker.steps ----------------------------------------------------------------

    @property
    def requests(self) -> dict[str, ScoreRequest]:
        """The requests under way, by scorer."""
        return self.steps.requests

    @property
    def scoring_step(self) -> int | None:
        """The step whose scores are awaited."""
        return self.steps.scoring_step

    @property
    def log_threshold(self) -> float:
        """log lambda of the next step to be thinned."""
        return self.steps.log_threshold

    def scored(self, result: ScoreResult, seq: int = -1) -> Asked | None:
        """See :meth:`Steps.scored`."""
        return self.steps.scored(result, seq)

    def rethin(self, step: int, min_version: int) -> ScoreRequest | None:
        """See :meth:`Steps.rethin`."""
        return self.steps.rethin(step, min_version)

    def shard(self, step: int, rank: int, world: int) -> Shard | None:
        """See :meth:`Steps.shard`. Raises :class:`ProtocolError` for a step that was forgotten."""
        if step < self.ledger.next_step and step not in self.steps:
            raise ProtocolError(
                f"step {step} is no longer held (committed up to {self.committed_step}); "
                "resume from a newer checkpoint or raise broker.retain_mb"
            )
        return self.steps.shard(step, rank, world)

    def has_shards(self, step: int, world: int) -> bool:
        """Whether the step's shards for ``world`` ranks were made already."""
        return self.steps.has_shards(step, world)

    def step(self, step: int) -> DecidedStep | None:
        """What is held of a decided step."""
        return self.steps.get(step)

    def commit(self, step: int) -> dict[str, Any] | None:
        """Step trained; returns its receipt the first time."""
        entry = self.steps.commit(step)
        if entry is None:
            return None
        self.committed_step = max(self.committed_step, step)
        self.counts["trajectories_trained"] += len(entry.batch.groups)
        self.fates.trained(entry.batch)
        return {**entry.receipt, "staleness_budget": self.ledger.budget, **self.curriculum.receipt(step)}

    def checkpointed(self, step: int) -> None:
        """Steps up to ``step`` will not be asked for again."""
        self.checkpointed_step = max(self.checkpointed_step, step)
        self.steps.checkpointed(step)

    # ---- state ----------------------------------------------------------------------------------

    def sources(self) -> list[int]:
        """Numbers of the journal's events that hold what is not trained and checkpointed yet."""
        found = [t.source[0] for group in self.book.groups() for t in self.book.members(group)]
        return sorted({seq for seq in found + self.steps.sources() if seq >= 0})

    def state(self) -> dict[str, Any]:
        """Everything that :meth:`restore` needs, small: trajectories and scores by their place in the journal."""
        return {
            "ledger": self.ledger.state(),
            "book": self.book.state(),
            "counts": dict(self.counts),
            "dropped": dict(self.dropped),
            "refused": dict(self.refused),
            "fates": self.fates.state(),
            "next_group": self._next_group,
            "next_prompt": self._next_prompt,
            "retry": [list(r) for r in self._retry],
            "failures": list(self._failures.items()),
            "committed_step": self.committed_step,
            "checkpointed_step": self.checkpointed_step,
            "silent": self._silent,
            "curriculum": self.curriculum.state(),
            **self.steps.state(),
        }

    def restore(self, state: dict[str, Any], load: LoadTrajectory, scores: LoadScores) -> None:
        """Take up where :meth:`state` was written; every decision comes out as it did, bit for bit."""
        self.ledger.restore(state["ledger"])
        self.book.restore(state["book"], load)
        for counter, name in ((self.counts, "counts"), (self.dropped, "dropped"), (self.refused, "refused")):
            counter.clear()
            counter.update(state[name])
        self.fates.restore(state["fates"])
        self._next_group, self._next_prompt = state["next_group"], state["next_prompt"]
        self._retry = deque((prompt, failures) for prompt, failures in state["retry"])
        self._failures = Counter(dict(state["failures"]))
        self.committed_step, self._silent = state["committed_step"], state["silent"]
        self.checkpointed_step = state.get("checkpointed_step", -1)  # which older snapshots lack
        self.curriculum.restore(state["curriculum"])
        self.steps.restore(state, load, scores)

    # ---- figures --------------------------------------------------------------------------------

    @property
    def queue_bytes(self) -> int:
        """Bytes of trajectories that wait to be trained."""
        return self.book.nbytes + sum(batch.nbytes for batch in self.steps.waiting)

    @property
    def queued(self) -> int:
        """Trajectories acknowledged, neither trained nor dropped."""
        return self.counts["trajectories_acked"] - self.counts["trajectories_trained"] - sum(self.dropped.values())

    def held(self) -> int:
        """The same number counted from what is really held; a test compares the two."""
        return self.book.held + sum(len(batch.groups) for batch in self.steps.waiting)

    def waiting_for(self) -> str:
        """Why the next step cannot be served, in words."""
        if self.scoring_step is not None:
            return f"scores of step {self.scoring_step} from {', '.join(map(words_of, self.requests))}"
        owed = self.book.owed()
        return self.ledger.waiting_for() + (f" ({owed})" if owed else "")
