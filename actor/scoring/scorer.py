"""From a turn that has ended to what comes next: the environment's reply, or the rollout's channels.

::

    turn -> the task, in the loop if it is quick, else in a thread -> reply ------------------------> poll
                                                                   -> channels -> reward models ---> poll
    judge (an agent's channels) ------------------------------------------------^

Nothing here waits; whatever ends is told of by :meth:`Scorer.poll`, in the order in which it ended.
"""

import logging
from collections import Counter, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from actor.rewards import combine
from actor.rollout import Ids, Rollout
from actor.scoring.exemplars import Exemplars
from actor.scoring.pool import Pool
from actor.scoring.rubric import Judged
from actor.scoring.texts import Texts, part_of
from actor.tasks.base import Task
from actor.tasks.foreign import words_of_failure
from common.config import RunConfig
from common.errors import TaskError
from common.rewards import RewardSection

if TYPE_CHECKING:
    from actor.scoring.judges import Judges, Verdict

REWARD_FAILURES, JUDGE_FAILURES = "reward_failures", "judge_failures"

log = logging.getLogger("actor.scoring")


@dataclass(frozen=True, eq=False)
class Outcome:
    """What came of a turn: a reply, or channels and their sum, or why neither."""

    rollout: Rollout
    reply: Ids | None = None
    channels: dict[str, float] = field(default_factory=dict)
    reward: float = 0.0
    error: str = ""
    counted: str = ""  # the counter of a failure


def _open_judges(section: RewardSection) -> "Judges | None":
    if not section.models:
        return None
    from actor.scoring.judges import Judges

    return Judges(section)


