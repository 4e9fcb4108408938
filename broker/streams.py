"""Whose weights go to whom. Pure.

::

    a run as usual          policy  -> actors and replicas
    joint.path              rollout -> actors           policy -> replicas
    joint.train=false                                   policy -> replicas       actors: nothing

A stream has a coordinator of its own, and versions are counted alike in both: version v is what a
model is after training step v - 1. Grants look at what the actors have, scoring at what the
replicas have; the run, and a learner that comes back, count a version as published once it is so
in every stream. The starting model is version 0 everywhere. A rollout model that never changes *is*
every version (docs/decisions/0020-two-models.md).
"""

from broker.publishing import PublishCoordinator, epochs_of
from common.errors import ProtocolError
from common.joint import POLICY_STREAM, ROLLOUT_STREAM, JointSection


class Streams:
    """The coordinators of a run."""

    def __init__(self, deadline_s: float, generation: int, joint: JointSection) -> None:
        """``generation``: how often this run's broker has started."""
        epochs = epochs_of(generation)
        self.policy = PublishCoordinator(deadline_s, generation, POLICY_STREAM, epochs)
        self.rollout = self.policy  # whose versions actors sample with
        self._roles: dict[str, tuple[str, ...]] = {POLICY_STREAM: ("actor", "replica")}
        if joint.path:
            self._roles = {POLICY_STREAM: ("replica",)}
        if joint.trains:
            self.rollout = PublishCoordinator(deadline_s, generation, ROLLOUT_STREAM, epochs)
            self._roles[ROLLOUT_STREAM] = ("actor",)
        self.all = [self.policy] if self.rollout is self.policy else [self.rollout, self.policy]

    def named(self, stream: str) -> PublishCoordinator:
        """Raises :class:`ProtocolError` for a stream that this run does not have."""
        for one in self.all:
            if one.stream == stream:
                return one
        known = ", ".join(one.stream for one in self.all)
        raise ProtocolError(f"this run has no stream of weights {stream!r}, only {known} (joint.path, joint.train)")

    def of_role(self, role: str) -> PublishCoordinator | None:
        """The stream that peers of ``role`` receive, None for none."""
        for one in self.all:
            if role in self._roles[one.stream]:
                return one
        return None

    def of_epoch(self, epoch: int) -> PublishCoordinator | None:
        """The stream whose present group is number ``epoch``: no two have the same."""
        for one in self.all:
            if one.epoch == epoch:
                return one
        return None

    def roles(self, stream: PublishCoordinator) -> tuple[str, ...]:
        """Who receives ``stream``."""
        return self._roles[stream.stream]

    @property
    def published(self) -> int:
        """The newest version that is settled in every stream."""
        return min(one.published for one in self.all)

    @property
    def history(self) -> list[int]:
        """Versions that are settled in every stream, in their order."""
        return min((one.history for one in self.all), key=len)

    @property
    def busy(self) -> bool:
        """Whether a version is under way in any stream."""
        return any(one.busy for one in self.all)

    @property
    def late(self) -> dict[str, int]:
        """Receivers dropped for lateness, with how often."""
        return {name: times for one in self.all for name, times in one.late.items()}

    def waiting_for(self) -> str:
        """Who the publishes under way wait for."""
        return "; ".join(words for one in self.all if (words := one.waiting_for()))
