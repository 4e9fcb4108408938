"""When the fleet is asked to evaluate on held-out prompts, and what came of it. Pure."""

from dataclasses import dataclass

from common.config import EvaluationSection


@dataclass(frozen=True)
class Evaluation:
    """One evaluation that an actor was asked for."""

    id: int
    version: int


class EvaluationSchedule:
    """At version 0, every ``every`` versions and at the last one; one at a time."""

    def __init__(self, section: EvaluationSection, last_version: int, first_id: int = 0) -> None:
        self.section = section
        self.last_version = last_version
        self.results: list[tuple[int, float]] = []  # (version, mean reward)
        self._next_id = first_id
        self._asked: dict[str, Evaluation] = {}  # by actor
        self._covered = -1  # newest version asked for

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
        self._covered = max(self._covered, version)
        return evaluation

    def result(self, actor: str, evaluation: int, version: int, reward: float) -> bool:
        """Record an answer; False if it was not asked for."""
        asked = self._asked.get(actor)
        if asked is None or asked.id != evaluation:
            return False
        del self._asked[actor]
        self.results.append((version, reward))
        return True

    def lost(self, actor: str) -> None:
        """The actor is gone: ask another."""
        asked = self._asked.pop(actor, None)
        if asked is not None:
            self._covered = asked.version - 1

    def restore(self, results: list[tuple[int, float]]) -> None:
        """Take up where a broker that ended left off; what it had asked for is asked again."""
        self.results = [(int(version), float(reward)) for version, reward in results]
        self._covered = max((version for version, _ in self.results), default=-1)

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
