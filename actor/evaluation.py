"""Held-out evaluations that an actor runs beside its rollouts. Pure."""

import logging
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np

from actor.rollout import Rollout
from actor.tasks.base import PromptItem
from common.wire import EvaluationResult

EVALUATION_ID = 1 << 62  # request ids of evaluations; groups count from 0
EVALUATION_STRIDE = 1 << 24  # prompts of one evaluation

log = logging.getLogger("actor")


@dataclass
class _Evaluation:
    items: dict[int, PromptItem]
    prompts: int  # asked for; those without an item failed
    rewards: dict[int, float] = field(default_factory=dict)
    lengths: dict[int, int] = field(default_factory=dict)
    versions: list[int] = field(default_factory=list)


class Evaluations:
    """Those under way; a prompt or verifier that fails counts as a reward of 0."""

    def __init__(self, task: str, counters: Counter[str]) -> None:
        self._task, self._counters = task, counters
        self._running: dict[int, _Evaluation] = {}

    def start(self, number: int, prompts: int, make: Callable[[int], PromptItem]) -> EvaluationResult | None:
        """Evaluation ``number`` of held-out prompts ``[0, prompts)``; its result if none of them can be made."""
        items: dict[int, PromptItem] = {}
        for n in range(prompts):
            try:
                items[n] = make(n)
            except Exception as error:  # noqa: BLE001  # a task is foreign code
                self._counters["evaluation_failures"] += 1
                log.warning("held-out prompt %d of %s counts as 0: %s: %s", n, self._task, type(error).__name__, error)
        self._running[number] = _Evaluation(items, prompts)
        return self._finish(number) if not items else None

    def requests(self, number: int) -> Iterator[tuple[int, PromptItem]]:
        """(request id, question) of every prompt."""
        if number in self._running:
            for n, item in self._running[number].items.items():
                yield EVALUATION_ID + number * EVALUATION_STRIDE + n, item

    def take(self, rollout: Rollout, reward: float) -> EvaluationResult | None:
        """One prompt is done; the result once all are."""
        number, n = divmod(rollout.request_id - EVALUATION_ID, EVALUATION_STRIDE)
        evaluation = self._running[number]
        evaluation.rewards[n] = reward
        evaluation.lengths[n] = rollout.sampled
        for turn in rollout.turns:
            evaluation.versions += [int(turn.completion.versions.min()), int(turn.completion.versions.max())]
        return self._finish(number) if len(evaluation.rewards) == len(evaluation.items) else None

    def _finish(self, number: int) -> EvaluationResult:
        evaluation = self._running.pop(number)
        versions = evaluation.versions or [-1]
        return EvaluationResult(
            evaluation=number,
            version_min=min(versions),
            version_max=max(versions),
            rewards=np.array([evaluation.rewards.get(n, 0.0) for n in range(evaluation.prompts)], np.float32),
            lengths=np.array([evaluation.lengths.get(n, 0) for n in range(evaluation.prompts)], np.int32),
        )
