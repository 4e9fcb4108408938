"""The staleness ledger again, for many groups: the same decisions as :class:`broker.ledger.StalenessLedger`.

That one walks over everything outstanding at each question, which is nothing for a broker and too much
for millions of groups a minute. Here groups are counted by their deadline, of which there are at most
about budget + 1 at a time. The budget does not move, so the oldest group is the one that is due first.
A test lets both decide side by side.
"""

import heapq
from collections import Counter


class CountingLedger:
    """Promised and completed groups against the steps that will train them."""

    def __init__(self, budget: int, groups_per_step: int, steps: int) -> None:
        self.budget = budget
        self.groups_per_step, self.steps = groups_per_step, steps
        self.next_step = 0  # the next step to assemble
        self.outstanding = 0  # groups granted and not assembled
        self.queued = 0  # of them complete
        self._counts: Counter[int] = Counter()  # outstanding groups by deadline
        self._deadlines: dict[int, int] = {}  # of those in flight
        self._ready: dict[int, list[int]] = {}  # deadline -> heap of complete groups

    @property
    def promised(self) -> int:
        """Groups granted and not complete."""
        return self.outstanding - self.queued

    def grantable(self, version: int) -> int:
        """How many groups may start now with weights no older than ``version``."""
        within_budget = (version + self.budget - self.next_step + 1) * self.groups_per_step
        to_the_end = (self.steps - self.next_step) * self.groups_per_step
        return max(0, min(within_budget, to_the_end) - self.outstanding)

    def grant(self, group: int, version: int) -> None:
        """Promise ``group``, started at ``version`` or later."""
        deadline = version + self.budget
        self._deadlines[group] = deadline
        self._counts[deadline] += 1
        self.outstanding += 1

    def complete(self, group: int, oldest_version: int) -> None:
        """``group`` is whole; ``oldest_version`` sampled its oldest token."""
        granted = self._deadlines.pop(group)
        deadline = max(granted, oldest_version + self.budget)
        if deadline != granted:
            self._count(granted, -1)
            self._counts[deadline] += 1
        heapq.heappush(self._ready.setdefault(deadline, []), group)
        self.queued += 1

    def take(self) -> list[int] | None:
        """The groups to train at ``next_step``, oldest deadline first, now assembled; None while it must wait."""
        if self.next_step >= self.steps or self.queued < self.groups_per_step:
            return None
        wanted, taken = self.groups_per_step, {}
        for deadline in sorted(self._ready):
            taken[deadline] = min(wanted, len(self._ready[deadline]))
            wanted -= taken[deadline]
            if not wanted:
                break
        left = 0
        for deadline in sorted(self._counts):
            left += self._counts[deadline] - taken.get(deadline, 0)
            if left > max(0, deadline - self.next_step) * self.groups_per_step:
                return None  # a group that is due is in flight, or an older one would become late
        return self._assemble(taken)

    def _assemble(self, taken: dict[int, int]) -> list[int]:
        chosen: list[int] = []
        for deadline, count in taken.items():
            ready = self._ready[deadline]
            chosen += [heapq.heappop(ready) for _ in range(count)]
            if not ready:
                del self._ready[deadline]
            self._count(deadline, -count)
        self.queued -= len(chosen)
        self.outstanding -= len(chosen)
        self.next_step += 1
        return chosen

    def _count(self, deadline: int, by: int) -> None:
        self._counts[deadline] += by
        if not self._counts[deadline]:
            del self._counts[deadline]
