"""Messages of every peer: greeting, heartbeat and farewell."""

from dataclasses import dataclass, field
from typing import ClassVar

from common.errors import DataError
from common.wire.fields import FAILED, MAX_TEXT, Unchecked

MAX_FACTS, MAX_FACT = 8, 512  # of a peer's model
MAX_COUNTERS = 256  # of a heartbeat


@dataclass
class Hello:
    """First message of a peer, and again after the broker was lost."""

    TAG: ClassVar[str] = "hello"
    role: str  # "actor" | "replica" | "learner"
    name: str  # unique among live peers
    run_id: str  # "" if the peer has not met this run yet
    session: str  # one process start (one launch of all ranks, for the learner)
    rank: int
    world: int
    version: int  # the weights it holds
    capacity: int  # actors: groups decoded together
    host: str
    pid: int
    model: dict[str, str] = field(default_factory=dict)  # common.identity of its model directory
    serves: str = ""  # replicas: the frozen model that it scores under, "" for the policy
    questions: list[int] = field(default_factory=list)  # actors: training questions of each task, 0 for no end of them

    def check(self) -> None:
        """Texts end in log lines and status.json, so they are short and printable."""
        said = ("name", "role", "session", "host", "serves")
        for what, text in ((what, getattr(self, what)) for what in said):
            if len(text) > MAX_TEXT or not text.isprintable():
                raise DataError(f"hello: {what} {text[:40]!r} needs at most {MAX_TEXT} printable characters")
        if len(self.model) > MAX_FACTS or any(len(fact) > MAX_FACT or not fact.isprintable()
                                              for fact in (*self.model, *self.model.values())):  # fmt: skip
            raise DataError(f"hello: at most {MAX_FACTS} facts of a model, of {MAX_FACT} printable characters")
        if not self.name or not 0 <= self.rank < self.world or self.capacity < 0:
            raise DataError("hello: needs a name, a rank below its world, and no negative capacity")


@dataclass
class Welcome(Unchecked):
    """The broker takes the peer in."""

    TAG: ClassVar[str] = "welcome"
    run_id: str
    version: int  # the newest version published so far
    heartbeat_s: float


@dataclass
class Refused(Unchecked):
    """The broker does not take the peer in; the peer ends with this reason."""

    TAG: ClassVar[str] = "refused"
    reason: str


@dataclass
class WhoAreYou(Unchecked):
    """The broker (perhaps a restarted one) does not know the sender, who should say Hello."""

    TAG: ClassVar[str] = "who_are_you"


@dataclass
class Heartbeat:
    """I live. Answered by Pong."""

    TAG: ClassVar[str] = "heartbeat"
    version: int
    counters: dict[str, float]
    seconds: dict[str, float] = field(default_factory=dict)  # in each state of common.trace.STATES since its start
    sent_ns: int = 0  # by the sender's clock

    def check(self) -> None:
        """Counters are kept as long as the peer is."""
        for kept in (self.counters, self.seconds):
            if len(kept) > MAX_COUNTERS or any(len(name) > MAX_TEXT for name in kept):
                raise DataError(f"heartbeat: at most {MAX_COUNTERS} counters with names of {MAX_TEXT} characters")


@dataclass
class Pong(Unchecked):
    """The broker lives; in answer to a heartbeat also its clock (:class:`common.trace.ClockOffset`)."""

    TAG: ClassVar[str] = "pong"
    version: int
    echo_ns: int = 0  # ``sent_ns`` of the heartbeat, by the peer's clock; 0 where it answers none
    received_ns: int = 0  # when it came, by the broker's clock
    sent_ns: int = 0  # by the broker's clock


@dataclass
class Bye(Unchecked):
    """A leave; ``reason`` begins with FAILED where it is not an orderly one."""

    TAG: ClassVar[str] = "bye"
    reason: str

    @property
    def orderly(self) -> bool:
        """Whether its sender meant to end."""
        return not self.reason.startswith(FAILED)


@dataclass
class Stop(Unchecked):
    """The run is over: finish and leave."""

    TAG: ClassVar[str] = "stop"
    reason: str
