"""Who receives a version, and when the collective may start: the broker's side of weight publishing.

::

    Publish -> [preparing: Prepare to every receiver, until each is Ready] -> Go
            -> [sending: until the learner Published and every receiver Applied] -> PublishDone

A receiver that misses a deadline is dropped, named, and the others go on in a new epoch; it is
taken in again as soon as it gives a sign, for which it is asked once a deadline. An epoch is one
process group: it changes whenever its members or the learner's store do. Pure: messages and times in,
messages out.
"""

import dataclasses
import itertools
import logging
from collections.abc import Iterator
from typing import Any

from common.joint import POLICY_STREAM
from common.wire import Applied, Go, Prepare, Publish, PublishDone, Published, PublishFailed, Ready, ReceiveFailed

LEARNER = "learner"  # the addressee of messages for the learner's rank 0
Outgoing = list[tuple[str, Any]]
MAX_ATTEMPTS = 5
MAX_REGROUPS = 64  # of one version; who changes its ranks after that is left out
EPOCHS_A_GENERATION = 1_000_000
NO_EPOCH = 0  # of a Prepare that only asks for a sign of life


@dataclasses.dataclass
class _Attempt:
    publish: Publish
    number: int
    members: dict[str, int]  # receiver -> its ranks, in the order of the ranks
    deadline: float
    waiting: set[str]  # not Ready yet, or not Applied yet
    sending: bool = False
    learner_done: bool = False
    left: bool = False  # somebody has left its group, or never was in it: it cannot meet
    applied: list[str] = dataclasses.field(default_factory=list)
    digest: str = ""


def epochs_of(generation: int) -> Iterator[int]:
    """Numbers for the groups that this start of the broker forms."""
    return itertools.count(generation * EPOCHS_A_GENERATION + 1)


