"""Rollouts on their way: the turns of every sibling, and what becomes of a group. Pure.

::

    start -> SampleRequest -> Completion -> take: the environment replies -> SampleRequest -> ... -> ended

Token in, token out: a turn's prompt is the exact ids of everything before it and what the
environment said since; nothing is ever decoded and encoded again. An agent behind the gateway
(actor.gateway) may begin another conversation: a ``fresh`` turn, whose segment of the trajectory
has its own prompt alone as context.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from actor.engine.base import Completion
from actor.tasks.base import Block, FittedTask, MultiTurnTask, PromptItem, Task
from common.config import RolloutSection
from common.errors import TaskError

Ids = NDArray[np.int32]


@dataclass(frozen=True, eq=False)
class Turn:
    """What the policy was given and what it sampled."""

    given: Ids  # [n] the first turn's prompt, then what the environment said; a fresh turn's whole prompt
    completion: Completion
    fresh: bool = False  # what came before is not in its context
    exemplar: bool = False  # nobody sampled it: a person's answer


@dataclass(eq=False)
class Rollout:
    """One sibling."""

    request_id: int  # the group's, or one of an evaluation
    sibling: int
    item: PromptItem
    turns: list[Turn] = field(default_factory=list)
    given: Ids | None = None  # of the turn being sampled
    date: int = -1  # a model that never changes is every version: its grant's, or -1 for what the engine says
    question: int = -1  # its number in its task, where that is trained on
    exemplar: str | None = None  # a person's answer that stands in a sampled one's place
    blocks: Sequence[Block] = ()  # of its completions, once they are scored
    began: int = 0  # when, by the tracer's clock, if the group is one that is followed

    @property
    def context(self) -> Ids:
        """Exact ids of every turn so far."""
        parts = [part for turn in self.turns for part in (turn.given, turn.completion.token_ids)]
        return np.concatenate(parts) if parts else np.zeros(0, np.int32)

    @property
    def sampled(self) -> int:
        """Tokens of all turns."""
        return sum(len(turn.completion.token_ids) for turn in self.turns)

    def dated(self, completion: Completion) -> Completion:
        """``completion`` with the versions that are to be told."""
        if self.date < 0:
            return completion
        return replace(completion, versions=np.full_like(completion.versions, self.date))

    def take(self, completion: Completion) -> None:
        """The turn that was asked for has been sampled."""
        assert self.given is not None
        self.turns.append(Turn(self.given, completion, exemplar=self.exemplar is not None))
        self.given = None


@dataclass
class _Group:
    wanted: int  # siblings that the broker waits for
    alive: int  # that may still end
    spare: bool  # whether more were started than are wanted: places are then given in the order of ending
    ended: int = 0
    failed: int = 0


class Rollouts:
    """Every rollout that an actor has started and not finished. Raises ConfigError if ``task`` needs more room."""

    def __init__(self, rollout: RolloutSection, task: Task) -> None:
        self._rollout, self._task = rollout, task
        if isinstance(task, FittedTask):
            task.fit(rollout)
        self._rollouts: dict[tuple[int, int], Rollout] = {}
        self._groups: dict[int, _Group] = {}

    def __len__(self) -> int:
        return len(self._rollouts)

    def request_ids(self) -> set[int]:
        """Of everything started."""
        return set(self._groups)

    def start(self, request_id: int, item: PromptItem, siblings: int, wanted: int) -> list[Rollout]:
        """Open ``siblings`` rollouts on one question, of which the first ``wanted`` to end are kept."""
        self._groups[request_id] = _Group(wanted, siblings, siblings > wanted)
        started = [Rollout(request_id, index, item) for index in range(siblings)]
        self._rollouts.update({(request_id, rollout.sibling): rollout for rollout in started})
        return started

    def get(self, request_id: int, sibling: int) -> Rollout | None:
        """None if it has ended, or was cancelled."""
        return self._rollouts.get((request_id, sibling))

    def reply(self, rollout: Rollout) -> Ids | None:
        """What the environment says to the last turn; None at the end.

        Raises TaskError for a reply that the configuration has no room for, and whatever the task raises.
        """
        task, limits = self._task, self._rollout
        if (
            rollout.exemplar is not None
            or not isinstance(task, MultiTurnTask)
            or len(rollout.turns) >= limits.max_turns
        ):
            return None
        reply = task.reply(rollout.item, [turn.completion.token_ids for turn in rollout.turns])
        if reply is not None and len(reply) > limits.max_reply_tokens:
            raise TaskError(
                f"the environment said {len(reply)} tokens; raise rollout.max_reply_tokens={limits.max_reply_tokens}"
            )
        return reply

    def ended(self, rollout: Rollout) -> tuple[int, Sequence[int]]:
        """``rollout`` is whole: its place among the siblings, and whom to cancel because enough have ended."""
        group = self._groups[rollout.request_id]
        del self._rollouts[rollout.request_id, rollout.sibling]
        place = group.ended if group.spare else rollout.sibling
        group.alive -= 1
        group.ended += 1
        spare: list[int] = []
        if group.ended + group.failed >= group.wanted:
            spare = [sibling for number, sibling in self._rollouts if number == rollout.request_id]
            for sibling in spare:
                del self._rollouts[rollout.request_id, sibling]
            group.alive = 0
        self._close(rollout.request_id, group)
        return place, spare

    def failed(self, rollout: Rollout) -> int | None:
        """``rollout`` will never be whole: the place that stays empty, or None if another can take it."""
        group = self._groups[rollout.request_id]
        del self._rollouts[rollout.request_id, rollout.sibling]
        group.alive -= 1
        place: int | None = None
        if group.ended + group.failed + group.alive < group.wanted:
            group.failed += 1
            place = group.wanted - group.failed if group.spare else rollout.sibling
        self._close(rollout.request_id, group)
        return place

    def _close(self, request_id: int, group: _Group) -> None:
        if group.alive == 0:
            del self._groups[request_id]
