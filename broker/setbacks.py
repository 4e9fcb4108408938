"""Actors whose groups do nothing but fail: they are granted the next ones seldom, and a run of nothing else ends.

::

    an actor's failures: STEPS_IN_A_ROW steps' worth in a row -> a grant, PAUSE_S, a grant, twice that, ... LONGEST_S
    every actor's, no group ever whole, GIVE_UP_S later            -> TaskError with the last reason

An environment that is down for a while costs time and few prompts, and a machine on which nothing works takes no
groups from those on which it does. What cannot work at all (a misspelt command, prompts that are too long) is a
mistake to be said, not tried a thousand times a second. Pure: the time is handed in, in seconds.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from common.errors import TaskError

STEPS_IN_A_ROW = 2  # steps' worth of groups
PAUSE_S, LONGEST_S = 1.0, 30.0  # between two grants
GIVE_UP_S = 120.0


@dataclass
class _Streak:
    """Of one actor that has failed at something."""

    in_a_row: int = 0
    reason: str = "nobody said why"  # of the last failure
    since: float | None = None  # it has failed often enough
    step: int = 0  # the training step then
    last: float = 0.0  # of its failures
    pause_s: float = 0.0
    next: float = 0.0  # when it may be granted something again


class Setbacks:
    """What the failures so far mean for the next grants."""

    def __init__(self, groups_per_step: int) -> None:
        self._enough = STEPS_IN_A_ROW * groups_per_step
        self._streaks: dict[str, _Streak] = {}

    def note(self, actor: str, reason: str) -> None:
        """Why ``actor``'s last rollout came to nothing."""
        self._streaks.setdefault(actor, _Streak()).reason = reason

    def forget(self, actor: str) -> None:
        """``actor`` is gone."""
        self._streaks.pop(actor, None)

    def look(self, actor: str, in_a_row: int, step: int, now: float) -> str:
        """So many of ``actor``'s groups have failed since its last whole one: an alert "raised" or "cleared"; ""."""
        streak = self._streaks.get(actor)
        if in_a_row < self._enough:
            return "" if streak is None or streak.since is None else "cleared"
        streak = self._streaks.setdefault(actor, _Streak())
        if in_a_row > streak.in_a_row:
            streak.in_a_row, streak.last = in_a_row, now
        if streak.since is not None:
            return ""
        streak.since, streak.step = now, step
        return "raised"

    def holds_back(self, actor: str, now: float) -> bool:
        """Whether ``actor``'s next grant has to wait."""
        streak = self._streaks.get(actor)
        return streak is not None and streak.since is not None and now < streak.next

    def granted(self, actor: str, now: float) -> None:
        """Groups were granted to ``actor``: while nothing succeeds there, not again at once."""
        streak = self._streaks.get(actor)
        if streak is not None and streak.since is not None:
            streak.pause_s = min(LONGEST_S, 2 * streak.pause_s or PAUSE_S)
            streak.next = now + streak.pause_s

    def check(self, actors: Sequence[str]) -> None:
        """None of the run's groups was ever whole, and none is under way at ``actors``.

        Raises TaskError if all of them have gone on failing for too long.
        """
        streaks = [self._streaks.get(actor) for actor in actors]
        if not streaks or any(s is None or s.since is None or s.last - s.since <= GIVE_UP_S for s in streaks):
            return
        raise TaskError(
            f"not one group of this run has come to be whole in {GIVE_UP_S:.0f} s; {self.words(actors[0])}; "
            "correct the task, its environment or rollout's limits, and start again"
        )

    def words(self, actor: str) -> str:
        """What is wrong with it."""
        streak = self._streaks[actor]
        return f"the last {streak.in_a_row} groups of {actor} all failed, the last one so: {streak.reason}"

    @property
    def lasting(self) -> dict[str, int]:
        """The actors where nothing succeeds at present, and the training step since which that is so."""
        return {actor: streak.step for actor, streak in self._streaks.items() if streak.since is not None}
