"""Groups that were granted and have not come back: until when each is waited for. Pure."""

from collections.abc import Callable, Iterable

SPARE = 1000  # groups that need not be waited for any more, kept before they are looked for


class Overdue:
    """Every group is granted ``timeout_s`` seconds."""

    def __init__(self, timeout_s: float) -> None:
        self.timeout_s = timeout_s
        self._until: dict[int, float] = {}  # in the order of the grants, and so of the deadlines
        self._look_at = SPARE  # groups

    def granted(self, groups: Iterable[int], now: float) -> None:
        """``groups`` are under way from now on."""
        self._until.update(dict.fromkeys(groups, now + self.timeout_s))

    def take(self, now: float, awaits: Callable[[int], bool]) -> list[int]:
        """Groups whose time is up, each told once; ``awaits`` says whether something of a group may still come."""
        if len(self._until) > self._look_at:
            self._until = {group: until for group, until in self._until.items() if awaits(group)}
            self._look_at = 2 * len(self._until) + SPARE
        found = []
        while self._until:
            group, until = next(iter(self._until.items()))
            awaited = awaits(group)
            if awaited and now < until:
                break
            del self._until[group]
            if awaited:
                found.append(group)
        return found