class Scorer:
    """Of one actor. Raises ConfigError, ModelError or TaskError for what cannot be run."""

    def __init__(self, config: RunConfig, task: Task, exemplars: Exemplars | None, counters: Counter[str]) -> None:
        self._config, self._task, self._exemplars, self._counters = config, task, exemplars, counters
        section = config.reward
        self._labels = config.task.labels
        self._weights = [entry.reward_weights for entry in config.task.entries.values()]
        self._pool = Pool(section.threads, section.deadline_s)
        self._judges = _open_judges(section)
        self._texts = Texts(task, config.rollout_path) if section.models else None
        self._asked: dict[tuple[int, int], tuple[Rollout, dict[str, float]]] = {}  # whom models are asked about
        self._threads: dict[tuple[int, int], Rollout] = {}  # who is in a thread
        self._ready: deque[Outcome] = deque()

    @property
    def pending(self) -> int:
        """Rollouts that something is still to come of."""
        return len(self._asked) + len(self._threads) + len(self._ready)

    @property
    def counters(self) -> dict[str, float]:
        """What happened so far, by name."""
        own = {"scoring": float(self.pending)}
        return own | (self._judges.counters if self._judges is not None else {})

    def turn(self, rollout: Rollout, work: Callable[[], Ids | dict[str, float]]) -> None:
        """``work()`` is the task's word on ``rollout``: a reply, or its channels."""
        key = (rollout.request_id, rollout.sibling)
        if getattr(part_of(self._task, rollout.item), "slow", False):
            self._threads[key] = rollout
            self._pool.submit(rollout, work)
            return
        try:
            self._said(rollout, work())
        except (Exception, SystemExit) as error:  # noqa: BLE001  # a task is foreign code
            self._fail(rollout, error)

    def judge(self, rollout: Rollout, channels: dict[str, float]) -> None:
        """Ask the reward models about a whole ``rollout``, then add up. Raises TaskError for unusable channels."""
        wanted = self._models_for(rollout, channels)
        if self._judges is None or not wanted:
            self._add_up(rollout, channels, frozenset())
            return
        assert self._texts is not None
        question = self._texts.question(rollout.item, rollout.turns[0].given)
        references: tuple[str, ...] = ()
        if self._exemplars is not None:
            label = self._labels[rollout.item.task]
            references = self._exemplars.references(label, rollout.question, question)
            references = tuple(text for text in references if text != rollout.exemplar)
        self._asked[rollout.request_id, rollout.sibling] = (rollout, channels)
        self._judges.submit(rollout, wanted, Judged(question, self._texts.answer(rollout.turns), references))

    def _models_for(self, rollout: Rollout, channels: Mapping[str, float]) -> list[str]:
        """Those whose word counts: its task weighs them, and their gate is open."""
        section, weights = self._config.reward, self._weights[rollout.item.task]
        return [name for name in section.models if name in weights and section.opens(name, channels)]

    def poll(self) -> list[Outcome]:
        """What has come since. Raises TaskError if verifiers hang and cannot be stopped."""
        for done in self._pool.poll():
            rollout: Rollout = done.owner
            key = (rollout.request_id, rollout.sibling)
            if self._threads.get(key) is not rollout:
                continue  # dropped as it ended
            del self._threads[key]
            if done.error is not None:
                self._fail(rollout, done.error)
                continue
            try:
                self._said(rollout, done.result)
            except (Exception, SystemExit) as error:  # noqa: BLE001  # a task is foreign code
                self._fail(rollout, error)
        for verdict in self._judges.poll() if self._judges is not None else ():
            self._judged(verdict)
        found, self._ready = list(self._ready), deque()
        return found

    def _said(self, rollout: Rollout, word: Ids | dict[str, float]) -> None:
        """The task's word. Raises TaskError if it is neither a reply nor channels."""
        if isinstance(word, dict):
            self.judge(rollout, word)
        elif isinstance(word, np.ndarray):
            self._ready.append(Outcome(rollout, reply=word))
        else:
            raise TaskError(f"returned {word!r:.60}: a reward is a dictionary of channels, a reply an array of ids")

    def _judged(self, verdict: "Verdict") -> None:
        rollout, channels = self._asked.pop((verdict.owner.request_id, verdict.owner.sibling))
        assert self._judges is not None
        fatal = []
        for name, reason in sorted(verdict.failures.items()):
            self._counters[JUDGE_FAILURES] += 1
            if self._config.reward.models[name].on_failure == "exclude":
                fatal.append(f"reward model {name}: {reason}")
                continue
            self._counters["judge_neutral"] += 1
            if not self._judges.is_down(name):  # that was said once
                place = f"{rollout.request_id}.{rollout.sibling}"
                log.warning("rollout %s takes its group's mean of %s: %s", place, name, reason)
        if fatal:
            self._ready.append(Outcome(rollout, error="; ".join(fatal)))
            return
        try:
            self._add_up(rollout, channels | verdict.scores, frozenset(verdict.failures))
        except TaskError as error:
            self._fail(rollout, error)

    def _add_up(self, rollout: Rollout, channels: dict[str, float], lacking: frozenset[str]) -> None:
        """Names are those of the task first, then the models' in the configuration's order, for equal messages."""
        section, weights = self._config.reward, self._weights[rollout.item.task]
        own = {name: value for name, value in channels.items() if name not in section.models}
        ordered = own | {name: channels[name] for name in section.models if name in channels}
        shut = {name for name in section.models if not section.opens(name, channels)}
        reward = combine(ordered, weights, section, lacking | shut)
        self._ready.append(Outcome(rollout, channels=ordered, reward=reward))

    def _fail(self, rollout: Rollout, error: BaseException) -> None:
        """A task whose own code fails costs one sibling: that is not the policy's fault."""
        label = self._labels[rollout.item.task]
        reason = f"{label}: {words_of_failure(error)}"
        self._ready.append(Outcome(rollout, error=reason, counted=REWARD_FAILURES))

    def drop(self, request_id: int, sibling: int) -> None:
        """Nobody waits for this rollout any more; one that is not here is no error."""
        asked = self._asked.pop((request_id, sibling), None)
        if asked is not None and self._judges is not None:
            self._judges.drop(asked[0])
        thread = self._threads.pop((request_id, sibling), None)
        if thread is not None:
            self._pool.drop(thread)

    def close(self) -> None:
        """Stop everything."""
        self._asked.clear()
        self._threads.clear()
        self._ready.clear()
        self._pool.close()
        if self._judges is not None:
            self._judges.close()
