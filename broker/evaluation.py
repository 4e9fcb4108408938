"""When the fleet is asked to evaluate on held-out prompts, what came of it, and which version was best. Pure."""

from dataclasses import astuple, dataclass, replace
from typing import Any

from common.config import EvaluationSection
from common.wire import KeepBest

NOBODY = -1  # in the place of a version


@dataclass(frozen=True)
class Evaluation:
    """One evaluation that an actor was asked for."""

    id: int
    version: int


@dataclass(frozen=True)
class Evaluated:
    """What came of one."""

    version: int  # the oldest that sampled for it
    reward: float  # mean over prompts
    low: float | None = None  # of its 95 % interval
    high: float | None = None
    asked: int = NOBODY  # the version that was to be evaluated
    kept: bool | None = None  # whether a checkpoint of that is written; None: by a broker that did not say


class EvaluationSchedule:
    """At version 0, every ``every`` versions and at the last one; one at a time."""

    def __init__(self, section: EvaluationSection, last_version: int, first_id: int = 0) -> None:
        self.section = section
        self.last_version = last_version
        self.results: list[Evaluated] = []
        self._next_id = first_id
        self._asked: dict[str, Evaluation] = {}  # by actor
        self._covered = NOBODY  # newest version asked for
        self._before = NOBODY  # the one before it, of which an answer came

    def due(self, version: int) -> bool:
        """Whether ``version`` should be evaluated now."""
        if self.section.prompts == 0 or self._asked or version <= self._covered:
            return False
        if self._covered < 0 or version >= self.last_version:
            return True
        return version // self.section.every > self._covered // self.section.every

    def ask(self, actor: str, version: int) -> Evaluation:
        """``actor`` is asked."""
        evaluation = Evaluation(self._next_id, version)
        self._next_id += 1
        self._asked[actor] = evaluation
        self._before = self._covered
        self._covered = max(self._covered, version)
        return evaluation

    def asked_of(self, actor: str) -> Evaluation | None:
        """What ``actor`` owes."""
        return self._asked.get(actor)

    def result(
        self, actor: str, evaluation: int, version: int, reward: float,
        low: float | None = None, high: float | None = None,
    ) -> bool:  # fmt: skip
        """Record an answer; False if it was not asked for."""
        asked = self._asked.get(actor)
        if asked is None or asked.id != evaluation:
            return False
        del self._asked[actor]
        kept = self.has_checkpoint(asked.version)
        self.results.append(Evaluated(version, reward, low, high, asked.version, kept))
        return True

    def lost(self, actor: str) -> None:
        """The actor is gone: ask another."""
        if self._asked.pop(actor, None) is not None:
            self._covered = self._before

    def state(self) -> list[list[Any]]:
        """What :meth:`restore` needs."""
        return [list(astuple(result)) for result in self.results]

    def restore(self, results: list[list[Any]]) -> None:
        """Take up where a broker that ended left off; what it had asked for is asked again."""
        found = [Evaluated(*result) for result in results]
        self.results = [replace(r, kept=self.has_checkpoint(r.asked)) if r.kept is None else r for r in found]
        self._covered = max((max(result.version, result.asked) for result in self.results), default=NOBODY)

    @property
    def pending(self) -> bool:
        """Whether an answer is awaited."""
        return bool(self._asked)

    @property
    def first_done(self) -> bool:
        """Whether the starting model has been evaluated (or never will be): rollouts wait for that."""
        return self.section.prompts == 0 or bool(self.results)

    def finished(self, version: int) -> bool:
        """Whether the last version has been evaluated."""
        return self.section.prompts == 0 or (self._covered >= version and not self._asked)

    # ---- the best -------------------------------------------------------------------------------

    def has_checkpoint(self, version: int) -> bool:
        """Whether the learner, as it is set now, writes one of ``version`` to be kept; of 0 there is the model."""
        if version == 0 or not self.section.keep_best:
            return version == 0
        return version == self.last_version or version % self.section.every == 0

    @property
    def best(self) -> Evaluated | None:
        """The evaluation with the greatest reward, the earliest of equals, among versions that can be kept."""
        return max((result for result in self.results if result.kept), key=lambda result: result.reward, default=None)

    def verdict(self, version: int) -> KeepBest:
        """What a learner may forget while ``version`` is the newest published."""
        best = self.best
        asked = [evaluation.version for evaluation in self._asked.values()]
        return KeepBest(
            version=best.asked if best else NOBODY,
            reward=best.reward if best else 0.0,
            pending=max(asked, default=NOBODY),
            decided=version if self._covered >= version else version - 1,
        )
