"""Groups of sibling trajectories: completion in any order, and tombstones for those that never will."""

from collections import Counter, OrderedDict
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from broker.trajectories import LoadTrajectory, Trajectory

NAMED = 4  # of those that are waited for
TOMBSTONES_KEPT = 20_000  # late messages of older groups are refused as unknown, with the same effect


@dataclass
class Group:
    """A granted group."""

    group: int
    prompt: int
    actor: str
    min_version: int
    members: dict[int, Trajectory] = field(default_factory=dict)
    failed: set[int] = field(default_factory=set)  # siblings that will never come

    def is_settled(self, group_size: int) -> bool:
        """Whether nothing more is to come."""
        return len(self.members) + len(self.failed) >= group_size


class GroupBook:
    """Every group from its grant until it is assembled or given up."""

    def __init__(self, group_size: int) -> None:
        self.group_size = group_size
        self._siblings = frozenset(range(group_size))
        self._groups: dict[int, Group] = {}
        self._tombstones: OrderedDict[int, str] = OrderedDict()
        # Kept up to date, because they are asked for at every turn.
        self._owed: Counter[str] = Counter()  # groups that are not settled, by actor
        self.nbytes = 0  # of the trajectories held
        self.held = 0  # trajectories

    def grant(self, group: int, prompt: int, actor: str, min_version: int) -> None:
        """``actor`` was told to start ``group``."""
        self._groups[group] = Group(group, prompt, actor, min_version)
        self._owed[actor] += 1

    def refusal(self, group: int, sibling: int, actor: str) -> str:
        """Why a trajectory of this identity cannot be taken; "" if it can. Repeats are fine."""
        if group in self._tombstones:
            return self._tombstones[group]
        entry = self._groups.get(group)
        if entry is None:
            return "unknown_group"
        if entry.actor != actor:
            return "granted_to_another_actor"
        if not 0 <= sibling < self.group_size:
            return "sibling_out_of_range"
        return ""

    def answer(self, group: int, sibling: int, actor: str) -> str | None:
        """What is said of a trajectory of this identity that is not awaited; None if it is.

        "" is said of what was taken before, and of a group that is trained already.
        """
        if refusal := self.refusal(group, sibling, actor):
            return refusal
        entry = self._groups.get(group)
        if entry is None or sibling in entry.members:
            return ""
        return "sibling_failed" if sibling in entry.failed else None

    def awaits(self, group: int, sibling: int) -> bool:
        """Whether ``sibling`` of ``group`` (-1: any) may still come."""
        entry = self._groups.get(group)
        if entry is None or entry.is_settled(self.group_size) or sibling >= self.group_size:
            return False
        return sibling not in entry.members and sibling not in entry.failed

    def awaits_all(self, group: int, siblings: Collection[int], actor: str) -> bool:
        """Whether ``siblings``, each named once, are all awaited of ``actor``: :meth:`answer` is None for each."""
        entry, named = self._groups.get(group), set(siblings)
        if entry is None or entry.actor != actor or not named or len(named) < len(siblings):
            return False
        return named <= self._siblings and named.isdisjoint(entry.members) and named.isdisjoint(entry.failed)

    def add_all(self, group: int, trajectories: Sequence[Trajectory]) -> bool:
        """Take siblings of ``group`` that are all awaited; returns whether it is now settled."""
        entry = self._groups[group]
        for trajectory in trajectories:
            entry.members[trajectory.sibling] = trajectory
            self.nbytes += trajectory.nbytes
        self.held += len(trajectories)
        settled = entry.is_settled(self.group_size)
        self._settles(entry.actor, settled)
        return settled

    def add(self, trajectory: Trajectory) -> tuple[bool, bool]:
        """Take a trajectory; returns (is new, its group is now settled)."""
        entry = self._groups[trajectory.group]
        if trajectory.sibling in entry.members or trajectory.sibling in entry.failed:
            return False, False
        return True, self.add_all(trajectory.group, [trajectory])

    def fail(self, group: int, sibling: int) -> bool:
        """``sibling`` (-1: all that are missing) will never come; returns whether the group is settled by that."""
        entry = self._groups[group]
        missing = set(range(self.group_size)) - entry.members.keys()
        before = entry.is_settled(self.group_size)
        entry.failed |= missing if sibling < 0 else missing & {sibling}
        settled = entry.is_settled(self.group_size) and not before
        self._settles(entry.actor, settled)
        return settled

    def enough(self, group: int) -> bool:
        """Whether more than half of the siblings are valid, so that the rest may be made up for (algorithms.md 3.3)."""
        return 2 * len(self._groups[group].members) > self.group_size

    def min_version(self, group: int) -> int:
        """The oldest version that the group's grant allows."""
        return self._groups[group].min_version

    def members(self, group: int) -> list[Trajectory]:
        """Siblings in order."""
        found = self._groups[group].members
        return [found[sibling] for sibling in sorted(found)]

    def groups(self) -> list[int]:
        """Every group granted and not assembled."""
        return list(self._groups)

    def prompt(self, group: int) -> int:
        """The group's prompt."""
        return self._groups[group].prompt

    def actor(self, group: int) -> str:
        """Whom the group was granted to."""
        return self._groups[group].actor

    def prompts(self, groups: NDArray[np.int64]) -> list[int]:
        """Those of several; 0 for a group that is not here."""
        return [self._groups[group].prompt if group in self._groups else 0 for group in groups.tolist()]

    def _settles(self, actor: str, settled: bool) -> None:
        self._owed[actor] -= settled
        if not self._owed[actor]:
            del self._owed[actor]  # names of actors that come and go add up

    def take(self, group: int) -> list[Trajectory]:
        """Hand a complete group over; later repeats of its members are recognised and ignored."""
        return self._remove(group, "")[1]

    def tombstone(self, group: int, reason: str) -> tuple[int, list[Trajectory]]:
        """Give a group up; returns its prompt and what had arrived of it."""
        return self._remove(group, reason)

    def _remove(self, group: int, reason: str) -> tuple[int, list[Trajectory]]:
        members = self.members(group)
        entry = self._groups.pop(group)
        self._settles(entry.actor, not entry.is_settled(self.group_size))
        self.nbytes -= sum(t.nbytes for t in members)
        self.held -= len(members)
        self._bury(group, reason)
        return entry.prompt, members

    def is_done(self, group: int) -> bool:
        """Whether the group was assembled (and not given up)."""
        return self._tombstones.get(group) == ""

    def actors(self) -> set[str]:
        """Who owes siblings of a group."""
        return {actor for actor, owed in self._owed.items() if owed}

    def of_actor(self, actor: str) -> list[int]:
        """Groups that ``actor`` still owes siblings of."""
        return [g for g, e in self._groups.items() if e.actor == actor and not e.is_settled(self.group_size)]

    def in_flight(self, actor: str) -> int:
        """How many groups ``actor`` has not finished."""
        return self._owed[actor]

    def owed(self) -> str:
        """How many groups whom keeps waiting, in words: ``a0 8, a1 5``; "" for nobody."""
        found = [(actor, count) for actor, count in self._owed.most_common() if count > 0]
        more = [f"{sum(count for _, count in found[NAMED:])} by others"] if len(found) > NAMED else []
        return ", ".join([f"{actor} {count}" for actor, count in found[:NAMED]] + more)

    def __contains__(self, group: int) -> bool:
        return group in self._groups

    def state(self) -> dict[str, Any]:
        """What :meth:`restore` needs; trajectories by their source."""
        groups = [
            [
                e.group,
                e.prompt,
                e.actor,
                e.min_version,
                [t.place for _, t in sorted(e.members.items())],
                sorted(e.failed),
            ]
            for e in self._groups.values()
        ]
        return {"groups": groups, "tombstones": list(self._tombstones.items())}

    def restore(self, state: dict[str, Any], load: LoadTrajectory) -> None:
        """Take up where :meth:`state` was written; ``load`` finds a trajectory by its place."""
        self._tombstones = OrderedDict((int(g), str(r)) for g, r in state["tombstones"])
        self._groups = {}
        for group, prompt, actor, min_version, places, failed in state["groups"]:
            members = [load(*place) for place in places]
            self._groups[group] = Group(group, prompt, actor, min_version, {t.sibling: t for t in members}, set(failed))
        entries = self._groups.values()
        self._owed = Counter(e.actor for e in entries if not e.is_settled(self.group_size))
        held = [t for e in entries for t in e.members.values()]
        self.nbytes, self.held = sum(t.nbytes for t in held), len(held)

    def _bury(self, group: int, reason: str) -> None:
        self._tombstones[group] = reason
        while len(self._tombstones) > TOMBSTONES_KEPT:
            self._tombstones.popitem(last=False)
