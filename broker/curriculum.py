"""Which questions are asked: what was passed of each, and which are not asked again.

::

    turn -> task, its own index -> (skip what is retired) -> prompt
    whole group -> how many of it passed -> history of its question, pass rates of the step

ScaleRL's No-Positive-Resampling (algorithms.md 5.3): with ``advantage.skip_passed`` a question whose
siblings passed at least that share of all attempts is retired when its task's next epoch begins.
Mixed tasks keep their ratio: a task that skips goes on to its own next question. Pure: a function
of what the pipeline was told, like the pipeline that it belongs to.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from broker.trajectories import Trajectory
from common.config import RunConfig
from common.questions import question_of

PASS_CHANNEL, PASSED_ABOVE = "correct", 0.5
MAX_QUESTIONS = 1 << 23  # of one task: a history takes 8 bytes of each, and the retired are walked over
RATES = ("0", *(f"0.{tenth}" for tenth in range(1, 10)), "1")  # labels of pass_rate


def passed(trajectory: Trajectory) -> bool:
    """By its channel ``correct`` if it has one, else by any reward above 0."""
    if PASS_CHANNEL in trajectory.channels:
        return trajectory.channels[PASS_CHANNEL] > PASSED_ABOVE
    return trajectory.reward > 0


def pass_rate(right: int, tries: int) -> int:
    """Which of RATES: 0 and 1 are for none and all of the group, what lies between goes to the nearest tenth."""
    if right in (0, tries):
        return 10 * (right > 0)
    return min(9, max(1, (20 * right + tries) // (2 * tries)))


class History:
    """Passes and attempts of each question of one task, and which of them are retired."""

    def __init__(self, seed: int, size: int, skip_passed: float) -> None:
        self.seed, self.size, self.skip_passed = seed, size, skip_passed
        self.passes = np.zeros(size, np.int32)  # [size]
        self.tries = np.zeros(size, np.int32)  # [size]
        self.retired = np.zeros(size, np.bool_)  # [size] in the epoch under way
        self.skipped = 0  # of the task's own indices so far
        self.resets = 0  # how often every question was retired
        self._epoch = -1

    def note(self, own: int, right: int, tries: int) -> None:
        """The group that asked the task's index ``own`` is whole."""
        question = question_of(self.seed, own, self.size)
        self.passes[question] += right
        self.tries[question] += tries

    def draw(self, own: int) -> int:
        """The index to ask where ``own`` would be next if nothing was ever skipped."""
        own += self.skipped
        while True:
            if own // self.size != self._epoch:
                self._begin(own // self.size)
            if not self.retired[question_of(self.seed, own, self.size)]:
                return own
            own += 1
            self.skipped += 1

    def _begin(self, epoch: int) -> None:
        """Retire for good what was passed too often; where nothing would be left, everything is forgotten instead."""
        self._epoch = epoch
        self.retired |= (self.tries > 0) & (self.passes / np.maximum(self.tries, 1) >= self.skip_passed)
        if self.retired.all():
            self.passes[:], self.tries[:], self.retired[:] = 0, 0, False
            self.resets += 1

    def state(self) -> list[Any]:
        """What :meth:`restore` needs; only of questions that were asked."""
        asked = np.flatnonzero(self.tries)
        return [
            self._epoch, self.skipped, self.resets, np.flatnonzero(self.retired).astype("<u4").tobytes(),
            asked.astype("<u4").tobytes(), self.passes[asked].astype("<i4").tobytes(),
            self.tries[asked].astype("<i4").tobytes(),
        ]  # fmt: skip

    def restore(self, state: list[Any]) -> None:
        """Take up where :meth:`state` was written."""
        self._epoch, self.skipped, self.resets, retired, asked, passes, tries = state
        where = np.frombuffer(asked, "<u4")
        self.passes[:], self.tries[:], self.retired[:] = 0, 0, False
        self.passes[where], self.tries[where] = np.frombuffer(passes, "<i4"), np.frombuffer(tries, "<i4")
        self.retired[np.frombuffer(retired, "<u4")] = True


class Curriculum:
    """The order of prompts, for all tasks together."""

    def __init__(self, config: RunConfig) -> None:
        self._task, self._seed = config.task, config.run.seed
        self.skip_passed = config.advantage.skip_passed
        self.sizes: list[int] = []  # training questions of each task, 0 for no end; [] until an actor has said it
        self._histories: list[History | None] = []  # by task; none of them unless questions are to be skipped
        self._rates: Counter[tuple[int, int]] = Counter()  # (task, RATES) of groups since the last step was assembled
        self._steps: dict[int, dict[tuple[int, int], int]] = {}  # the same of steps that are not committed

    def objection(self, sizes: Sequence[int]) -> str:
        """Why an actor whose tasks have ``sizes`` training questions cannot serve this run; "" if it can."""
        labels, sizes = self._task.labels, list(sizes)
        if sizes and (len(sizes) != len(labels) or min(sizes) < 0):
            return f"it counts questions of {sizes} for the {len(labels)} tasks of this run; give it this run's YAML"
        if self.sizes and sizes and sizes != self.sizes:
            task = next(number for number, size in enumerate(sizes) if size != self.sizes[number])
            return (
                f"its task {labels[task]} has {_count(sizes[task])}, that of this run {_count(self.sizes[task])}; give "
                "it the same data set and task.params, or start another run (run.name)"
            )
        if self.skip_passed and not any(sizes):
            return (
                f"advantage.skip_passed={self.skip_passed:g} needs a task that comes to the end of its questions "
                f"(jsonl, search, agent), {', '.join(labels)} has no end; set it to 0"
            )
        if self.skip_passed and max(sizes) > MAX_QUESTIONS:
            return (
                f"advantage.skip_passed={self.skip_passed:g} keeps the history of at most {MAX_QUESTIONS:,} questions "
                f"of a task, not {max(sizes):,}; set it to 0"
            )
        return ""

    def begin(self, sizes: Sequence[int]) -> None:
        """An actor has said how many training questions each task has; one that :meth:`objection` lets in."""
        self.sizes = [int(size) for size in sizes]
        if self.skip_passed:
            self._histories = [History(self._seed, n, self.skip_passed) if n else None for n in self.sizes]

    def _history(self, task: int) -> History | None:
        return self._histories[task] if self._histories else None

    def prompt(self, turn: int) -> int:
        """The prompt to ask at ``turn``, which counts up from 0: that of the same number unless it is retired."""
        task, own = self._task.mixture.place(turn)
        history = self._history(task)
        return turn if history is None else self._task.mixture.prompt(task, history.draw(own))

    def settled(self, prompt: int, members: Sequence[Trajectory]) -> None:
        """The group of ``prompt`` is whole, whatever any filter will make of it."""
        sampled = [t for t in members if t.sampled_tokens]
        if not sampled:
            return
        task, own = self._task.mixture.place(prompt)
        right = sum(map(passed, sampled))
        self._rates[task, pass_rate(right, len(sampled))] += 1
        history = self._history(task)
        if history is not None:
            history.note(own, right, len(sampled))

    def assembled(self, step: int) -> None:
        """What was settled so far goes into the receipt of ``step``."""
        self._steps[step] = dict(self._rates)
        self._rates.clear()

    def receipt(self, step: int) -> dict[str, Any]:
        """``step`` is committed: its pass rates, and what is retired by now."""
        rates = self._steps.get(step, {})
        self._steps = {s: found for s, found in self._steps.items() if s > step}
        totals: Counter[int] = Counter()
        for (_, rate), count in rates.items():
            totals[rate] += count
        line: dict[str, Any] = {"pass_rates": _labelled(totals)}
        if len(self._task.labels) > 1:
            line["pass_rates_by_task"] = {
                label: _labelled({rate: count for (task, rate), count in rates.items() if task == number})
                for number, label in enumerate(self._task.labels)
            }
        if self.skip_passed:
            kept = [history for history in self._histories if history is not None]
            line["questions_retired"] = sum(int(history.retired.sum()) for history in kept)
            line["questions_skipped"] = sum(history.skipped for history in kept)
            line["questions_reset"] = self.resets
        return line

    @property
    def resets(self) -> int:
        """How often a task had no question left and began anew."""
        return sum(history.resets for history in self._histories if history is not None)

    def state(self) -> dict[str, Any]:
        """What :meth:`restore` needs."""
        return {
            "sizes": self.sizes,
            "histories": [None if history is None else history.state() for history in self._histories],
            "rates": _rows(self._rates),
            "steps": [[step, _rows(rates)] for step, rates in self._steps.items()],
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Take up where :meth:`state` was written."""
        self.begin(state["sizes"])
        for history, written in zip(self._histories, state["histories"], strict=True):
            if history is not None:
                history.restore(written)
        self._rates = Counter(_read_rows(state["rates"]))
        self._steps = {step: _read_rows(rows) for step, rows in state["steps"]}


def _count(size: int) -> str:
    return f"{size:,} training questions" if size else "no end of training questions"


def _labelled(rates: dict[int, int]) -> dict[str, int]:
    return {RATES[rate]: rates[rate] for rate in sorted(rates)}


def _rows(rates: dict[tuple[int, int], int]) -> list[list[int]]:
    return [[task, rate, count] for (task, rate), count in sorted(rates.items())]


def _read_rows(rows: list[list[int]]) -> dict[tuple[int, int], int]:
    return {(task, rate): count for task, rate, count in rows}
