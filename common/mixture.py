"""Which task a prompt belongs to, and which of its questions it is, where several tasks are mixed.

A task with share r has its m-th turn within prompts ``[m / r, (m + 1) / r)``, earliest deadline first.
So of the first n prompts every task has r n, less than one more or fewer, and of any window less than
two; its own questions count 0, 1, 2, ... without gaps. The order repeats after a period, so a look-up
is a division and a table. Broker and actors work it out alike from ``task.mix``.
"""

import math
from collections.abc import Sequence
from fractions import Fraction
from functools import lru_cache

import numpy as np
from numpy.typing import ArrayLike, NDArray

from common.errors import ConfigError

LONGEST_PERIOD = 4096  # prompts; ratios that would need a longer one are rounded to it

Longs = NDArray[np.int64]


def turns_of(ratios: Sequence[float]) -> list[int]:
    """Each task's turns in one period: exact where it is short enough, else by largest remainder.

    Raises :class:`ConfigError` for a ratio that is not positive, or too small to have a turn.
    """
    if not ratios or not all(math.isfinite(ratio) and ratio > 0 for ratio in ratios):
        raise ConfigError(f"ratios of mixed tasks {list(ratios)}: must be positive and finite")
    exact = [Fraction(str(float(ratio))) for ratio in ratios]  # as it is written: .1 is one tenth
    shares = [ratio / sum(exact) for ratio in exact]
    period = math.lcm(*(share.denominator for share in shares))
    if period <= LONGEST_PERIOD:
        return [int(share * period) for share in shares]
    if min(shares) * LONGEST_PERIOD < 1:
        raise ConfigError(
            f"ratios of mixed tasks {list(ratios)}: the least must be at least 1/{LONGEST_PERIOD} of their sum"
        )
    turns = [int(share * LONGEST_PERIOD) for share in shares]
    by_remainder = sorted(range(len(shares)), key=lambda task: turns[task] - shares[task] * LONGEST_PERIOD)
    for task in by_remainder[: LONGEST_PERIOD - sum(turns)]:
        turns[task] += 1
    return turns


def _order(turns: Sequence[int]) -> list[int]:
    """The task of every prompt of one period."""
    period, taken = sum(turns), [0] * len(turns)
    order = []
    for prompt in range(period):
        ready = [task for task in range(len(turns)) if taken[task] * period < (prompt + 1) * turns[task]]
        task = min(ready, key=lambda t: -(-(taken[t] + 1) * period // turns[t]))
        taken[task] += 1
        order.append(task)
    return order


class Mixture:
    """The schedule of tasks mixed in ``ratios``, numbered in their order."""

    def __init__(self, ratios: Sequence[float]) -> None:
        """See :func:`turns_of` for what it raises."""
        turns = turns_of(ratios)
        self.turns = np.array(turns, np.int64)  # [K] of each task in a period
        self.period = sum(turns)
        self._task = np.array(_order(turns), np.int64)  # [period]
        self._within = np.zeros(self.period, np.int64)  # [period] how many of its own turns came before
        self._turn_at = []  # of each task: where in the period its turns are
        for task in range(len(turns)):
            at = np.flatnonzero(self._task == task)
            self._within[at] = np.arange(len(at))
            self._turn_at.append(at)
        self._turns, self._tasks, self._own = turns, self._task.tolist(), self._within.tolist()  # for one prompt

    def places(self, prompts: ArrayLike) -> tuple[Longs, Longs]:
        """``(task, its own question)`` of each of ``prompts [n]``, two arrays ``[n]``."""
        period, within = np.divmod(np.asarray(prompts, np.int64), self.period)
        task = self._task[within]
        return task, period * self.turns[task] + self._within[within]

    def place(self, prompt: int) -> tuple[int, int]:
        """The same of one prompt."""
        period, within = divmod(prompt, self.period)
        task = self._tasks[within]
        return task, period * self._turns[task] + self._own[within]

    def prompt(self, task: int, question: int) -> int:
        """Which prompt is ``question`` of ``task``: the inverse of :meth:`place`."""
        period, turn = divmod(question, int(self.turns[task]))
        return period * self.period + int(self._turn_at[task][turn])


@lru_cache(maxsize=16)
def mixture(ratios: tuple[float, ...]) -> Mixture:
    """The schedule of ``ratios``, worked out once."""
    return Mixture(ratios)
