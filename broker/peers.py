"""Who is connected, in which role, and when each was last heard."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from common.frozen import POLICY
from common.wire import Hello


def name_of(hello: Hello) -> str:
    """Unique among live peers; learner ranks add their rank."""
    return f"{hello.name}.{hello.rank}" if hello.role == "learner" else hello.name


@dataclass
class Peer:
    """A live actor, replica or learner rank."""

    identity: bytes
    hello: Hello
    heard: float
    version: int  # the oldest that anything of it holds, by its own account
    counters: dict[str, float] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)  # in each state (common.trace.STATES)
    reached: int = -1  # the newest version that it has had: what else of it still serves may be granted work

    def __post_init__(self) -> None:
        """It has what it came with."""
        self.holds(self.version)

    def holds(self, version: int) -> None:
        """It says so. Less than before, if servers behind an actor were lost with their weights."""
        self.version, self.reached = version, max(self.reached, version)

    @property
    def name(self) -> str:
        """See :func:`name_of`."""
        return name_of(self.hello)

    @property
    def leads(self) -> bool:
        """Whether it is the learner's rank 0, which publishes and commits."""
        return self.hello.role == "learner" and self.hello.rank == 0

    @property
    def role(self) -> str:
        """actor, replica or learner."""
        return self.hello.role

    @property
    def receives(self) -> bool:
        """Whether it is sent new versions: an actor, or a replica of the policy."""
        return self.role == "actor" or (self.role == "replica" and self.hello.serves == POLICY)


class Roster:
    """The live peers."""

    def __init__(self) -> None:
        self._by_identity: dict[bytes, Peer] = {}

    def add(self, peer: Peer) -> None:
        """A peer was welcomed."""
        self._by_identity[peer.identity] = peer

    def remove(self, identity: bytes) -> Peer | None:
        """A peer left."""
        return self._by_identity.pop(identity, None)

    def get(self, identity: bytes) -> Peer | None:
        """By socket identity."""
        return self._by_identity.get(identity)

    def named(self, name: str) -> Peer | None:
        """By name."""
        return next((p for p in self._by_identity.values() if p.name == name), None)

    def role(self, role: str) -> list[Peer]:
        """Peers of one role, by name."""
        return sorted((p for p in self._by_identity.values() if p.role == role), key=lambda p: p.name)

    def learner(self) -> Peer | None:
        """The learner's rank 0."""
        return next((p for p in self.role("learner") if p.leads), None)

    def receivers(self, version: int, roles: Sequence[str] = ("actor", "replica")) -> list[str]:
        """Names of those in ``roles`` that hold weights older than ``version``; frozen models are not meant."""
        return [p.name for role in roles for p in self.role(role) if p.receives and p.version < version]

    def scorers(self, serves: str) -> list[Peer]:
        """Replicas of the policy (``POLICY``), or of the frozen model of that name."""
        return [p for p in self.role("replica") if p.hello.serves == serves]

    def silent(self, now: float, timeout_s: float) -> list[Peer]:
        """Peers not heard for ``timeout_s``."""
        return [p for p in self._by_identity.values() if now - p.heard > timeout_s]

    def all(self) -> list[Peer]:
        """Every peer."""
        return list(self._by_identity.values())
