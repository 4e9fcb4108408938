"""The staleness ledger: which groups are promised, and why none of them will be trained too old.

Every group gets a *deadline*, the last training step at which its oldest token has a lag within
the budget: ``deadline = oldest version + budget``. A step trains exactly ``groups_per_step``
groups. The schedule of what is outstanding must stay feasible at all times::

    for every step t:   #{outstanding groups with deadline <= t} <= (t - next_step + 1) * groups_per_step

Granting, and choosing the groups of a step, both keep this true; so the budget holds by admission
and nothing needs to be discarded for age. With budget 0 it is synchronous training.

The budget may be moved at any time. Every group keeps the one under which it was granted, and a grant
looks at everything outstanding, whatever was promised to it: ``outstanding <= (deadline - next_step + 1)
* groups_per_step``, which is the inequality above for every ``t`` from the new deadline on; before it
nothing changes. So a lower budget grants nothing until what is there has shrunk to its own size.
"""

from bisect import bisect_left, insort
from collections import Counter
from dataclasses import dataclass
from typing import Any

from common.errors import DataError


@dataclass
class _Outstanding:
    version: int  # the oldest that sampled it; until it is complete, the one it may start from
    budget: int  # in force when it was granted
    complete: bool = False

    @property
    def deadline(self) -> int:
        """The last step that may train it."""
        return self.version + self.budget


class StalenessLedger:
    """Promised and completed groups against the steps that will train them."""

    def __init__(self, budget: int, groups_per_step: int, steps: int, next_step: int = 0) -> None:
        self.budget = budget
        self.groups_per_step = groups_per_step
        self.steps = steps
        self.next_step = next_step  # the next step to assemble
        self._outstanding: dict[int, _Outstanding] = {}
        self._ready: list[tuple[int, int, int]] = []  # of those that are complete (version, deadline, group), sorted
        self._due: Counter[int] = Counter()  # outstanding groups by deadline
        self._chosen: list[int] | None = None  # what select() found, until something changes
        self._changed = True

    def set_budget(self, budget: int) -> None:
        """What is granted from now on gets ``budget`` versions. Raises :class:`DataError` if it is negative."""
        if budget < 0:
            raise DataError(f"a staleness budget of {budget}: 0 (synchronous) is the least there is")
        self.budget = budget

    @property
    def queued(self) -> int:
        """Groups complete and not yet assembled into a step."""
        return len(self._ready)

    @property
    def promised(self) -> int:
        """Groups granted and not complete."""
        return len(self._outstanding) - self.queued

    def grantable(self, version: int) -> int:
        """How many groups may start now with weights no older than ``version``."""
        deadline = version + self.budget
        within_budget = (deadline - self.next_step + 1) * self.groups_per_step
        to_the_end = (self.steps - self.next_step) * self.groups_per_step
        return max(0, min(within_budget, to_the_end) - len(self._outstanding))

    def grant(self, group: int, version: int) -> None:
        """Promise that ``group``, started at ``version`` or later, will be trained in time."""
        if group in self._outstanding:
            raise DataError(f"group {group} is granted already")
        if not self.grantable(version):
            raise DataError(f"group {group}: no room at version {version} within a staleness budget of {self.budget}")
        self.promise(group, version)

    def promise(self, group: int, version: int) -> None:
        """As :meth:`grant`, of what was found grantable before."""
        self._put(group, _Outstanding(version, self.budget))

    def start_at(self, step: int) -> None:
        """``step`` is the first to be assembled here."""
        self.next_step, self._changed = step, True

    def complete(self, group: int, oldest_version: int) -> None:
        """``group`` is whole; ``oldest_version`` sampled its oldest token."""
        entry = self._outstanding[group]
        self._remove(group)
        entry.complete, entry.version = True, max(entry.version, oldest_version)
        self._put(group, entry)

    def _put(self, group: int, entry: _Outstanding) -> None:
        """``group`` is outstanding from now on."""
        self._outstanding[group], self._changed = entry, True
        self._due[entry.deadline] += 1
        if entry.complete:
            insort(self._ready, (entry.version, entry.deadline, group))

    def _remove(self, group: int) -> None:
        """Forget what is outstanding of ``group``, if anything is."""
        entry, self._changed = self._outstanding.pop(group, None), True
        if entry is None:
            return
        self._due[entry.deadline] -= 1
        if not self._due[entry.deadline]:
            del self._due[entry.deadline]
        if entry.complete:
            del self._ready[bisect_left(self._ready, (entry.version, entry.deadline, group))]

    def is_complete(self, group: int) -> bool:
        """Whether ``group`` waits to be assembled."""
        return group in self._outstanding and self._outstanding[group].complete

    def release(self, group: int) -> None:
        """``group`` will never be complete: its place is free again."""
        self._remove(group)

    def select(self) -> list[int] | None:
        """The groups to train at ``next_step``, the oldest first, or None while it must wait.

        Waits when fewer than ``groups_per_step`` groups are complete, when a group that is due is
        still in flight, or when taking a fresher group now would make an older one late. After the
        budget was lowered an older group may be due later than a fresher one; where not all can wait
        for those before them, those that are due first are taken.
        """
        if self._changed:
            self._chosen, self._changed = self._choose(), False
        return self._chosen

    def _choose(self) -> list[int] | None:
        if self.next_step >= self.steps or self.queued < self.groups_per_step:
            return None
        chosen = self._ready[: self.groups_per_step]
        if not self._may_take(chosen):
            chosen = sorted(self._ready, key=lambda entry: entry[1:])[: self.groups_per_step]
            if not self._may_take(chosen):
                return None
        return [group for _, _, group in chosen]

    def _may_take(self, chosen: list[tuple[int, int, int]]) -> bool:
        """Whether everything else is still in time if ``chosen`` are trained now."""
        left = self._due - Counter(deadline for _, deadline, _ in chosen)
        total = 0
        for deadline in sorted(left):
            total += left[deadline]
            if total > max(0, deadline - self.next_step) * self.groups_per_step:
                return False
        return True

    def assembled(self, groups: list[int]) -> None:
        """``groups`` make up ``next_step``."""
        for group in groups:
            entry = self._outstanding[group]
            self._remove(group)
            if entry.deadline < self.next_step:
                raise DataError(f"group {group} was due at step {entry.deadline}, not {self.next_step}")
        self.next_step += 1
        self._changed = True

    def state(self) -> dict[str, Any]:
        """What :meth:`restore` needs."""
        return {
            "next_step": self.next_step,
            "budget": self.budget,
            "outstanding": [[i, g.version, g.budget, g.complete] for i, g in self._outstanding.items()],
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Take up where :meth:`state` was written."""
        self.next_step, self.budget = int(state["next_step"]), int(state["budget"])
        self._outstanding = {i: _Outstanding(*promise) for i, *promise in state["outstanding"]}
        self._ready = sorted((g.version, g.deadline, i) for i, g in self._outstanding.items() if g.complete)
        self._due = Counter(g.deadline for g in self._outstanding.values())
        self._changed = True

    def waiting_for(self) -> str:
        """What keeps the next step from being assembled, in words."""
        if self.queued < self.groups_per_step:
            return f"rollouts: {self.queued} of {self.groups_per_step} groups complete, {self.promised} in flight"
        due = sum(not g.complete and g.deadline <= self.next_step for g in self._outstanding.values())
        return f"rollouts: {due} groups in flight would exceed the staleness budget if they were left behind"
