"""Held-out evaluations that an actor runs beside its rollouts. Pure."""

import hashlib
import logging
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from actor.rollout import Rollout
from actor.tasks.base import PromptItem
from actor.tasks.foreign import words_of_failure
from common.config import MAX_HELD_OUT
from common.mixture import Mixture
from common.wire import NO_ANSWER, EvaluationResult

EVALUATION_ID = 1 << 62  # request ids of evaluations; groups count from 0
EVALUATION_STRIDE = MAX_HELD_OUT  # request ids of one evaluation

log = logging.getLogger("actor")


def answer_key(text: str | None) -> int:
    """A number in int64 that is the same for the same answer in any width and spacing; NO_ANSWER for none."""
    plain = " ".join(unicodedata.normalize("NFKC", text or "").split())
    if not plain:
        return NO_ANSWER
    digest = hashlib.blake2b(plain.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True) or 1


@dataclass(frozen=True)
class Scored:
    """What one completion was worth; a failed one is worth nothing."""

    reward: float = 0.0
    channels: dict[str, float] = field(default_factory=dict)
    answer: int = NO_ANSWER
    tokens: int = 0


@dataclass
class _Evaluation:
    items: dict[int, PromptItem]
    prompts: int  # asked for; those without an item failed
    samples: int  # completions of each
    scored: dict[tuple[int, int], Scored] = field(default_factory=dict)  # by prompt and sample
    versions: list[int] = field(default_factory=list)


class Evaluations:
    """Those under way; a completion whose prompt or verifier fails counts as a reward of 0, and as not correct."""

    def __init__(
        self, labels: Sequence[str], channels: Sequence[Sequence[str]], schedule: Mixture, counters: Counter[str]
    ) -> None:
        """Of each task that ``schedule`` mixes its label and the names of its reward channels."""
        self._labels, self._channels, self._schedule = labels, channels, schedule
        self._counters = counters
        self._running: dict[int, _Evaluation] = {}
        self._last: EvaluationResult | None = None

    def start(
        self, number: int, prompts: int, samples: int, make: Callable[[int], PromptItem]
    ) -> tuple[list[tuple[int, PromptItem]], EvaluationResult | None]:
        """Evaluation ``number`` of held-out prompts ``[0, prompts)``: (request id, question) of each to sample.

        And its result if there is nothing to wait for: no prompt can be made, or a broker that lost our
        answer asks a second time.
        """
        if number in self._running:
            return [], None
        if self._last is not None and self._last.evaluation == number:
            return [], self._last
        items: dict[int, PromptItem] = {}
        for n in range(prompts):
            try:
                items[n] = make(n)
            except (Exception, SystemExit) as error:  # noqa: BLE001  # a task is foreign code
                self._counters["evaluation_failures"] += 1
                task = self._labels[self._schedule.place(n)[0]]
                log.warning("held-out prompt %d of %s counts as 0: %s", n, task, words_of_failure(error))
        self._running[number] = _Evaluation(items, prompts, samples)
        first = EVALUATION_ID + number * EVALUATION_STRIDE
        return [(first + n, item) for n, item in items.items()], None if items else self._finish(number)

    def take(self, rollout: Rollout, scored: Scored) -> EvaluationResult | None:
        """One completion is done; the result once all are."""
        number, n = divmod(rollout.request_id - EVALUATION_ID, EVALUATION_STRIDE)
        evaluation = self._running[number]
        evaluation.scored[n, rollout.sibling] = scored
        for turn in rollout.turns:
            evaluation.versions += [int(turn.completion.versions.min()), int(turn.completion.versions.max())]
        whole = len(evaluation.scored) == len(evaluation.items) * evaluation.samples
        return self._finish(number) if whole else None

    def _finish(self, number: int) -> EvaluationResult:
        evaluation = self._running.pop(number)
        order = [(n, sample) for n in range(evaluation.prompts) for sample in range(evaluation.samples)]
        scored = [evaluation.scored.get(place, Scored()) for place in order]
        known = [name for channels in self._channels for name in channels]
        names = list(dict.fromkeys(known + [name for one in scored for name in one.channels]))
        tasks, _ = self._schedule.places([n for n, _ in order])
        rows = [self._row(one, names, self._channels[task]) for one, task in zip(scored, tasks, strict=True)]
        versions = evaluation.versions or [-1]
        self._last = EvaluationResult(
            evaluation=number,
            version_min=min(versions),
            version_max=max(versions),
            rewards=np.array([one.reward for one in scored], np.float32),
            lengths=np.array([one.tokens for one in scored], np.int32),
            samples=evaluation.samples,
            channel_names=names,
            channels=np.array(rows, np.float32).reshape(len(rows), len(names)),
            answers=np.array([one.answer for one in scored], np.int64),
        )
        return self._last

    def _row(self, one: Scored, names: Sequence[str], of_task: Sequence[str]) -> list[float]:
        """NaN where its task has no such channel, or it failed; what failed is not ``correct``."""
        failed = {"correct": 0.0} if not one.channels and "correct" in of_task else {}
        return [{**failed, **one.channels}.get(name, float("nan")) for name in names]