class PublishCoordinator:
    """One stream of versions, of which at most one is under way."""

    def __init__(
        self, deadline_s: float, generation: int = 0, stream: str = POLICY_STREAM, epochs: Iterator[int] | None = None
    ) -> None:
        """``generation``: how often this run's broker has started; no epoch number comes twice in a run.

        ``epochs``: where new numbers come from, if other streams draw from it too.
        """
        self.deadline_s, self.stream = deadline_s, stream
        self.log = logging.getLogger("broker.weights")
        self._epochs = epochs or epochs_of(generation)
        self.epoch = 0  # of the present group
        self.published = 0  # newest version that was settled
        self.history: list[int] = []  # versions in the order they were first settled
        self.late: dict[str, int] = {}  # receivers dropped for lateness, with how often
        self._suspended: dict[str, float] = {}  # who gave no sign, and when to ask for one
        self._last: Publish | None = None  # offer
        self._ranks: dict[str, int] = {}  # of receivers that said so; the others have one
        self._absent: set[str] = set()  # said that they cannot receive this version now
        self._regrouped = 0  # times for this version
        self._attempt: _Attempt | None = None
        self._queued: Publish | None = None
        self._group: tuple[list[tuple[str, int]], str, int] | None = None
        self._dropped: list[str] = []

    def restore(self, history: list[int]) -> None:
        """Versions that an earlier life of the broker settled."""
        self.history = list(history)
        self.published = max(self.history, default=0)

    def known(self, version: int) -> None:
        """The learner says that ``version`` is out; the broker may have ended before it heard."""
        if version > self.published:
            if self.history:
                self.history += range(self.published + 1, version + 1)
            self.published = version

    @property
    def busy(self) -> bool:
        """Whether a version is under way."""
        return self._attempt is not None

    @property
    def under_way(self) -> int:
        """The version whose collective has started, -1 for none."""
        return self._attempt.publish.version if self._attempt and self._attempt.sending else -1

    @property
    def newest_offered(self) -> int:
        """The newest version that the learner has offered."""
        offered = [p.version for p in (self._queued, self._attempt.publish if self._attempt else None) if p]
        return max([self.published, *offered])

    def is_suspended(self, receiver: str) -> bool:
        """Whether the receiver was dropped and has given no sign since."""
        return receiver in self._suspended

    def waiting_for(self) -> str:
        """Who the publish under way waits for."""
        attempt = self._attempt
        if attempt is None:
            return ""
        stage = "apply" if attempt.sending else "be ready for"
        names = sorted(attempt.waiting) or [LEARNER]
        return f"{', '.join(names)} to {stage} version {attempt.publish.version}"

    def on_publish(self, message: Publish, receivers: list[str], now: float) -> Outgoing:
        """The learner offers a version."""
        if self._attempt is not None:
            if self._attempt.publish != message:  # else it was offered twice, around a reconnect
                self._queued = message
            return []
        self._dropped, self._absent, self._regrouped = [], set(), 0
        return self._begin(message, receivers, now, 1)

    def _begin(self, publish: Publish, receivers: list[str], now: float, number: int) -> Outgoing:
        self._last = publish
        names = sorted(r for r in receivers if r not in self._suspended and r not in self._absent)
        members = {name: self._ranks.get(name, 1) for name in names}
        group = (list(members.items()), publish.host, publish.port)
        if group != self._group or number > 1:
            self.epoch, self._group = next(self._epochs), group
        self._attempt = _Attempt(publish, number, members, now + self.deadline_s, set(members))
        if not members:
            return self._settle()
        fields = dataclasses.asdict(publish)
        world, first = 1 + sum(members.values()), 1
        outgoing: Outgoing = []
        for name, ranks in members.items():
            outgoing.append((name, Prepare(self.epoch, first, ranks, world, fields)))
            first += ranks
        return outgoing

    def on_ready(self, message: Ready, sender: str, receivers: list[str], now: float) -> Outgoing:
        """A receiver is ready; when all are, the collective starts. One whose ranks are others needs another group."""
        self._suspended.pop(sender, None)
        attempt = self._attempt
        if attempt is None or attempt.sending or message.epoch != self.epoch or sender not in attempt.members:
            return []
        if attempt.left or message.ranks != attempt.members[sender]:
            return self._regroup(sender, message.ranks, receivers, now)
        attempt.waiting.discard(sender)
        if attempt.waiting:
            return []
        attempt.sending = True
        attempt.waiting = set(attempt.members)
        allowed = self.deadline_s + attempt.publish.seconds
        attempt.deadline = now + 2 * allowed  # the learner's own deadline comes first
        go = Go(
            self.epoch, attempt.publish.version, list(attempt.members), 1 + sum(attempt.members.values()), self.stream
        )
        return [(name, go) for name in (*attempt.members, LEARNER)]

    def _regroup(self, sender: str, ranks: int, receivers: list[str], now: float) -> Outgoing:
        """The same attempt in a new group, within the same deadline: ``sender`` has so many ranks now, or some left."""
        attempt = self._attempt
        assert attempt is not None
        self._regrouped += 1
        if ranks and self._regrouped <= MAX_REGROUPS:
            self._ranks[sender] = ranks
        else:
            self._absent.add(sender)
            self._dropped.append(sender)
        deadline, self._group = attempt.deadline, None
        outgoing = self._begin(attempt.publish, receivers, now, attempt.number)
        if self._attempt is not None:
            self._attempt.deadline = deadline
        return outgoing

    def on_published(self, message: Published) -> Outgoing:
        """The learner's side of the collective is done."""
        attempt = self._attempt
        if attempt is None or message.epoch != self.epoch:
            return []
        attempt.learner_done = True
        attempt.digest = message.digest
        return self._settle_if_done()

    def on_applied(self, message: Applied, sender: str) -> Outgoing:
        """A receiver uses the version."""
        self._suspended.pop(sender, None)
        attempt = self._attempt
        if attempt is None or message.version != attempt.publish.version or sender not in attempt.waiting:
            return []
        attempt.waiting.discard(sender)
        attempt.applied.append(sender)
        return self._settle_if_done()

    def on_receive_failed(self, message: ReceiveFailed, sender: str) -> Outgoing:
        """A receiver kept its old weights; it lives, so it is served again.

        While others are prepared for in the same group, the next that is ready takes all to another.
        """
        self._suspended.pop(sender, None)
        self.log.warning("%s did not take version %d: %s", sender, message.version, message.reason)
        self._leave(message.epoch)
        attempt = self._attempt
        if attempt is None or message.epoch != self.epoch:
            return []
        if not attempt.sending:
            attempt.left = True
            return []
        return self._drop(sender)

    def on_publish_failed(self, message: PublishFailed, receivers: list[str], now: float) -> Outgoing:
        """The learner's collective broke: try again with who is left, in a new epoch."""
        self._leave(message.epoch)
        attempt = self._attempt
        if attempt is None or message.epoch != self.epoch:
            return []
        self.log.warning("publish of version %d broke in epoch %d: %s", message.version, message.epoch, message.reason)
        if attempt.number >= MAX_ATTEMPTS:
            self._dropped += list(attempt.members)
            return self._settle()
        return self._begin(attempt.publish, receivers, now, attempt.number + 1)

    def _leave(self, epoch: int) -> None:
        """A member of its group has left it: whoever met there cannot meet again."""
        if epoch == self.epoch:
            self._group = None

    def on_lost(self, name: str, receivers: list[str], now: float) -> Outgoing:
        """A receiver is gone; one that comes under its name knows nothing of the group that it was in."""
        self._suspended.pop(name, None)
        if self._group is not None and any(name == member for member, _ in self._group[0]):
            self._group = None
        attempt = self._attempt
        if attempt is None or name not in attempt.members:
            return []
        if attempt.sending:
            return self._drop(name)
        self._dropped.append(name)
        self._absent.add(name)  # it is sent this version when it asks: one that dies again and again holds up nobody
        return self._begin(attempt.publish, receivers, now, attempt.number + 1)

    def on_learner_lost(self) -> None:
        """Nothing more will come of the version under way."""
        self._attempt, self._queued, self._group = None, None, None

    def on_tick(self, receivers: list[str], now: float) -> Outgoing:
        """Give up on who is late; ask those of before for a sign."""
        attempt, asked = self._attempt, self._ask_suspended(receivers, now)
        if attempt is None:
            if self._queued is not None:
                queued, self._queued = self._queued, None
                return asked + self.on_publish(queued, receivers, now)
            return asked
        if now < attempt.deadline:
            return asked
        return asked + self._give_up(attempt, receivers, now)

    def _ask_suspended(self, receivers: list[str], now: float) -> Outgoing:
        """The word that one waits for may have been lost with a connection, and it with the time to give a sign."""
        due = [name for name, when in self._suspended.items() if name in receivers and now >= when]
        if not due or self._last is None:
            return []
        fields, asked = dataclasses.asdict(self._last), []
        for name in due:
            self._suspended[name] = now + self.deadline_s
            ranks = self._ranks.get(name, 1)
            asked.append((name, Prepare(NO_EPOCH, 1, ranks, 1 + ranks, fields)))
        return asked

    def _give_up(self, attempt: _Attempt, receivers: list[str], now: float) -> Outgoing:
        late = sorted(attempt.waiting)
        stage = "to apply" if attempt.sending else "to be ready for"
        allowed = self.deadline_s + (attempt.publish.seconds if attempt.sending else 0.0)
        self.log.warning("%s took longer than %.0f s %s version %d: dropped",
                         ", ".join(late) or LEARNER, allowed, stage, attempt.publish.version)  # fmt: skip
        for name in late:
            self.late[name] = self.late.get(name, 0) + 1
            self._suspended[name] = now + self.deadline_s
        if attempt.sending:
            outgoing: Outgoing = []
            for name in late:
                outgoing += self._drop(name)
            attempt.deadline = now + self.deadline_s + attempt.publish.seconds
            return outgoing
        self._dropped += late
        return self._begin(attempt.publish, receivers, now, attempt.number + 1)

    def _drop(self, name: str) -> Outgoing:
        attempt = self._attempt
        if attempt is None:
            return []
        self._group = None  # the next version gets a fresh group
        if name in attempt.waiting:
            attempt.waiting.discard(name)
            self._dropped.append(name)
        return self._settle_if_done()

    def _settle_if_done(self) -> Outgoing:
        attempt = self._attempt
        if attempt is None or attempt.waiting or not attempt.learner_done:
            return []
        return self._settle()

    def _settle(self) -> Outgoing:
        attempt = self._attempt
        if attempt is None:
            return []
        self._attempt = None
        version = attempt.publish.version
        if version > self.published or not self.history:
            self.published = version
            self.history.append(version)
        return [(LEARNER, PublishDone(version, attempt.applied, self._dropped, self.stream))]
